r"""Intrinsic SAID: all parameters of the backbone move inside one random subspace of a few hundred dimensions.

.. math:: \theta_\ell = \theta_{0,\ell} + \lambda_{g(\ell)} P_\ell z, \qquad
    P_\ell z = \frac{H G_\ell \Pi_\ell H B_\ell z}{\sqrt{n_\ell \sum G_\ell^2}}

Shapes: z (d' - groups,) shared by all tensors and zero at first, so the start is the identity; lambda (groups,), one at
first; theta_l a tensor of n entries, padded to N, the next power of two; H the Walsh-Hadamard matrix, G normal numbers,
Pi a permutation and B random signs, all frozen. This Fastfood projection costs N log N time and N memory at every use
of a weight, where a dense one costs N times as many numbers as are trained. For inference merge(), which is exact: the
projected z is added to the weights. Trained: ``dimension`` d' numbers with the scales among them; stored: these alone,
because ``projection_seed`` makes the projections again.

Source: Aghajanyan et al. 2021, arXiv:2012.13255, and its code (copies of it in Compacter and Ladder-Side-Tuning): one
scale a tensor there, one a layer in the paper's words; ``groups`` chooses, and everything outside the layers then is
one group. The gradient is the true one. The code's two transforms each divide it by sqrt(N) on the way back, so what
comes from a tensor is 1/N of the true one; since N differs by tensor, the sum points elsewhere (cosines of 0.5 to 0.7
on tiny models), rather to where small tensors want: ``gradient="code"``. The task head trains beside it, as with every
method here; there it is projected too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import scipy.linalg
import torch
from torch import nn

from peftlib.errors import TargetError, UnknownNameError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.precision import without_autocast
from peftlib.methods.base import Method, MethodConfig, at_least, one_of

GROUPS = ("tensor", "layer")


@dataclass(frozen=True)
class IntrinsicSAIDConfig(MethodConfig):
    """``dimension`` d', the scales included; ``groups`` that have a scale: every "tensor" or every "layer";
    ``gradient`` of z: the "true" one, or the "code"'s; ``projection_seed`` of the frozen projections."""

    dimension: int = 1000
    groups: Literal["tensor", "layer"] = "tensor"
    gradient: Literal["true", "code"] = "true"
    projection_seed: int = 0

    def __post_init__(self):
        at_least("dimension", self.dimension, 2)
        if self.groups not in GROUPS:
            raise UnknownNameError("groups", self.groups, GROUPS)
        one_of("gradient", self.gradient, ("true", "code"))


class Point(nn.Module):
    """The trained point z (d,), at zero, and lambda, one scale a group, at one."""

    def __init__(self, dimension: int, groups: int):
        super().__init__()
        self.z = nn.Parameter(torch.zeros(dimension))
        self.scales = nn.Parameter(torch.ones(groups))


class Projected(nn.Module):
    """A parametrization: the frozen tensor plus ``lambda[group] P z``, with ``P z = H G Pi H B z / sqrt(n sum G^2)``.

    z is padded with zeros to N, or cut off there. Only its first K entries, with K the next power of two, need the
    first transform: behind the padding H B z repeats the same K numbers, and Pi picks among them. Kept are 8 bytes for
    each of the N entries and one for each of z's: ``signs`` B (d,), ``order`` Pi (N,), and ``normal`` (N,), G divided
    by the root.
    """

    def __init__(self, tensor: torch.Tensor, point: Point, group: int, seed: int, gradient: str = "true"):
        super().__init__()
        self.point, self.group = [point], group  # in a list: the point is a child of the model, once
        self.size, self.shape = tensor.numel(), tensor.shape
        padded = 1 << (self.size - 1).bit_length()
        self.used = min(len(point.z), padded)
        self.gradient = 1 / padded if gradient == "code" else 1.0
        if tensor.is_meta:
            signs, order, normal = (torch.empty(n, device="meta") for n in (self.used, padded, padded))
        else:
            signs, order, normal = draw(self.used, padded, seed)
        self.period = 1 << (self.used - 1).bit_length()
        scale = 1 / math.sqrt(self.size * float(normal.double().square().sum())) if not tensor.is_meta else 1.0
        self.register_buffer("signs", signs.to(torch.int8), persistent=False)
        self.register_buffer("order", (order % self.period).to(torch.int32), persistent=False)
        self.register_buffer("normal", normal * scale, persistent=False)

    def projection(self) -> torch.Tensor:
        """``P z``, of the tensor's shape."""
        z = self.point[0].z[: self.used]  # (d,)
        if self.gradient != 1:
            z = z.detach() + self.gradient * (z - z.detach())  # the same numbers, with a part of the gradient
        Bz = z * self.signs  # (d,)
        HBz = walsh_hadamard(nn.functional.pad(Bz, (0, self.period - self.used)))  # (d,) -> (K,)
        GPiHBz = HBz.index_select(0, self.order) * self.normal  # (K,) -> (N,)
        return walsh_hadamard(GPiHBz)[: self.size].view(self.shape)  # (N,) -> (n,) -> the tensor's shape

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        change = self.point[0].scales[self.group] * self.projection()
        return (tensor.to(change.dtype) + change).to(tensor.dtype)


