r"""S-BitFit: BitFit pruned vector by vector; a bias trains whole or not at all.

.. math::
    b_j = b_{0,j} + z_j\, \delta_j, \qquad z_j \in \{0, 1\}, \qquad
    s_j = \Bigl|\sum_i \delta_{j,i}\, \frac{\partial \mathcal L}{\partial \delta_{j,i}}\Bigr|

Shapes: b_j and delta_j (out) or (d), BitFit's bias vectors of linear maps and norms; z_j and s_j are numbers. The
biases of a fused projection (GPT-2's queries, keys and values) are vectors of their own. s_j is the first-order
estimate of how the loss changes when the whole vector j is set back to b_0. A search trains all biases with the head
for a while and prunes the change to the vectors with the largest sum of s among those that have exactly k entries
together. Then everything goes back to the pretrained values, and the vectors that were found train. Start: identity.
Stored: k values with their indices. Merge: exact, they are the backbone's own entries. Trained without the head: k,
which is ``int(density * biases)`` or, where no vectors have that size together, the next smaller number that some have.

The search is :meth:`Adapted.calibrate`, with an optimizer of its own, so that afterwards k values train and nothing
else: see :mod:`peftlib.methods.bases.entries`.

Source: Lawton et al. 2023, arXiv:2305.16597, of which no code is public. Chosen here: everything that ``u_bitfit``
chooses, and the exact budget: taking vectors by their score alone would miss it, because they differ in size.
Backbones without biases (LLaMA, Mistral, T5) cannot host it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

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
        self.vectors: list[tuple[int, int, int]] = []  # which bias, and from where to where in it
        for index, bias in enumerate(biases.values()):
            size = bias.numel() // parts.get(id(bias), 1)
            self.vectors += [(index, start, start + size) for start in range(0, bias.numel(), size)]
        return biases

    @property
    def k(self) -> int:
        sizes = [stop - start for _, start, stop in self.vectors]
        return reachable(sizes, int(self.config.density * self.entries))

    def calibrate(self, batches: Iterable[dict[str, torch.Tensor]], checkpoint: Path | None = None) -> None:
        self.search(batches, self.best_vectors, "vectors")

    def best_vectors(self, scores: list[torch.Tensor], masks: list[torch.Tensor], budget: int) -> list[torch.Tensor]:
        """z: the masks of the vectors with the largest sum of s that have ``budget`` entries together."""
        s = [float(scores[index][start:stop].double().sum().abs()) for index, start, stop in self.vectors]
        sizes = [stop - start for _, start, stop in self.vectors]
        z = [torch.zeros_like(mask) for mask in masks]  # of the biases' shapes
        for index, start, stop in (self.vectors[j] for j in best_groups(s, sizes, budget)):
            z[index][start:stop] = True
        return z


def best_groups(scores: Sequence[float], sizes: Sequence[int], budget: int) -> list[int]:
    """The groups with the largest sum of scores among those whose sizes add up to ``budget`` exactly.

    By dynamic programming over sizes in units of their greatest common divisor. Among equal sums the first groups win.
    Raises ValueError where no groups have that size together; :func:`reachable` says which sizes some have.
    """
    unit = math.gcd(budget, *sizes)
    sizes, room = [size // unit for size in sizes], budget // unit
    best = torch.full((room + 1,), -torch.inf, dtype=torch.float64)
    best[0] = 0
    taken = torch.zeros(len(sizes), room + 1, dtype=torch.bool)
    # From the last group to the first, so that reading the choice back starts at the first one.
    for i in reversed(range(len(sizes))):
        if sizes[i] <= room:
            with_it = torch.full_like(best, -torch.inf)
            with_it[sizes[i] :] = best[: room + 1 - sizes[i]] + scores[i]
            taken[i] = (with_it >= best) & with_it.isfinite()
            best = torch.where(taken[i], with_it, best)
    if not best[room].isfinite():
        raise ValueError(f"no groups of these sizes add up to {budget}")
    chosen = []
    for i in range(len(sizes)):
        if taken[i, room]:
            chosen.append(i)
            room -= sizes[i]
    return chosen


def reachable(sizes: Iterable[int], most: int) -> int:
    """The largest number up to ``most`` that some of the sizes add up to."""
    sums = 1
    for size in sizes:
        sums |= sums << size
    return (sums & ((1 << (most + 1)) - 1)).bit_length() - 1
