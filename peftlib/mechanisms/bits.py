"""Masks as bits: eight entries a byte, so that a saved mask costs what it says, one bit a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from peftlib.errors import LoadError

_WEIGHTS = (1, 2, 4, 8, 16, 32, 64, 128)


def packed_size(count: int) -> int:
    """Bytes that hold ``count`` bits."""
    return -(-count // 8)


def pack(mask: torch.Tensor) -> torch.Tensor:
    """A boolean tensor of any shape as uint8 (ceil(numel / 8),): row-major order, the first entry in the lowest bit,
    the last byte filled up with zeros."""
    flat = mask.flatten().to(torch.uint8)
    flat = torch.cat([flat, flat.new_zeros(8 * packed_size(flat.numel()) - flat.numel())])
    weights = torch.tensor(_WEIGHTS, dtype=torch.uint8, device=mask.device)
    return (flat.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The boolean tensor of this shape that :func:`pack` made.

    Raises LoadError when ``packed`` is not as long as the shape needs, or has bits set behind its end.
    """
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (packed_size(count),):
        raise LoadError(
            f"a mask of shape {tuple(shape)} is stored as {packed_size(count)} uint8 bytes; "
            f"this one is {packed.dtype} of shape {tuple(packed.shape)}"
        )
    weights = torch.tensor(_WEIGHTS, dtype=torch.uint8, device=packed.device)
    flat = ((packed[:, None] & weights) != 0).flatten()
    if flat[count:].any():
        raise LoadError(f"a mask of shape {tuple(shape)} has bits set behind its end; the file is damaged")
    return flat[:count].reshape(tuple(shape))
