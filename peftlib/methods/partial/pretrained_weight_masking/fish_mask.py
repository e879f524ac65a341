r"""FISH mask: only the entries with the largest empirical Fisher information train.

.. math::
    \hat F_i = \sum_{n=1}^{N} \bigl(\nabla_{\theta_i} \log p_\theta(y_n \mid x_n)\bigr)^2, \qquad
    M = \operatorname{top}_k(\hat F), \qquad \theta = \theta_0 \text{ outside } M

Shapes: theta, F and M have the shapes of all the backbone's tensors below the head (embeddings, norms and biases
included). F is summed over the gradients of N single examples, in evaluation mode; the k largest entries over all
tensors together are taken, ties by position. They train as sparse values, so the start is bit-identical, optimizer
states have k entries, and nothing moves the rest. Stored: k values with their indices. Merge: exact, the values are the
weights' own entries. Trained without the head: ``k = int(density * parameters) - head`` (the head trains fully and is
charged to the budget), to the entry.

Source: Sung et al. 2021, arXiv:2111.09839, and its code. Taxonomy: partial/pretrained_weight_masking. As in the code
the N rows are the first of a shuffled data set, where :meth:`Adapted.calibrate` is given one (``fit`` does so), and
their gradients are squared (its ``label-square``; the default of its argument, ``label-absolute``, is ``absolute``).
Departures: the code masks gradients, so its weight decay moves masked entries and its optimizer states are dense.
``charge_head=False`` spends the whole budget on the backbone, for heads that are larger than it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from peftlib.errors import TargetError
from peftlib.mechanisms import importance
from peftlib.mechanisms.host import Host
from peftlib.methods.base import MethodConfig, at_least, between, one_of
from peftlib.methods.bases.entries import ChosenEntries, free


@dataclass(frozen=True)
class FishMaskConfig(MethodConfig):
    """``density`` of all parameters that trains, head included; ``samples`` N of the training data; ``fisher``:
    "empirical" takes the true labels, "expected" all classes weighted by the model; ``absolute`` gradients instead of
    squared ones; ``charge_head``: whether a trained task head counts against the density."""

    density: float = 0.005
    samples: int = 1024
    fisher: importance.Kind = "empirical"
    absolute: bool = False
    charge_head: bool = True

    def __post_init__(self):
        between("density", self.density, 0, 1)
        at_least("samples", self.samples, 1)
        one_of("fisher", self.fisher, ("empirical", "expected"))


class FishMask(ChosenEntries):
    Config = FishMaskConfig
    learning_rate = 5e-4

    def attach(self, host: Host) -> None:
        self.total = sum(p.numel() for p in host.model.parameters())
        self.candidates = self.choices(host)
        host.check_writable(self.candidates.values())

    def choices(self, host: Host) -> dict[str, nn.Parameter]:
        head = host.anatomy.head
        return {n: p for n, p in free(dict(host.model.named_parameters())).items() if n not in head}

    @property
    def k(self) -> int:
        head = sum(p.numel() for p in self.trained_head().values())
        charge = head if self.config.charge_head else 0
        budget, most = int(self.config.density * self.total), self.entries
        if not 1 <= budget - charge <= most:
            raise TargetError(
                f"density={self.config.density} of {self.total:,} parameters is {budget:,}, of which the task head "
                f"takes {charge:,}: that leaves no number of entries from 1 to {most:,}. Choose another density"
                + (", or charge_head=False" if charge else "")
            )
        return budget - charge

    def calibrate(self, batches: Iterable[dict[str, torch.Tensor]], checkpoint: Path | None = None) -> None:
        c, model, theta = self.config, self.host.model, self.candidates.values()
        F = importance.per_example(model, theta, batches, c.samples, c.fisher, c.absolute)  # of the tensors' shapes
        self.choose(F)
