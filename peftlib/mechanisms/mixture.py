"""Linear maps of which every training pass draws one, and which are one map, their average, at all other times."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.mechanisms.low_rank import LowRank, update
from peftlib.mechanisms.precision import cast


class Experts(nn.Module):
    """``forward(x) = W_i x + b_i``: i is drawn uniformly for the whole batch in training; otherwise W and b are the
    experts' means.

    Shapes: ``weight`` (M, out, in), ``bias`` (M, out) or None; (out, in) and (out) after :meth:`keep`. Weights start
    N(0, std) or, without ``std``, Kaiming-uniform with a = sqrt(5) each; biases at zero.
    """

    def __init__(self, in_features: int, out_features: int, count: int, std: float | None = None, bias: bool = True):
        super().__init__()
        self.count = count
        self.weight = nn.Parameter(torch.empty(count, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(count, out_features)) if bias else None
        for weight in self.weight:
            if std is None:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            else:
                nn.init.normal_(weight, std=std)

    def mean(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The average weight (out, in) and bias (out)."""
        if self.count == 1:
            return self.weight, self.bias
        return self.weight.mean(dim=0), None if self.bias is None else self.bias.mean(dim=0)

    def keep(self) -> None:
        """Become one map, the average, which trains on by itself."""
        if self.count > 1:
            weight, bias = self.mean()
            self.weight = nn.Parameter(weight.detach())
            self.bias = None if bias is None else nn.Parameter(bias.detach())
            self.count = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.count == 1:
            return F.linear(x, *self.mean())
        # Drawn as a tensor: no jump in a compiled graph, and a recomputation restores the generator, so draws it again.
        i = torch.randint(self.count, (1,), device=x.device)
        weight = self.weight.index_select(0, i)[0]
        return F.linear(x, weight, None if self.bias is None else self.bias.index_select(0, i)[0])


class MixedLowRank(LowRank):
    """A low-rank update with M matrices A, of which one is drawn, and one B."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, count: int, dropout: float = 0.0):
        super().__init__(in_features, out_features, rank, scale, dropout)
        del self.A
        self.experts = Experts(in_features, rank, count, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = cast(self.dropout(x), self.B).flatten(0, -2)
        return update(y, self.experts(x), self.B, self.scale)

    def delta(self) -> torch.Tensor:
        """The (out, in) update of the average, formed in float32 or wider."""
        dtype = torch.promote_types(self.B.dtype, torch.float32)
        return self.scale * (self.B.detach().to(dtype) @ self.experts.mean()[0].detach().to(dtype))
