r"""U-MAM: a MAM adapter pruned entry by entry, to the entries whose removal would cost most (hybrid).

.. math:: \delta \leftarrow z \odot \delta, \qquad z = \operatorname{top}_k(s), \qquad
          s_i = \Bigl|\delta_i\, \frac{\partial \mathcal L}{\partial \delta_i}\Bigr|

Shapes: delta, s and z have an entry for each entry i of a MAM adapter: keys and values P_K, P_V (m, d), W_down (r, d),
W_up (d, r) and the adapters' biases; m positions, hidden size d, bottleneck r. s_i is the first-order estimate of how
the loss changes when entry i alone is set to zero. A search (:meth:`Adapted.calibrate`) trains all entries with the
task head, scores them and prunes those with the smallest scores, round by round, to k over all tensors together (ties
by position); then all values go back to their start and k of them train. Trained: k = int(density times entries)
exactly; stored: k values with their indices, or bits. Prefixes act from the first step on. No merge, as MAM.

Source: Lawton et al. 2023, arXiv:2305.16597, of which no code is public. Chosen here: the share that is kept, the
search's length and rate, two rounds in equal ratios, prefixes without an MLP, and training anew after the search.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from peftlib.mechanisms import importance, pruned, warmup
from peftlib.methods.base import Method, MethodConfig, at_least, between
from peftlib.methods.bases.pruned import PrunedCombination


@dataclass(frozen=True)
class UMAMConfig(MethodConfig):
    """``length`` m, ``bottleneck`` r and ``scale`` s of the MAM adapter; ``density`` of its entries that is kept; the
    search takes ``epochs`` over the calibration batches, or ``steps``, at ``search_rate``, in ``rounds``."""

    length: int = 30
    bottleneck: int = 512
    scale: float = 4.0
    density: float = 0.1
    epochs: float = 1.0
    steps: int | None = None
    search_rate: float = 1e-3
    rounds: int = 2

    def __post_init__(self):
        for name in ("length", "bottleneck", "rounds"):
            at_least(name, getattr(self, name), 1)
        for name, high in (("density", 1), ("epochs", math.inf), ("search_rate", math.inf)):
            between(name, getattr(self, name), 0, high)
        if self.steps is not None:
            at_least("steps", self.steps, 1)


class UMAM(PrunedCombination):
    Config = UMAMConfig
    learning_rate = 2e-3

    def part_configs(self) -> tuple[dict, ...]:
        c = self.config
        sizes = {"length": c.length, "bottleneck": c.bottleneck, "scale": c.scale}
        return ({"method": "mam_adapter", "reparametrize": False, **sizes},)

    def calibrate(self, batches: Iterable[dict[str, torch.Tensor]], checkpoint: Path | None = None) -> None:
        c, parameters = self.config, list(self.candidates.values())
        batches = batches if warmup.sized(batches) else list(batches)
        beside = [p for p in self.host.anatomy.head.values() if p.requires_grad]
        starts = [p.detach().clone() for p in (*parameters, *beside)]
        masks = [torch.ones_like(p) for p in parameters]

        @torch.no_grad()
        def prune() -> None:
            for parameter, mask in zip(parameters, masks):
                parameter.mul_(mask)

        for round_ in range(1, c.rounds + 1):
            warmup.train(
                self.host.model,
                [{"params": [*parameters, *beside], "lr": c.search_rate}],
                batches,
                epochs=c.epochs / c.rounds,
                steps=None if c.steps is None else math.ceil(c.steps / c.rounds),
                seed=self.seed + round_,
                what=f"u_mam: searching entries, round {round_} of {c.rounds}",
                after_step=prune,
            )
            scores = importance.first_order(self.host.model, parameters, batches)
            left = self.k if round_ == c.rounds else round(self.entries * c.density ** (round_ / c.rounds))
            # A pruned entry stays pruned, also where a score is zero.
            chosen = pruned.largest([torch.where(m > 0, s.abs(), -1.0) for s, m in zip(scores, masks)], left)
            for mask, indices in zip(masks, chosen):
                mask.zero_().view(-1)[indices] = 1
            prune()
        with torch.no_grad():
            for parameter, start in zip((*parameters, *beside), starts):
                parameter.copy_(start)
        self.keep(chosen)

    def check_mergeable(self) -> None:
        Method.check_mergeable(self)
