"""Low-rank updates as their papers write them, one entry at a time, in Python's doubles."""

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
