"""Hard-concrete gates: random numbers in [0, 1] that are exactly 0 or 1 with positive probability, and differentiable.

A gate with parameter alpha is ``z = min(1, max(0, s (high - low) + low))`` with
``s = sigmoid(log(u / (1 - u)) + alpha)``, u uniform on (0, 1) and ``low < 0 < 1 < high``.
"""

from __future__ import annotations

import math

import torch


def noise_like(alpha: torch.Tensor) -> torch.Tensor:
    """What a gate draws: log(u / (1 - u)), of the shape of alpha; u keeps 1e-4 away from 0 and 1."""
    return torch.rand_like(alpha).clamp_(1e-4, 1 - 1e-4).logit_()


def gate(alpha: torch.Tensor, noise: torch.Tensor | float, low: float, high: float) -> torch.Tensor:
    """The gate's value for one draw, or, with noise 0, without chance."""
    return (torch.sigmoid(alpha + noise) * (high - low) + low).clamp(0, 1)


def open_probability(alpha: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """The probability that the gate is not zero."""
    return torch.sigmoid(alpha - math.log(-low / high))


def expected_open(alpha: torch.Tensor, group: torch.Tensor | None, low: float, high: float) -> torch.Tensor:
    """How many of a tensor's gates are expected not to be zero; with ``group``, the parameter of one more gate by which
    all of them are multiplied."""
    expected = open_probability(alpha, low, high).sum()
    return expected if group is None else expected * open_probability(group, low, high)
