r"""Diff pruning: a difference to the pretrained weights is learned with gates that close, then cut to its largest part.

.. math::
    \theta = \theta_0 + z \odot w, \qquad
    z = \min\bigl(1, \max(0,\, \sigma(\operatorname{logit} u + \alpha)(r - l) + l)\bigr), \qquad
    \mathcal L + \lambda \sum_i P(z_i \ne 0), \quad P(z_i \ne 0) = \sigma\bigl(\alpha_i - \log\tfrac{-l}{r}\bigr)

Shapes: w, alpha and z have the shapes of all the backbone's tensors below the head; u is drawn anew at every step. In
the structured form (default) each tensor has one more gate, its own alpha, by which all its gates are multiplied; an
entry is then non-zero with the product of both probabilities. Warm-up training trains w (from 0), alpha and the head.
Then the difference with its gates at u = 1/2 is projected: the k entries with the largest absolute values over all
tensors together stay (ties by position), the others are zero. The main training trains these k as sparse values, from
where the projection left them, so optimizer states have k entries and nothing moves the rest. Stored: k values with
their indices. Merge: exact, they are the weights' own. Trained without the head:
``k = int(density * parameters below it)``.

The warm-up training is :meth:`Adapted.calibrate`, on the batches given (``fit``: the training data);
:mod:`peftlib.methods.bases.entries` says why. It needs more memory than full fine-tuning: w and alpha with gradients
and two optimizer states each, beside the weights. The model that the main training starts from is the projected one,
not the backbone.

Source: Guo et al. 2021, arXiv:2012.07463, and its code (l = -1.5, r = 1.5, alpha from 5, lambda = 1.25e-7, alpha's
learning rate 0.1 and constant, w's falling linearly to 0 in both trainings, three epochs, 0.5 %; head dense and
unpenalised). Departures: the penalty of the structured form is the expected number of non-zeros, as in the paper (the
code adds both probabilities); the code projects the difference with the gates of the last step, goes on from w without
them, counts the head in the share and masks gradients, so its weight decay moves zeros. ``first_rate`` of w and head is
chosen here (the code's 1e-5 is for BERT-large)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call

from peftlib.mechanisms import importance, warmup
from peftlib.mechanisms.schedules import Schedule
from peftlib.methods.base import ConfigError, MethodConfig, at_least, between
from peftlib.methods.bases.entries import ChosenEntries


@dataclass(frozen=True)
class DiffPruningConfig(MethodConfig):
    """``density`` of the entries that differ in the end; ``structured``: one more gate a tensor; ``penalty`` lambda,
    the price of an expected non-zero; ``low`` l, ``high`` r and ``alpha`` (its start) of the gates; the warm-up
    training takes ``epochs`` over the calibration batches, or ``steps``, at ``first_rate`` and, for the gates,
    ``gate_rate``."""

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


def noise_like(alpha: torch.Tensor) -> torch.Tensor:
    """logit u, of the shape of alpha; u is uniform and keeps 1e-4 away from 0 and 1."""
    return torch.rand_like(alpha).clamp_(1e-4, 1 - 1e-4).logit_()


def gate(alpha: torch.Tensor, noise: torch.Tensor | float, low: float, high: float) -> torch.Tensor:
    """A hard-concrete gate z in [0, 1] for one draw of logit u, or, with noise 0, at u = 1/2. It is exactly 0 or 1 with
    positive probability, and differentiable."""
    return (torch.sigmoid(alpha + noise) * (high - low) + low).clamp(0, 1)


def open_probability(alpha: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """P(z != 0) of each gate."""
    return torch.sigmoid(alpha - math.log(-low / high))


def expected_open(alpha: torch.Tensor, group: torch.Tensor | None, low: float, high: float) -> torch.Tensor:
    """How many of a tensor's gates are expected not to be zero; ``group`` is the alpha of one more gate by which all of
    them are multiplied."""
    expected = open_probability(alpha, low, high).sum()
    return expected if group is None else expected * open_probability(group, low, high)


class GatedDifference(nn.Module):
    """``forward() = z * w`` for one tensor: w and alpha have its shape, ``group`` is the alpha of its one more gate."""

    def __init__(self, tensor: torch.Tensor, alpha: float, structured: bool, low: float, high: float):
        super().__init__()
        self.w = nn.Parameter(torch.zeros_like(tensor, dtype=torch.float32))
        self.alpha = nn.Parameter(torch.full_like(self.w, alpha))
        self.group = nn.Parameter(torch.full((), alpha, device=tensor.device)) if structured else None
        self.low, self.high = low, high

    def forward(self, draw: bool) -> torch.Tensor:
        """``draw``: gates with a u that is drawn; without it u = 1/2."""
        zw = self.w  # the tensor's shape
        for alpha in (self.alpha,) if self.group is None else (self.alpha, self.group):
            noise = noise_like(alpha) if draw else 0.0  # alpha's shape, a number for the group
            zw = zw * gate(alpha, noise, self.low, self.high)  # the tensor's shape
        return zw

    def expected_open(self) -> torch.Tensor:
        """The sum of P(z_i != 0), ()."""
        return expected_open(self.alpha, self.group, self.low, self.high)


class DiffPruning(ChosenEntries):
    Config = DiffPruningConfig
    learning_rate = 2e-3

    def calibrate(self, batches: Iterable[dict[str, torch.Tensor]], checkpoint: Path | None = None) -> None:
        c, theta_0 = self.config, self.candidates
        changes = {n: GatedDifference(p, c.alpha, c.structured, c.low, c.high) for n, p in theta_0.items()}

        def loss(model: nn.Module, batch: importance.Batch) -> torch.Tensor:
            theta = {n: (p + changes[n](draw=True)).to(p.dtype) for n, p in theta_0.items()}
            expected = sum(change.expected_open() for change in changes.values())
            task_loss = importance.loss(lambda **given: functional_call(model, theta, (), given), batch)
            return task_loss + c.penalty * expected

        w = [change.w for change in changes.values()]
        alphas = [change.alpha for change in changes.values()]
        groups = [change.group for change in changes.values() if c.structured]
        warmup.train(
            self.host.model,
            [
                {"params": [*w, *self.trained_head().values()], "lr": c.first_rate},
                {"params": [*alphas, *groups], "lr": c.gate_rate, "schedule": Schedule("constant")},
            ],
            batches,
            epochs=c.epochs,
            steps=c.steps,
            schedule=Schedule("linear"),
            seed=self.seed,
            what="diff_pruning, warm-up training of gates and differences",
            loss=loss,
        )
        with torch.no_grad():
            differences = {n: change(draw=False) for n, change in changes.items()}
            self.choose([d.abs() for d in differences.values()])
            for name, child in self.children.items():
                child.values.add_(differences[name].flatten()[child.indices.long()])
