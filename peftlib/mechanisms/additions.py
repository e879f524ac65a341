"""The smallest things that can stand behind a module: a vector that is added, or one that stretches what a norm made;
and a linear map of low rank, for a bottleneck that is as small."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.mechanisms.precision import cast


class Shift(nn.Module):
    """``forward(x, y) = y + b`` for y (..., n); b (n,), zero at the start: a bias, also where the map has none."""

    def __init__(self, n: int):
        super().__init__()
        self.b = nn.Parameter(torch.zeros(n))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + self.b.to(y.dtype)


class Stretch(nn.Module):
    """Behind a norm: ``forward(x, y) = y + w * z`` for the norm's input x (..., n) and z, what the norm makes of x
    before its own weight; w (n,), zero at the start, is a change of that weight."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(norm.weight.shape))
        self.centres = isinstance(norm, nn.LayerNorm)
        self.eps = norm.eps if self.centres else norm.variance_epsilon

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, shape = cast(x, self.w), self.w.shape
        if self.centres:
            stretched = F.layer_norm(x, shape, self.w, None, self.eps)
        else:
            stretched = F.rms_norm(x, shape, self.w, self.eps)
        return y + stretched.to(y.dtype)


class LowRankLinear(nn.Module):
    """A linear map of low rank: ``forward(x) = B A x + b`` for x (..., in); A (rank, in), B (out, rank), b (out,).
    A and B start Glorot-uniform, b at zero."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.A = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, in_features)))
        self.B = nn.Parameter(nn.init.xavier_uniform_(torch.empty(out_features, rank)))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.A.T @ self.B.T + self.bias
