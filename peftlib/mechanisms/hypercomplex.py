"""Linear maps whose weight is a sum of Kronecker products of shared matrices with factors of a map's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.errors import TargetError
from peftlib.mechanisms.precision import cast


class Rules(nn.Module):
    """The shared matrices: ``A`` (n, n, n), the i-th is A[i]; they start at N(0, std)."""

    def __init__(self, divisions: int, std: float):
        super().__init__()
        self.A = nn.Parameter(torch.empty(divisions, divisions, divisions).normal_(std=std))


class Hypercomplex(nn.Module):
    """``forward(x) = W x + bias`` with ``W = sum_i A_i kron (s_i t_i^T)``, A_i of ``rules``.

    Shapes: x (..., in); s (n, out / n, rank), t (n, in / n, rank), bias (out). s and t start Glorot-uniform matrix by
    matrix, the bias at zero. W is not formed where its factors alone take fewer products of numbers.

    Raises TargetError for a size that n does not divide.
    """

    def __init__(self, rules: Rules, in_features: int, out_features: int, rank: int):
        super().__init__()
        n = len(rules.A)
        for size in (in_features, out_features):
            if size % n:
                raise TargetError(
                    f"divisions={n} does not divide {size}: hidden size and bottleneck must be multiples of it"
                )
        self.rules = rules
        self.s = nn.Parameter(torch.empty(n, out_features // n, rank))
        self.t = nn.Parameter(torch.empty(n, in_features // n, rank))
        self.bias = nn.Parameter(torch.zeros(out_features))
        for factor in (*self.s, *self.t):
            nn.init.xavier_uniform_(factor)
        self.formed = rank * (n * (in_features + out_features) + n**3) >= in_features * out_features

    def weight(self) -> torch.Tensor:
        """W, (out, in)."""
        blocks = torch.einsum("iac,ipr,iqr->apcq", self.rules.A, self.s, self.t)
        return blocks.reshape(len(self.bias), -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = cast(x, self.bias)
        if self.formed:
            return F.linear(x, self.weight(), self.bias)
        n = len(self.rules.A)
        inner = torch.einsum("...cq,iqr->...icr", x.unflatten(-1, (n, -1)), self.t)
        mixed = torch.einsum("...icr,iac->...air", inner, self.rules.A)
        return torch.einsum("...air,ipr->...ap", mixed, self.s).flatten(-2) + self.bias
