"""The Fastfood projection with every matrix written out."""

from __future__ import annotations

import torch
from scipy.linalg import hadamard


def dense(size: int, signs: torch.Tensor, order: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
    """The (size, d) matrix ``H G Pi H B / sqrt(size * sum(G^2))``, d = len(signs); Hadamard matrices of len(order)."""
    padded, used = len(order), len(signs)
    H = torch.tensor(hadamard(padded), dtype=torch.float64)
    B = torch.zeros(padded, used, dtype=torch.float64)
    B[range(used), range(used)] = signs.double()
    Pi = torch.zeros(padded, padded, dtype=torch.float64)
    Pi[range(padded), order] = 1
    G = torch.diag(normal.double())
    return (H @ G @ Pi @ H @ B)[:size] / (size * normal.double().square().sum()).sqrt()
