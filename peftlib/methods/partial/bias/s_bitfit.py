r"""S-BitFit: BitFit pruned vector by vector; a bias trains whole or not at all.

.. math::
    b_j = b_{0,j} + z_j\, \delta_j, \qquad z_j \in \{0, 1\}, \qquad
    s_j = \Bigl|\sum_i \delta_{j,i}\, \frac{\partial \mathcal L}{\partial \delta_{j,i}}\Bigr|

Shapes: one z and one s for each of BitFit's bias vectors b_j, of linear maps and norms; the biases of a fused
projection (GPT-2's queries, keys and values) are vectors of their own. s_j is the first-order estimate of how the loss
changes when the whole vector j is set back to b_0. A search trains all biases with the head for a while and prunes the
change to the vectors with the largest sum of s among those that have exactly k entries together; then everything goes
back to the pretrained values, and the vectors that were found train. Start: identity. Stored: k values with their
indices. Merge: exact, they are the backbone's own entries. Trained without the head: k, which is
``int(density * biases)`` or, where no vectors have that size together, the next smaller number that some have.

The search is :meth:`Adapted.calibrate`, with an optimizer of its own, so that afterwards k values train and nothing
else: see :mod:`peftlib.methods.bases.entries`.

Source: Lawton et al. 2023, arXiv:2305.16597, of which no code is public. Chosen here: everything that ``u_bitfit``
chooses, and the exact budget: taking vectors by their score alone would miss it, because they differ in size.
Backbones without biases (LLaMA, Mistral, T5) cannot host it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from peftlib.mechanisms import pruning
from peftlib.mechanisms.host import Host
from peftlib.methods.bases.biases import SearchConfig, SearchedBiases


@dataclass(frozen=True)
class SBitFitConfig(SearchConfig):
    """``density`` of the biases' entries that is kept, in whole vectors; the search takes ``epochs`` over the
    calibration batches, or ``steps``, at ``search_rate``, and scores on at most ``batches``."""


class SBitFit(SearchedBiases):
    Config = SBitFitConfig
    learning_rate = 1e-2

    def choices(self, host: Host) -> dict[str, nn.Parameter]:
        biases = super().choices(host)
        parts = {id(site.module.bias): site.part[1] for site in host.anatomy.sites() if site.part}
        self.vectors = []
        for index, bias in enumerate(biases.values()):
            size = bias.numel() // parts.get(id(bias), 1)
            self.vectors += [(index, start, start + size) for start in range(0, bias.numel(), size)]
        return biases

    @property
    def k(self) -> int:
        sizes = [stop - start for _, start, stop in self.vectors]
        return pruning.reachable(sizes, int(self.config.density * self.entries))

    def calibrate(self, batches: Iterable[dict[str, torch.Tensor]], checkpoint: Path | None = None) -> None:
        self.search(batches, self._choose, "vectors")

    def _choose(self, scores: list[torch.Tensor], masks: list[torch.Tensor], budget: int) -> list[torch.Tensor]:
        sums = [float(scores[index][start:stop].double().sum().abs()) for index, start, stop in self.vectors]
        sizes = [stop - start for _, start, stop in self.vectors]
        chosen = [torch.zeros_like(mask) for mask in masks]
        for index, start, stop in (self.vectors[i] for i in pruning.best_groups(sums, sizes, budget)):
            chosen[index][start:stop] = True
        return chosen
