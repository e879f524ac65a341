r"""Child-Tuning D: a child network, the layers' entries that matter most to the task, is chosen once and trained.

.. math::
    F_i = \frac{1}{|\mathcal B|} \sum_{\beta \in \mathcal B}
    \bigl(\nabla_{\theta_i} \mathcal L_\beta\bigr)^2, \qquad M = \operatorname{top}_{pn}(F), \qquad
    \theta \leftarrow \theta - \eta\, M \odot \nabla_\theta \mathcal L

F is the mean over the training batches; the largest share p of the n entries of all transformer layers together trains,
as sparse values, so nothing moves the rest. Everything outside the layers (embeddings, pooler, final norms, head)
trains fully, as in the reference code; ``train_rest=False`` freezes it, the head excepted. Merge: exact, the values are
the weights' own entries. Trained without the head: ``parameters outside the layers + int(p n)``.

Source: Xu et al. 2021, arXiv:2109.05687, and its code. Taxonomy: partial/delta_weight_masking. Departures: the code
masks gradients, so its weight decay moves masked entries; it measures F in training mode, here dropout is off; it takes
every entry at or above the quantile, here exactly ``int(p n)`` are taken, ties by position. As in the code each
tensor's gradient is clipped to norm 1 before it is squared, which the paper's formula does not say
(``clip=None`` leaves it).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from peftlib.errors import TargetError
from peftlib.mechanisms import importance, sparse
from peftlib.mechanisms.host import Host
from peftlib.methods.base import Method, MethodConfig, at_least, between


@dataclass(frozen=True)
class ChildTuningDConfig(MethodConfig):
    """``density`` p of the layers' entries that trains; ``train_rest``: train everything outside the layers as well;
    ``batches`` to measure F on, None for all that are given; ``clip``: norm to which each tensor's gradient is cut."""

    density: float = 0.3
    train_rest: bool = True
    batches: int | None = None
    clip: float | None = 1.0

    def __post_init__(self):
        between("density", self.density, 0, 1)
        if self.batches is not None:
            at_least("batches", self.batches, 1)
        if self.clip is not None:
            between("clip", self.clip, 0, float("inf"))


class ChildTuningD(Method):
    Config = ChildTuningDConfig
    learning_rate = 1e-4
    calibrates = True

    def attach(self, host: Host) -> None:
        inside = {id(p) for layer in host.anatomy.layers for p in layer.module.parameters()}
        frozen = {n: p for n, p in host.model.named_parameters() if not p.requires_grad}
        self.candidates = {n: p for n, p in frozen.items() if id(p) in inside}
        self.children: dict[str, sparse.SparseValues] = {}
        entries = sum(p.numel() for p in self.candidates.values())
        self.k = int(self.config.density * entries)
        if self.k < 1:
            raise TargetError(f"density={self.config.density} of the layers' {entries:,} entries is less than one")
        if self.config.train_rest:
            head = host.anatomy.head
            host.train(p for n, p in frozen.items() if id(p) not in inside and n not in head)

    def pending(self) -> tuple[int, int, int]:
        return sparse.pending(self.k, sum(p.numel() for p in self.candidates.values()))

    def calibrate(self, batches: Iterable[dict[str, torch.Tensor]]) -> None:
        scores = importance.per_batch(
            self.host.model, self.candidates.values(), batches, self.config.batches, self.config.clip
        )
        self.children = sparse.train_top_entries(self.host, self.candidates, scores, self.k)

    def state(self) -> dict[str, torch.Tensor]:
        return sparse.state(self.host, self.children)

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.children = sparse.load_state(self.host, self.candidates, state)
