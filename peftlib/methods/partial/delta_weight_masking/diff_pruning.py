r"""Diff pruning: a difference to the pretrained weights is learned with gates that close, then cut to its largest part.

.. math::
    \theta = \theta_0 + z \odot w, \qquad
    z = \min\bigl(1, \max(0,\, \sigma(\operatorname{logit} u + \alpha)(r - l) + l)\bigr), \qquad
    \mathcal L + \lambda \sum_i P(z_i \ne 0), \quad P(z_i \ne 0) = \sigma\bigl(\alpha_i - \log\tfrac{-l}{r}\bigr)

Shapes: w and alpha have an entry for each of the backbone's below the head; u is drawn anew at every step. In the
structured form (default) each tensor has one more gate, its own alpha, by which all its gates are multiplied; an entry
is then non-zero with the product of both probabilities. The first phase trains w (from 0), alpha and the head. Then the
difference with its gates at u = 1/2 is projected: the k entries with the largest absolute values over all tensors
together stay (ties by position), the others are zero. The second phase trains these k as sparse values, from where the
projection left them, so optimizer states have k entries and nothing moves the rest. Stored: k values with their
indices. Merge: exact, they are the weights' own. Trained without the head: ``k = int(density * parameters below it)``.

The first phase is :meth:`Adapted.calibrate`, a training of its own on the batches given (``fit``: the training data);
why, :mod:`peftlib.methods.bases.entries` says. It needs more memory than full fine-tuning: w and alpha with gradients
and two optimizer states each, beside the weights. The model that training starts from is the projected one, not the
backbone.

Source: Guo et al. 2021, arXiv:2012.07463, and its code (l = -1.5, r = 1.5, alpha from 5, lambda = 1.25e-7, alpha's
learning rate 0.1, three epochs, 0.5 %; head dense and unpenalised). Departures: the penalty of the structured form is
the expected number of non-zeros, as in the paper (the code adds both probabilities); the code projects the difference
with the gates of the last step, goes on from w without them, counts the head in the share and masks gradients, so its
weight decay moves zeros. ``first_rate`` of w and head is chosen here (the code's 1e-5 is for BERT-large).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call

from peftlib.mechanisms import hard_concrete, importance, warmup
from peftlib.methods.base import ConfigError, MethodConfig, at_least, between
from peftlib.methods.bases.entries import ChosenEntries


@dataclass(frozen=True)
class DiffPruningConfig(MethodConfig):
    """``density`` of the entries that differ in the end; ``structured``: one more gate a tensor; ``penalty`` lambda,
    the price of an expected non-zero; ``low`` l, ``high`` r and ``alpha`` (its start) of the gates; the first phase
    takes ``epochs`` over the calibration batches, or ``steps``, at ``first_rate`` and, for the gates, ``gate_rate``."""

    density: float = 0.005
    structured: bool = True
    penalty: float = 1.25e-7
    low: float = -1.5
    high: float = 1.5
    alpha: float = 5.0
    epochs: float = 3.0
    steps: int | None = None
    first_rate: float = 5e-5
    gate_rate: float = 0.1

    def __post_init__(self):
        between("density", self.density, 0, 1)
        at_least("penalty", self.penalty, 0)
        for name in ("epochs", "first_rate", "gate_rate"):
            between(name, getattr(self, name), 0, float("inf"))
        if self.steps is not None:
            at_least("steps", self.steps, 1)
        if not self.low < 0:
            raise ConfigError(f"low={self.low!r} must be below 0, or no gate could ever be closed")
        if not self.high > 1:
            raise ConfigError(f"high={self.high!r} must be above 1, or no gate could ever be fully open")


class DiffPruning(ChosenEntries):
    Config = DiffPruningConfig
    learning_rate = 2e-3

    def calibrate(self, batches: Iterable[dict[str, torch.Tensor]], checkpoint: Path | None = None) -> None:
        c = self.config
        w, alpha, group = {}, {}, {}
        for name, parameter in self.candidates.items():
            w[name] = nn.Parameter(torch.zeros_like(parameter, dtype=torch.float32))
            alpha[name] = nn.Parameter(torch.full_like(w[name], c.alpha))
            if c.structured:
                group[name] = nn.Parameter(torch.full((), c.alpha, device=parameter.device))

        def difference(name: str, chance: bool) -> torch.Tensor:
            gates = [alpha[name], *([group[name]] if c.structured else [])]
            total = w[name]
            for a in gates:
                total = total * hard_concrete.gate(a, hard_concrete.noise_like(a) if chance else 0.0, c.low, c.high)
            return total

        def loss(model: nn.Module, batch: importance.Batch) -> torch.Tensor:
            weights = {n: (p + difference(n, chance=True)).to(p.dtype) for n, p in self.candidates.items()}
            expected = sum(hard_concrete.expected_open(a, group.get(n), c.low, c.high) for n, a in alpha.items())
            return (
                importance.loss(lambda **given: functional_call(model, weights, (), given), batch)
                + c.penalty * expected
            )

        warmup.train(
            self.host.model,
            [
                {"params": [*w.values(), *self.trained_head().values()], "lr": c.first_rate},
                {"params": [*alpha.values(), *group.values()], "lr": c.gate_rate},
            ],
            batches,
            epochs=c.epochs,
            steps=c.steps,
            seed=self.seed,
            what="diff_pruning, first phase: gates and differences",
            loss=loss,
        )
        with torch.no_grad():
            differences = {n: difference(n, chance=False) for n in self.candidates}
            self.choose([d.abs() for d in differences.values()])
            for name, child in self.children.items():
                child.values.add_(differences[name].flatten()[child.indices.long()])
