"""Soft top-k and CODA's layer, one row at a time, without gathering anything back."""

import math

import torch


def soft_top_k(scores, k, epsilon):
    """The weights w in [0, 1] with sum k that maximize <s, w> + epsilon H(w), by bisection: w = min(1, exp((s + a) /
    epsilon)) for the one a with which the sum is right."""
    low, high = -1e3, 1e3
    for _ in range(200):
        a = (low + high) / 2
        weights = [min(1.0, math.exp(min(0.0, (s + a) / epsilon))) for s in scores]
        low, high = (a, high) if sum(weights) < k else (low, a)
    return weights


def coordinate_ascent(scores, k, epsilons):
    """The paper's steps for a list of scores, with an epsilon for each."""
    b = [0.0] * len(scores)
    for epsilon in epsilons:
        a = epsilon * math.log(k) - epsilon * math.log(sum(math.exp((s + x) / epsilon) for s, x in zip(scores, b)))
        b = [min(-s - a, 0.0) for s in scores]
    return [math.exp((s + a + x) / epsilons[-1]) for s, x in zip(scores, b)]


def conditional_layer(x, normed, router, adapter, layer, reduction, epsilons):
    """One row's x (n, d) behind a conditional layer. ``layer(chosen)`` gives the frozen layer's output (k, d) for the
    chosen positions, ``adapter`` is a function of the normed states."""
    n = len(x)
    k = math.ceil(n / reduction)
    scores = [float(h @ router) for h in normed]
    weights = coordinate_ascent(scores, k, epsilons) if k < n else [1.0] * n
    chosen = sorted(sorted(range(n), key=lambda i: -scores[i])[:k])
    y = x + adapter(normed)
    for i, out in zip(chosen, layer(chosen)):
        y[i] = y[i] + weights[i] * (out - x[i])
    return y, chosen


def epsilons(last, steps=20, first=4.0, decay=0.7):
    return [max(last, first * decay**step) for step in range(steps)]


def rows_of(mask):
    """The real positions of each row of a padded batch."""
    return [torch.nonzero(row).flatten().tolist() for row in mask]