class IntrinsicSAID(Method):
    Config = IntrinsicSAIDConfig
    learning_rate = 2e-3

    def attach(self, host: Host) -> None:
        c = self.config
        head = host.anatomy.head
        tensors = {n: p for n, p in host.model.named_parameters() if n not in head}
        groups = {name: self._group(host, name) for name in tensors}
        order = {group: index for index, group in enumerate(dict.fromkeys(groups.values()))}
        if c.dimension <= len(order):
            raise TargetError(
                f"dimension={c.dimension} leaves nothing beside the scales of {len(order)} groups; give more, or "
                'groups="layer"'
            )
        host.refuse_replicas()  # every tensor holds the point
        self.point = host.add(host.anatomy.base, "intrinsic", Point(c.dimension - len(order), len(order)))
        for index, (name, tensor) in enumerate(tensors.items()):
            seed = 1_000_003 * c.projection_seed + index
            child = Projected(tensor, self.point, order[groups[name]], seed, c.gradient)
            host.parametrize(tensor, child)

    def _group(self, host: Host, name: str) -> str:
        if self.config.groups == "tensor":
            return name
        return next((x.path for x in host.anatomy.layers if name.startswith(f"{x.path}.")), "outside the layers")


def draw(used: int, padded: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """B's first entries (used,), Pi (padded,) as positions, and G's diagonal (padded,), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    signs = 2 * torch.randint(0, 2, (used,), generator=generator, device="cpu") - 1
    order = torch.randperm(padded, generator=generator, device="cpu")
    return signs, order, torch.randn(padded, generator=generator, device="cpu")


def walsh_hadamard(vector: torch.Tensor) -> torch.Tensor:
    """H vector for a vector whose length N is a power of two, with H's entries 1 and -1 in their natural order."""
    return _Transform.apply(vector)


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


_BLOCK = 6
"""Bits of an index that are transformed at once, as a product with a Hadamard matrix of 2^6 rows: few passes over the
memory, and products that a CPU or GPU is fast at."""
_HADAMARD = torch.from_numpy(scipy.linalg.hadamard(1 << _BLOCK, dtype="int8"))
"""Its first 2^k rows and columns are the matrix for k bits."""


def _transform(vector: torch.Tensor) -> torch.Tensor:
    size, left, right = len(vector), len(vector), 1
    while left > 1:
        bits = min(_BLOCK, left.bit_length() - 1)
        left >>= bits
        H = _HADAMARD[: 1 << bits, : 1 << bits].to(vector)  # (2^bits, 2^bits)
        pieces = vector.reshape(left, 1 << bits, right)  # (N,) -> (left, 2^bits, right)
        vector = pieces.squeeze(-1) @ H if right == 1 else H @ pieces  # the same shape, transformed in the middle
        right <<= bits
    return vector.reshape(size)  # -> (N,)
