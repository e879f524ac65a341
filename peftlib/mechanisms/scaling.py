"""Trained vectors that scale (and shift) what goes into or comes out of a linear map, and how they fold into it."""

from __future__ import annotations

import torch
from torch import nn

from peftlib.anatomy import Site


class ScaleInput(nn.Module):
    """``forward(x) = scale * x``, elementwise; x (..., in), scale (in), which starts at one. For ``host.before``."""

    def __init__(self, size: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.scale).to(x.dtype)

    def fold(self, site: Site) -> None:
        """Scale the columns of the site's weight."""
        with torch.no_grad():
            site.weight.copy_(site.weight * self.scale)


class ScaleOutput(nn.Module):
    """``forward(x, y) = scale * y (+ shift)``, elementwise; y, scale and shift (out). For ``host.after``.

    The scale starts at one, the shift, which is there with ``shift=True``, at zero.
    """

    def __init__(self, size: int, shift: bool = False):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.shift = nn.Parameter(torch.zeros(size)) if shift else None

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        scaled = y * self.scale
        return (scaled if self.shift is None else scaled + self.shift).to(y.dtype)

    def fold(self, site: Site) -> None:
        """Scale the rows of the site's weight and its bias; a shift needs a bias to be added to."""
        with torch.no_grad():
            site.weight.copy_(site.weight * self.scale[:, None])
            if site.bias is not None:
                site.bias.copy_(self(None, site.bias))
