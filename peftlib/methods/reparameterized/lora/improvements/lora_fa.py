r"""LoRA-FA: LoRA whose first factor stays frozen at its random start.

.. math:: y = W x + \frac{\alpha}{r} B A_0 x

Shapes: W (out, in), A_0 (r, in) frozen, B (out, r) trained and zero at first, so the start is the identity. The
gradient of B needs :math:`A_0 x` of r numbers a token; the input x, which LoRA keeps for A's gradient, need not be kept
for the backward pass. The change of a weight stays in the rows that A_0 spans. Merge: exact, as LoRA's. Trained: r out
a matrix; stored: A_0 too, because random numbers are not promised to be the same on another machine.

Source: Zhang et al. 2023, arXiv:2308.03303, first version. The gradient correction of its second version (2024) belongs
to the optimizer and is not here. A_0 starts as LoRA's A (Kaiming-uniform), which is chosen here: the paper says random.
There is no dropout on the update's input: its mask would have to be kept in the input's place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from peftlib.anatomy import Site
from peftlib.mechanisms.low_rank import LowRank
from peftlib.methods.base import MethodConfig, at_least
from peftlib.methods.bases import hf_peft
from peftlib.methods.bases.low_rank import LowRankUpdates


@dataclass(frozen=True)
class LoRAFAConfig(MethodConfig):
    """``rank`` r, ``alpha`` (the update is scaled by alpha / r), ``targets`` (site patterns), ``rank_stabilized``
    scaling by alpha / sqrt(r)."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | str = ("*attention.query", "*attention.value")
    rank_stabilized: bool = False

    def __post_init__(self):
        at_least("rank", self.rank, 1)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


class LoRAFA(LowRankUpdates):
    Config = LoRAFAConfig
    learning_rate = 1e-2
    hf_peft = hf_peft.LowRank(options={}, reads=False)
    """In files it is LoRA, which trains both factors."""

    def update(self, site: Site) -> LowRank:
        c = self.config
        return LowRank(site.in_features, site.out_features, c.rank, c.scale, train_A=False)
