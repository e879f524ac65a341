"""Adapters as their papers write them: one token, one neuron at a time."""

import math

import torch

ACTIVATIONS = {
    "relu": lambda a: max(a, 0.0),
    "gelu": lambda a: 0.5 * a * (1 + math.erf(a / math.sqrt(2))),
    "swish": lambda a: a / (1 + math.exp(-a)),
}


def _bottleneck(h, down, down_bias, up, up_bias, activation):
    act = ACTIVATIONS[activation]
    inner = [act(sum(w * v for w, v in zip(row, h)) + b) for row, b in zip(down.tolist(), down_bias.tolist())]
    return [sum(w * v for w, v in zip(row, inner)) + b for row, b in zip(up.tolist(), up_bias.tolist())]


def sequential_adapter(y, down, down_bias, up, up_bias, activation="gelu"):
    """Houlsby et al. 2019: h + W_up act(W_down h), for the output y (tokens, d) of a block."""
    rows = []
    for h in y.tolist():
        delta = _bottleneck(h, down, down_bias, up, up_bias, activation)
        rows.append([a + b for a, b in zip(h, delta)])
    return torch.tensor(rows)


def parallel_adapter(x, y, down, down_bias, up, up_bias, scale=4.0, activation="relu"):
    """He et al. 2022: FFN(x) + s W_up ReLU(W_down x), for a block's input x and output y (tokens, d)."""
    rows = []
    for h, out in zip(x.tolist(), y.tolist()):
        delta = _bottleneck(h, down, down_bias, up, up_bias, activation)
        rows.append([a + scale * b for a, b in zip(out, delta)])
    return torch.tensor(rows)


def residual_adapter(rows, gain, shift, down, down_bias, up, up_bias, activation="relu", eps=1e-5):
    """Lin et al. 2020: h + W_up ReLU(W_down LN(h)), for a layer's output (tokens, d)."""
    out = []
    for h in rows.tolist():
        mean = sum(h) / len(h)
        spread = math.sqrt(sum((v - mean) ** 2 for v in h) / len(h) + eps)
        normed = [g * (v - mean) / spread + b for v, g, b in zip(h, gain.tolist(), shift.tolist())]
        delta = _bottleneck(normed, down, down_bias, up, up_bias, activation)
        out.append([a + b for a, b in zip(h, delta)])
    return torch.tensor(out)
