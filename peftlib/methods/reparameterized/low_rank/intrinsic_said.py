r"""Intrinsic SAID: all parameters of the backbone move inside one random subspace of a few hundred dimensions.

.. math:: \theta_\ell = \theta_{0,\ell} + \lambda_{g(\ell)} P_\ell z, \qquad
    P_\ell z = \frac{H G_\ell \Pi_\ell H B_\ell z}{\sqrt{n_\ell \sum G_\ell^2}}

Shapes: z (d' - groups,) shared by all tensors and zero at first, so the start is the identity; lambda (groups,), one at
first; theta_l a tensor of n entries, padded to the next power of two; H the Walsh-Hadamard matrix, G normal numbers,
Pi a permutation and B signs, all frozen. The projection costs n log n time and memory in proportion to n at every use
of a weight, so for inference merge(), which is exact: the point is added to the weights. Trained: ``dimension`` d'
numbers with the scales among them; stored: these alone, because ``projection_seed`` makes the projections again.

Source: Aghajanyan et al. 2021, arXiv:2012.13255, and its code (a copy of it in Ladder-Side-Tuning): one scale a tensor
there, one a layer in the paper's words; ``groups`` chooses, and everything outside the layers then is one group. The
gradient is the true one; the code's transform divides it by sqrt(N). The task head trains beside it, as with every
method here; there it is projected too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peftlib.errors import TargetError, UnknownNameError
from peftlib.mechanisms.fastfood import Point, Projected
from peftlib.mechanisms.host import Host
from peftlib.methods.base import Method, MethodConfig, at_least

GROUPS = ("tensor", "layer")


@dataclass(frozen=True)
class IntrinsicSAIDConfig(MethodConfig):
    """``dimension`` d', the scales included; ``groups`` that have a scale: every "tensor" or every "layer";
    ``projection_seed`` of the frozen projections."""

    dimension: int = 1000
    groups: Literal["tensor", "layer"] = "tensor"
    projection_seed: int = 0

    def __post_init__(self):
        at_least("dimension", self.dimension, 2)
        if self.groups not in GROUPS:
            raise UnknownNameError("groups", self.groups, GROUPS)


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
        self.point = host.add(host.anatomy.base, "intrinsic", Point(c.dimension - len(order), len(order)))
        for index, (name, tensor) in enumerate(tensors.items()):
            child = Projected(tensor, self.point, order[groups[name]], seed=1_000_003 * c.projection_seed + index)
            host.parametrize(tensor, child)

    def _group(self, host: Host, name: str) -> str:
        if self.config.groups == "tensor":
            return name
        return next((x.path for x in host.anatomy.layers if name.startswith(f"{x.path}.")), "outside the layers")
