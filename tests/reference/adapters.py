"""The bottleneck adapter as its paper writes it."""

import math

import torch

ACTIVATIONS = {
    "relu": lambda a: max(a, 0.0),
    "gelu": lambda a: 0.5 * a * (1 + math.erf(a / math.sqrt(2))),
    "swish": lambda a: a / (1 + math.exp(-a)),
}


def sequential_adapter(y, W_down, b_down, W_up, b_up, activation="gelu"):
    """Houlsby et al. 2019: h + W_up act(W_down h + b_down) + b_up, for each token h of the output y (tokens, d) of a
    block, one neuron at a time; in y's dtype."""
    act, rows = ACTIVATIONS[activation], []
    for h in y.tolist():
        inner = [act(sum(w * v for w, v in zip(row, h)) + b) for row, b in zip(W_down.tolist(), b_down.tolist())]
        delta = [sum(w * v for w, v in zip(row, inner)) + b for row, b in zip(W_up.tolist(), b_up.tolist())]
        rows.append([a + b for a, b in zip(h, delta)])
    return torch.tensor(rows, dtype=y.dtype)
