"""A low-rank update beside a linear map: y + scale * B (A x). LoRA and its kin are this, with other lives."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.anatomy import Site
from peftlib.errors import TargetError
from peftlib.mechanisms.precision import cast

Init = Literal["kaiming", "gaussian"]


def check_rank(rank: int, site: Site) -> None:
    """Raise TargetError when no matrix of this site can have the rank."""
    largest = min(site.in_features, site.out_features)
    if not 1 <= rank <= largest:
        raise TargetError(
            f"rank {rank} does not fit {site} ({site.out_features} x {site.in_features}); "
            f"choose a rank from 1 to {largest}, or other targets"
        )


def update(y: torch.Tensor, down: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """``y + scale * B down`` for ``down`` (n, rank), B (out, rank) and y (..., out) with n rows, in y's dtype."""
    if down.dtype != y.dtype:
        return y + (F.linear(down, B) * scale).to(y.dtype).view(y.shape)
    return torch.addmm(y.flatten(0, -2), down, B.T, alpha=scale).view(y.shape)


def thin(out_features: int, rank: int) -> torch.Tensor:
    """Memory for an (out, rank) matrix, column by column: the three products with it (forward, and both gradients) are
    then up to four times as fast on a CPU as in the usual order, because every one of them reads whole rows."""
    return torch.empty(rank, out_features).T


class LowRank(nn.Module):
    """``forward(x, y) = y + scale * B A dropout(x)``.

    Shapes: x (..., in), y (..., out), A (rank, in), B (out, rank). A starts Kaiming-uniform with a = sqrt(5), as the
    original LoRA code has it, or N(0, std); B starts at zero, so the start is the identity.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        init: Init = "kaiming",
        std: float = 0.02,
    ):
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(thin(out_features, rank).zero_())
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        if init == "kaiming":
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        else:
            nn.init.normal_(self.A, std=std)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = cast(self.dropout(x), self.A).flatten(0, -2)
        return update(y, F.linear(x, self.A), self.B, self.scale)

    def delta(self) -> torch.Tensor:
        """The (out, in) update ``scale * B A``, formed in float32 or wider."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        return self.scale * (self.B.detach().to(dtype) @ self.A.detach().to(dtype))


def add_to_weight(site: Site, delta: torch.Tensor) -> None:
    """Fold an (out, in) update into a site's weight, rounding once."""
    with torch.no_grad():
        weight = site.weight
        weight.copy_((weight.to(delta.dtype) + delta).to(weight.dtype))
