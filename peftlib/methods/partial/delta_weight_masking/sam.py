r"""SAM: only those entries train that lower a second-order approximation of the loss most.

.. math::
    M = \operatorname{top}\Bigl(\bigl(\textstyle\sum_t \nabla_\theta \mathcal L_t(\theta_0)\bigr)^2\Bigr), \qquad
    \theta = \theta_0 + M \odot \delta

Shapes: theta, M and delta have the shapes of all the backbone's tensors below the head (embeddings, norms and biases
included). To second order, with a curvature that is the same everywhere, changing entry i alone lowers the loss in
proportion to its squared gradient. The gradients of the batches t at the pretrained point are therefore added with
their signs before they are squared. The share ``density`` of every tensor is chosen or, with ``scope="all"``, of all
tensors together. The chosen entries train as sparse values, so the start is the identity, optimizer states have k
entries, and nothing moves the rest. Stored: k values with their indices. Merge: exact, the values are the weights' own.
Trained without the head: ``k = int(density * parameters below the head)``, in both scopes.

Source: Fu et al. 2023, arXiv:2211.15583, and its code (0.5 % within each tensor, 600 batches, the head dense). As in
the code, gradients are added in training mode (``dropout=False``: without), each batch's clipped as a whole, with the
head's, to norm 1 (``clip``), and the training clips the whole gradient before it is masked, where it clips: masked
entries count in the norm. Departures: the code gives each tensor the floor of its share, here the shares are rounded so
that they add up to k exactly; it masks gradients, so its weight decay moves masked entries and its optimizer states are
dense; its count of 600 ends at 599. Its other scores (absolute values or squares added over batches, diagonals of the
Hessian) are not offered; those by squares are ``fish_mask`` and ``child_tuning_d``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from peftlib.mechanisms import importance, sparse
from peftlib.methods.base import MethodConfig, at_least, between, one_of
from peftlib.methods.bases.entries import MaskedGradients


@dataclass(frozen=True)
class SAMConfig(MethodConfig):
    """``density`` of the entries that train; ``scope``: "tensor" takes that share of each tensor, "all" the largest of
    all together; ``batches`` to accumulate gradients over, at most, with the backbone's ``dropout`` on or off and each
    batch's whole gradient cut to the norm ``clip`` (None: as it is)."""

    density: float = 0.005
    scope: str = "tensor"
    batches: int = 600
    clip: float | None = 1.0
    dropout: bool = True

    def __post_init__(self):
        between("density", self.density, 0, 1)
        at_least("batches", self.batches, 1)
        if self.clip is not None:
            between("clip", self.clip, 0, float("inf"))
        one_of("scope", self.scope, ("tensor", "all"))


class SAM(MaskedGradients):
    Config = SAMConfig
    learning_rate = 2e-3

    def calibrate(self, batches: Iterable[dict[str, torch.Tensor]], checkpoint: Path | None = None) -> None:
        c, theta_0, model = self.config, self.candidates.values(), self.host.model
        head = [p for n, p in self.host.anatomy.head.items() if n not in self.candidates]
        clipping = {"max_total_norm": c.clip, "beside": head if c.clip else ()}
        with importance.in_training_mode(model, self.seed) if c.dropout else nullcontext():
            means = importance.per_batch(model, theta_0, batches, c.batches, "signed", **clipping)
        # The absolute value of the mean ranks the entries as the square of the sum does.
        scores = [mean.abs_() for mean in means]  # of the tensors' shapes
        if c.scope == "all":
            self.choose(scores)
        else:
            counts = shares([s.numel() for s in scores], self.k)
            self.train(sparse.top_entries([s], k)[0] for s, k in zip(scores, counts))


def shares(sizes: Sequence[int], k: int) -> list[int]:
    """Divide k among tensors in proportion to their sizes, in whole numbers that add up to k.

    Each tensor gets the floor of its share. Those with the largest remainders get one more; among equal remainders the
    first ones do.
    """
    total = sum(sizes)
    counts = [size * k // total for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: -(sizes[i] * k % total))
    for i in order[: k - sum(counts)]:
        counts[i] += 1
    return counts
