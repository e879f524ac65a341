"""A low-rank update beside a linear map, y + scale * B A x: the layer of LoRA, and of the methods that train it in
another way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.anatomy import Site
from peftlib.errors import TargetError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.precision import cast, without_autocast

Init = Callable[[torch.Tensor], torch.Tensor]
"""Fills a tensor and gives it back, as the functions of torch.nn.init do."""


def kaiming(tensor: torch.Tensor) -> torch.Tensor:
    """Kaiming-uniform with a = sqrt(5), the start of A in the original LoRA code."""
    return nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))


class LowRank(nn.Module):
    """``forward(x, y) = y + scale * B A dropout(x)`` for the input x and the output y of a linear map.

    Shapes, with b rows of t tokens: x (b, t, in), y (b, t, out), A (r, in), B (out, r); ``scale`` is LoRA's alpha / r.
    B starts at zero, so the start is the identity. With ``train_A=False`` A stays at its start, and the backward pass
    needs A x, (b t, r), instead of x.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        init_A: Init = kaiming,
        init_B: Init = nn.init.zeros_,
        train_A: bool = True,
    ):
        super().__init__()
        self.A = nn.Parameter(init_A(torch.empty(rank, in_features)), requires_grad=train_A)
        self.B = nn.Parameter(init_B(thin(out_features, rank)))
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = cast(self.dropout(x), self.A).flatten(0, -2)  # (b, t, in) -> (b t, in)
        Ax = F.linear(x, self.A)  # (b t, in) -> (b t, r)
        return update(y, Ax, self.B, self.scale)  # (b t, r) -> (b, t, out)

    @property
    def delta_dtype(self) -> torch.dtype:
        return torch.promote_types(self.A.dtype, torch.float32)

    def delta(self) -> torch.Tensor:
        """The (out, in) update ``scale * B A``, formed in float32 or wider."""
        with without_autocast(self.A):
            return self.scale * (self.B.detach().to(self.delta_dtype) @ self.A.detach().to(self.delta_dtype))


def update(y: torch.Tensor, Ax: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """``y + scale * B A x`` in y's dtype: y (b, t, out), Ax (b t, r), B (out, r)."""
    if Ax.dtype != y.dtype:
        return y + (F.linear(Ax, B) * scale).to(y.dtype).view(y.shape)  # (b t, r) -> (b, t, out)
    return torch.addmm(y.flatten(0, -2), Ax, B.T, alpha=scale).view(y.shape)  # (b t, r) -> (b, t, out)


def thin(out_features: int, rank: int) -> torch.Tensor:
    """Memory for an (out, rank) matrix, column by column: the three products with it (forward, and both gradients) are
    then up to four times as fast on a CPU as in the usual order, because every one of them reads whole rows."""
    return torch.empty(rank, out_features).T


Pattern = tuple[tuple[str, Any], ...]
"""Pairs of a site pattern, which is matched against a site's name and its path, and a value."""


def pairs(pattern: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> Pattern:
    """A pattern that was given as a dictionary or, from JSON, in lists."""
    items = pattern.items() if isinstance(pattern, Mapping) else pattern
    return tuple((name, value) for name, value in items)


def at(site: Site, pattern: Pattern, default: Any) -> Any:
    """The value of the first pattern that matches the site, else the default."""
    found = (value for name, value in pattern if fnmatchcase(site.name, name) or fnmatchcase(site.path, name))
    return next(found, default)


def check_rank(rank: int, site: Site) -> None:
    """Raise TargetError when no matrix of this site can have the rank."""
    largest = min(site.in_features, site.out_features)
    if not 1 <= rank <= largest:
        raise TargetError(
            f"rank {rank} does not fit {site} ({site.out_features} x {site.in_features}); "
            f"choose a rank from 1 to {largest}, or other targets"
        )


def sites_of_rank(host: Host, patterns: tuple[str, ...] | str, rank: int) -> list[Site]:
    """The sites that match the patterns, all of which can have the rank. Raises TargetError where one cannot, or where
    a pattern matches nothing."""
    sites = host.anatomy.sites(patterns)
    for site in sites:
        check_rank(rank, site)
    return sites


def add_to_weight(site: Site, delta: torch.Tensor) -> None:
    """Add an (out, in) update to a site's weight, rounding once."""
    with torch.no_grad():
        weight = site.weight
        weight.copy_((weight.to(delta.dtype) + delta).to(weight.dtype))
