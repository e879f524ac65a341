r"""Child-Tuning D: a child network, the layers' entries that matter most to the task, is chosen once and trained.

.. math::
    F_i = \frac{1}{|\mathcal B|} \sum_{\beta \in \mathcal B}
    \bigl(\nabla_{\theta_i} \mathcal L_\beta\bigr)^2, \qquad M = \operatorname{top}_{pn}(F), \qquad
    \theta \leftarrow \theta - \eta\, M \odot \nabla_\theta \mathcal L

Shapes: F and M have the shapes of all tensors of the transformer layers, n entries together. F is the mean over the
training batches beta. The share p of entries with the largest F, over all layers together, trains as sparse values, so
nothing moves the rest. Everything outside the layers (embeddings, pooler, final norms, head) trains fully, as in the
reference code; ``train_rest=False`` freezes it, the head excepted. Merge: exact, the values are the weights' own
entries. Trained without the head: ``parameters outside the layers + int(p n)``.

Source: Xu et al. 2021, arXiv:2109.05687, and its code. Taxonomy: partial/delta_weight_masking. As in the code, F is
measured in training mode (``dropout=False``: without), each tensor's gradient is clipped to norm 1 before it is
squared, which the paper's formula does not say (``clip=None`` leaves it), and the training clips the whole gradient
before it is masked, where it clips: masked entries count in the norm, but for those of tensors without a chosen one.
Departures: the code masks gradients, so its weight decay moves masked entries; it takes every entry at or above the
quantile, here exactly ``int(p n)`` are taken, ties by position.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from peftlib.mechanisms import importance
from peftlib.mechanisms.host import Host
from peftlib.methods.base import MethodConfig, at_least, between
from peftlib.methods.bases.entries import MaskedGradients


@dataclass(frozen=True)
class ChildTuningDConfig(MethodConfig):
    """``density`` p of the layers' entries that trains; ``train_rest``: train everything outside the layers as well;
    ``batches`` to measure F on, None for all that are given; ``clip``: norm to which each tensor's gradient is cut;
    ``dropout``: whether the backbone's is on meanwhile."""

    density: float = 0.3
    train_rest: bool = True
    batches: int | None = None
    clip: float | None = 1.0
    dropout: bool = True

    def __post_init__(self):
        between("density", self.density, 0, 1)
        if self.batches is not None:
            at_least("batches", self.batches, 1)
        if self.clip is not None:
            between("clip", self.clip, 0, float("inf"))


class ChildTuningD(MaskedGradients):
    Config = ChildTuningDConfig
    learning_rate = 1e-4

    def attach(self, host: Host) -> None:
        super().attach(host)
        if self.config.train_rest:
            head, inside = host.anatomy.head, {id(p) for p in self.candidates.values()}
            host.train(
                p
                for n, p in host.model.named_parameters()
                if not p.requires_grad and id(p) not in inside and n not in head
            )

    def choices(self, host: Host) -> dict[str, nn.Parameter]:
        inside = {id(p) for layer in host.anatomy.layers for p in layer.module.parameters()}
        return {n: p for n, p in host.model.named_parameters() if id(p) in inside and not p.requires_grad}

    def calibrate(self, batches: Iterable[dict[str, torch.Tensor]], checkpoint: Path | None = None) -> None:
        c, theta = self.config, self.candidates.values()
        model = self.host.model
        with importance.in_training_mode(model, self.seed) if c.dropout else nullcontext():
            F = importance.per_batch(model, theta, batches, c.batches, max_norm=c.clip)  # of the tensors' shapes
        self.choose(F)
