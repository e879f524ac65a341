"""Scaling vectors as their papers write them."""

import torch


def ia3_attention(q, k, v, l_k, l_v):
    """Liu et al. 2022: softmax(Q (l_k * K)^T / sqrt(p)) (l_v * V) of one head; q, k, v (n, p), vectors (p)."""
    scores = [[sum(a * (s * b) for a, s, b in zip(row, l_k, key)) / len(key) ** 0.5 for key in k] for row in q]
    weights = torch.softmax(torch.stack([torch.stack(row) for row in scores]), dim=-1)
    values = torch.stack([torch.stack([s * a for s, a in zip(l_v, row)]) for row in v])
    return torch.stack([sum(w * value for w, value in zip(row, values)) for row in weights])


def ia3_ffn(x, w1, b1, w2, b2, l_f, act):
    """W_2 (l_f * act(W_1 x + b_1)) + b_2 of one token x (d)."""
    inner = torch.stack([s * act(sum(a * b for a, b in zip(row, x)) + bias) for row, bias, s in zip(w1, b1, l_f)])
    return torch.stack([sum(a * b for a, b in zip(row, inner)) + bias for row, bias in zip(w2, b2)])


def hadamard(a, w, b):
    """Chen et al. 2023: w * a + b of one token a (d)."""
    return torch.stack([wi * ai + bi for wi, ai, bi in zip(w, a, b)])
