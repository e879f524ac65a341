"""A random subspace of all parameters: a few trained numbers, projected to the size of each tensor by a Fastfood
transform in time N log N and memory N, where a dense projection has N times as many numbers as are trained."""

from __future__ import annotations

import math

import scipy.linalg
import torch
from torch import nn

from peftlib.mechanisms.precision import without_autocast

_BLOCK = 6
"""Bits of an index that are transformed at once, as a product with a Hadamard matrix of 2^6 rows: few passes over the
memory, and products that a CPU or GPU is fast at."""
_HADAMARD = torch.from_numpy(scipy.linalg.hadamard(1 << _BLOCK, dtype="int8"))
"""Its first 2^k rows and columns are the matrix for k bits."""


class _Transform(torch.autograd.Function):
    @staticmethod
    def forward(vector: torch.Tensor) -> torch.Tensor:
        with without_autocast(vector):
            return _transform(vector)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return walsh_hadamard(gradient)  # the matrix is symmetric


def _transform(vector: torch.Tensor) -> torch.Tensor:
    size, left, right = len(vector), len(vector), 1
    while left > 1:
        bits = min(_BLOCK, left.bit_length() - 1)
        left >>= bits
        matrix = _HADAMARD[: 1 << bits, : 1 << bits].to(vector)
        pieces = vector.reshape(left, 1 << bits, right)
        vector = pieces.squeeze(-1) @ matrix if right == 1 else matrix @ pieces
        right <<= bits
    return vector.reshape(size)


def walsh_hadamard(vector: torch.Tensor) -> torch.Tensor:
    """H vector for a vector whose length is a power of two, with H's entries 1 and -1 in their natural order."""
    return _Transform.apply(vector)


class Point(nn.Module):
    """The trained point z (d,), at zero, and one scale a group, at one."""

    def __init__(self, dimension: int, groups: int):
        super().__init__()
        self.z = nn.Parameter(torch.zeros(dimension))
        self.scales = nn.Parameter(torch.ones(groups))


class Projected(nn.Module):
    """A parametrization: the frozen tensor plus ``scales[group] * P z``, with
    ``P z = H G Pi H B z / sqrt(n sum G^2)`` for a tensor of n entries, padded to N, the next power of two.

    B are random signs, Pi is a permutation, G normal numbers and H the Walsh-Hadamard matrix. z is padded with zeros to
    N, or cut off there. Only z's own K entries, with K the next power of two, need the first transform: behind the
    padding H B z is the same K numbers again and again, and Pi picks among them. Kept are 8 bytes for each of the N
    entries and one for each of z's.
    """

    def __init__(self, tensor: torch.Tensor, point: Point, group: int, seed: int):
        super().__init__()
        self.point, self.group = [point], group  # in a list: the point is a child of the model, once
        self.size, self.shape = tensor.numel(), tensor.shape
        padded = 1 << (self.size - 1).bit_length()
        self.used = min(len(point.z), padded)
        if tensor.is_meta:
            signs, order, normal = (torch.empty(n, device="meta") for n in (self.used, padded, padded))
        else:
            signs, order, normal = draw(self.used, padded, seed)
        period = 1 << (self.used - 1).bit_length()
        scale = 1 / math.sqrt(self.size * float(normal.double().square().sum())) if not tensor.is_meta else 1.0
        self.register_buffer("signs", signs.to(torch.int8), persistent=False)
        self.register_buffer("order", (order % period).to(torch.int32), persistent=False)
        self.register_buffer("normal", normal * scale, persistent=False)
        self.period = period

    def projection(self) -> torch.Tensor:
        """``P z``, of the tensor's shape."""
        z = self.point[0].z[: self.used] * self.signs
        short = walsh_hadamard(nn.functional.pad(z, (0, self.period - self.used)))
        return walsh_hadamard(short.index_select(0, self.order) * self.normal)[: self.size].view(self.shape)

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        change = self.point[0].scales[self.group] * self.projection()
        return (tensor.to(change.dtype) + change).to(tensor.dtype)


def draw(used: int, padded: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """B's first entries (used,), Pi (padded,) as positions, and G's diagonal (padded,), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    signs = 2 * torch.randint(0, 2, (used,), generator=generator, device="cpu") - 1
    order = torch.randperm(padded, generator=generator, device="cpu")
    return signs, order, torch.randn(padded, generator=generator, device="cpu")
