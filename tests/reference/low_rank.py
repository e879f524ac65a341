"""Low-rank updates as their papers write them, one entry at a time, in Python's doubles."""

import math

import torch


def _dot(row, column):
    return sum(a * b for a, b in zip(row, column))


def _times(matrix, vector):
    return [_dot(row, vector) for row in matrix.tolist()]


def lora(x, weight, bias, a, b, alpha, rank):
    """Hu et al. 2022: h = W0 x + (alpha / r) B A x, for each row of x (tokens, in)."""
    rows = []
    for token in x.tolist():
        frozen = _times(weight, token)
        update = _times(b, [_dot(row, token) for row in a.tolist()])
        rows.append([w + c + alpha / rank * u for w, c, u in zip(frozen, bias.tolist(), update)])
    return torch.tensor(rows)


def adalora(x, weight, bias, p, singular, q, alpha, rank):
    """Zhang et al. 2023: h = W0 x + (alpha / r) P Lambda Q x, for each row of x (tokens, in)."""
    rows = []
    for token in x.tolist():
        frozen = _times(weight, token)
        inner = [s * c for s, c in zip(singular.tolist(), _times(q, token))]
        rows.append([w + c + alpha / rank * u for w, c, u in zip(frozen, bias.tolist(), _times(p, inner))])
    return torch.tensor(rows)


def lora_prune(maps, units):
    """Zhang et al. 2024 (LoRAPrune): the score of each unit of one block. ``maps`` are (W, A, B, g_A, g_B, scale, axis)
    with W (out, in) and the axis along which the units lie, equal parts in order."""
    scores = [0.0] * units
    for w, a, b, ga, gb, scale, axis in maps:
        out, inputs, rank = len(w), len(w[0]), len(a)
        sums = [0.0] * units
        for i in range(out):
            for j in range(inputs):
                gradient = sum(gb[i][k] * a[k][j] + b[i][k] * ga[k][j] - gb[i][k] * ga[k][j] for k in range(rank))
                weight = w[i][j] + scale * sum(b[i][k] * a[k][j] for k in range(rank))
                unit = i * units // out if axis == 0 else j * units // inputs
                sums[unit] += abs(gradient * weight)
        norm = math.sqrt(sum(s * s for s in sums))
        scores = [t + s / norm for t, s in zip(scores, sums)]
    return scores


def lora_prune_share(step, total, ratio, warmup, cooldown):
    """Zhang et al. 2024 (LoRAPrune): the cubic schedule; ``step`` counts finished steps from 1."""
    if step <= warmup:
        return 0.0
    if step >= total - cooldown:
        return ratio
    left = (total - cooldown - step) / (total - cooldown - warmup)
    return ratio - ratio * left**3
