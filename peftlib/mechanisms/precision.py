"""One policy for dtypes: trained parameters are float32 by default, also on a half-precision backbone."""

from __future__ import annotations

import contextlib

import torch


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is on where x is. The meta device, on which memory is planned, has none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Inside ``with``, products on x's device have their inputs' dtype."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def cast(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x`` in the dtype in which ``weight`` computes; autocast decides by itself where it is on."""
    if x.dtype == weight.dtype or autocasts(x):
        return x
    return x.to(weight.dtype)
