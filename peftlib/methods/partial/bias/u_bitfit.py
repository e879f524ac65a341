r"""U-BitFit: BitFit pruned entry by entry, to the biases whose change matters most.

.. math::
    b = b_0 + z \odot \delta, \qquad z = \operatorname{top}_k(s), \qquad
    s_i = \Bigl|\delta_i\, \frac{\partial \mathcal L}{\partial \delta_i}\Bigr|

Shapes: delta, s and z have those of BitFit's biases b, (out) or (d): every bias below the task head. s_i is the
first-order estimate of how the loss changes when entry i alone is set back to b_0: the change delta counts, not the
bias itself. A search trains all biases with the head for a while and prunes the change to the k entries with the
largest s over all biases together (ties by position). Then everything goes back to the pretrained values, and the k
entries train as sparse values. Start: identity. Stored: k values with their indices. Merge: exact, they are the
backbone's own entries. Trained without the head: ``k = int(density * biases)``.

The search is :meth:`Adapted.calibrate`, with an optimizer of its own, so that afterwards k values train and nothing
else: see :mod:`peftlib.methods.bases.entries`.

Source: Lawton et al. 2023, arXiv:2305.16597, of which no code is public. Chosen here: the share that is kept, the
length of the search and its learning rate, one round of pruning (``rounds`` for more), scores from a pass over the
training batches after each round, and that the entries that were found train anew from the pretrained values.
Backbones without biases (LLaMA, Mistral, T5) cannot host it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from peftlib.mechanisms.sparse import top_entries
from peftlib.methods.base import at_least
from peftlib.methods.bases.biases import SearchConfig, SearchedBiases


@dataclass(frozen=True)
class UBitFitConfig(SearchConfig):
    """``density`` of the biases' entries that is kept; the search takes ``epochs`` over the calibration batches, or
    ``steps``, at ``search_rate``, prunes in ``rounds`` and scores on at most ``batches`` (None: all)."""

    rounds: int = 1

    def __post_init__(self):
        super().__post_init__()
        at_least("rounds", self.rounds, 1)


class UBitFit(SearchedBiases):
    Config = UBitFitConfig
    learning_rate = 1e-2

    def calibrate(self, batches: Iterable[dict[str, torch.Tensor]], checkpoint: Path | None = None) -> None:
        self.search(batches, largest_entries, "entries", self.config.rounds)


def largest_entries(scores: list[torch.Tensor], masks: list[torch.Tensor], budget: int) -> list[torch.Tensor]:
    """z: the masks of the entries with the largest |score| over all tensors, among those in ``masks``."""
    # An entry in the masks comes before one that is out, also where its score is zero.
    s = [torch.where(mask, score.abs() + 1e-30, 0) for score, mask in zip(scores, masks)]  # of the biases' shapes
    z = [torch.zeros_like(mask) for mask in masks]  # of the biases' shapes
    for mask, indices in zip(z, top_entries(s, budget)):
        mask.view(-1)[indices] = True
    return z
