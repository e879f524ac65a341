"""S3Delta's candidates that no other method has, and the gates that open and close candidates while it searches.

Letters: candidate i with n_i parameters, alpha_i its structure parameter, p_i the probability that its gate z_i is
open, B the budget; r the rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from torch import nn
from torch.nn.utils import parametrize

from peftlib.mechanisms.precision import cast

EDGE = 1e-7
"""How near a probability comes to 0 and 1."""


class Shift(nn.Module):
    """``forward(x, y) = y + b`` for y (..., n); b (n,), zero at the start: a bias, also where the map has none."""

    def __init__(self, n: int):
        super().__init__()
        self.b = nn.Parameter(torch.zeros(n))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + self.b.to(y.dtype)  # (..., n)


class Stretch(nn.Module):
    """Behind a norm: ``forward(x, y) = y + w * norm(x)`` for the norm's input x (..., n) and output y, with norm(x)
    before its own weight and bias; w (n,), zero at the start, is a change of that weight."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(norm.weight.shape))
        self.centres = isinstance(norm, nn.LayerNorm)
        self.eps = norm.eps if self.centres else norm.variance_epsilon

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, shape = cast(x, self.w), self.w.shape  # (..., n), (n,)
        if self.centres:
            wz = F.layer_norm(x, shape, self.w, None, self.eps)  # (..., n)
        else:
            wz = F.rms_norm(x, shape, self.w, self.eps)  # (..., n)
        return y + wz.to(y.dtype)  # (..., n)


class LowRankLinear(nn.Module):
    """A linear map of low rank: ``forward(x) = B A x + bias`` for x (..., in); A (r, in), B (out, r), bias (out,).
    A and B start Glorot-uniform with a gain of sqrt(2), the bias at zero."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.A = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, in_features), gain=math.sqrt(2)))
        self.B = nn.Parameter(nn.init.xavier_uniform_(torch.empty(out_features, rank), gain=math.sqrt(2)))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.A.T @ self.B.T + self.bias  # (..., in) -> (..., r) -> (..., out)


class Gates:
    """One gate a candidate, open with probability p_i = sigmoid((alpha_i - b) / beta), b such that sum_i p_i n_i = B.

    ``draw(u)`` sets the values z_i = sigmoid(logit u_i + logit p_i) in (0, 1), binary-concrete ones of temperature 1;
    :meth:`guard` puts one on a module. alpha starts at zero, and until the first draw all gates are open.

    Shapes: alpha, p, u and z (candidates,).
    """

    def __init__(self, sizes: Sequence[int], budget: float, beta: float, device: torch.device):
        self.sizes = np.asarray(sizes, dtype=np.float64)
        self.budget, self.beta = budget, beta
        self.alpha = nn.Parameter(torch.zeros(len(sizes), device=device))
        self.values = torch.ones(len(sizes), device=device)

    def shift(self) -> float:
        """b, by root finding: the expected size falls as b rises."""
        alpha = self.alpha.detach().double().cpu().numpy()

        def excess(b: float) -> float:
            # 1 / (1 + exp(-x)) without overflow
            return float((0.5 * (1 + np.tanh((alpha - b) / self.beta / 2)) * self.sizes).sum() - self.budget)

        reach = 40 * self.beta
        return brentq(excess, alpha.min() - reach, alpha.max() + reach, xtol=1e-12, rtol=1e-14)

    def probabilities(self) -> torch.Tensor:
        """p. No gradient goes through b; what one gate gains in a gradient the others lose."""
        p = torch.sigmoid((self.alpha - self.shift()) / self.beta).clamp(EDGE, 1 - EDGE)  # (candidates,)
        return p / p.sum() * p.sum().detach()  # (candidates,)

    def draw(self, u: torch.Tensor) -> None:
        p = self.probabilities()
        self.values = torch.sigmoid(torch.logit(u, EDGE) + torch.logit(p, EDGE))  # (candidates,)

    def guard(self, index: int, module: nn.Module, parameters: Iterable[str]) -> None:
        """Scale the change that a module adds by gate ``index``. It scales the ``parameters`` in which, together, the
        change is linear, because they are smaller than the change, which is as large as the module's output."""
        for path in parameters:
            owner, _, name = path.rpartition(".")
            parametrize.register_parametrization(module.get_submodule(owner), name, _Gate(self, index))


class _Gate(nn.Module):
    """``forward(w) = z w`` for the value z of one gate."""

    def __init__(self, gates: Gates, index: int):
        super().__init__()
        self.gates, self.index = gates, index

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return self.gates.values[self.index] * w  # w's shape
