"""A Kronecker product beside a map, applied without forming it."""

from __future__ import annotations

import math

import torch
from torch import nn

from peftlib.errors import TargetError
from peftlib.mechanisms.precision import cast


def check_factor(factor: int, in_features: int, out_features: int, where: object) -> None:
    """Raise TargetError unless the factor divides both sizes."""
    if in_features % factor or out_features % factor:
        both = math.gcd(in_features, out_features)
        fits = ", ".join(str(n) for n in range(1, both + 1) if both % n == 0)
        raise TargetError(
            f"factor={factor} does not divide {where} ({out_features} x {in_features}); choose one of {fits}, or other "
            "targets"
        )


class Kronecker(nn.Module):
    """``forward(x, y) = y + scale * (A kron B) x``, with ``residual`` + shortcut * x.

    Shapes: x (..., in), y (..., out), A (factor, factor), B (out / factor, in / factor). A row of x, seen as a matrix X
    (factor, in / factor), becomes A X B^T, which is the product's row: two thin multiplications, and no (out, in)
    matrix. A starts Kaiming-uniform, B at zero and the scalar ``shortcut`` at ``residual`` (None: there is none).
    """

    def __init__(self, in_features: int, out_features: int, factor: int, scale: float, residual: float | None = None):
        super().__init__()
        self.A = nn.Parameter(torch.empty(factor, factor))
        self.B = nn.Parameter(torch.zeros(out_features // factor, in_features // factor))
        self.shortcut = None if residual is None else nn.Parameter(torch.full((), float(residual)))
        self.scale = scale
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = cast(x, self.A)
        rows = x.unflatten(-1, (len(self.A), -1))
        # The narrower side of B first: fewer multiplications, and a smaller result kept for the backward pass.
        if len(self.B) <= self.B.shape[1]:
            product = self.A @ (rows @ self.B.T)
        else:
            product = (self.A @ rows) @ self.B.T
        change = self.scale * product.flatten(-2)
        if self.shortcut is not None:
            change = change + self.shortcut * x
        return y + change.to(y.dtype)

    def delta(self) -> torch.Tensor:
        """The (out, in) update ``scale * A kron B``, formed in float32 or wider; the shortcut is not in it."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        return self.scale * torch.kron(self.A.detach().to(dtype), self.B.detach().to(dtype))
