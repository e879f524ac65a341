"""A trained vector that scales what comes out of a linear map, and how it folds into the map."""

from __future__ import annotations

import torch
from torch import nn

from peftlib.anatomy import Site


class ScaleOutput(nn.Module):
    """``forward(x, y) = scale * y``, elementwise; y (b, t, out), ``scale`` (out), which starts at one. For
    ``host.after``."""

    def __init__(self, size: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
        return (y * self.scale).to(y.dtype)  # (b, t, out)

    def fold(self, site: Site) -> None:
        """Scale the rows of the site's weight (out, in), and do to its bias (out) what is done to outputs."""
        with torch.no_grad():
            site.weight.copy_(site.weight * self.scale[:, None])
            if site.bias is not None:
                site.bias.copy_(self(None, site.bias))
