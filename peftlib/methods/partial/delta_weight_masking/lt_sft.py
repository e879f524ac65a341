r"""LT-SFT: train everything, take the entries that moved most, rewind, and train those alone.

.. math::
    \theta = \theta_0 + \phi, \qquad \phi_i = 0 \text{ unless } i \in \operatorname{top}_K |\theta_1 - \theta_0|,
    \qquad \theta_{\text{task} + \text{language}} = \theta_0 + \phi_{\text{task}} + \phi_{\text{language}}

Shapes: theta and phi have the shapes of all the backbone's tensors below the head, embeddings and biases included; the
norms are frozen throughout. Warm-up training, a full fine-tuning with the head, gives theta_1. The K entries with the
largest change over all tensors together are chosen, ties by position. Then everything goes back to theta_0, the head
too, and the main training trains the K entries as sparse values and the head densely: the start is the identity,
optimizer states have K entries, nothing moves the rest. Stored: K values with their indices. Trained without the head:
``K = int(density * parameters below the head)``. Merge: exact, the values are the weights' own.

The warm-up training is :meth:`Adapted.calibrate`, on the batches given (``fit``: the training data), with an optimizer
and a learning-rate schedule of its own, which falls linearly to 0 as the code's. It takes no share of the main
training's steps: an optimizer that was built for all parameters would keep their states through the main training, and
a resumed Trainer would have to know which training it is in. Its memory is that of full fine-tuning, with a copy of the
weights on the CPU; the main training's is that of sparse training.

Vectors of tasks and languages add up: :func:`peftlib.add_vector`. Both trainings can draw theta to theta_0, with
:math:`\frac{l_1}{N} \sum_i |\theta_i - \theta_{0, i}|` added to the loss, over all that trains, head included; N counts
the model's parameters.

Source: Ansell et al. 2022, arXiv:2110.07560, and its code (one iteration). The defaults are those of its scripts for
tasks: norms frozen, no l_1, a rate of 5e-5 and 3 epochs for the warm-up training, and K = 14,155,776, 8 % of
multilingual BERT. Its script for languages has ``l1=0.1`` and K = 7,667,712, ``density=0.043``, and the heads of
language models stay frozen, as always here. (Without these options the code takes 1 % and trains norms.) Departures:
the code masks gradients, so its weight decay moves masked entries and its optimizer states are dense; it takes every
entry at the threshold, here exactly K are taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from peftlib.errors import TargetError
from peftlib.mechanisms import atomic, importance, precision, sparse, warmup
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.schedules import Schedule
from peftlib.methods.base import ForwardPass, MethodConfig, TrainingState, at_least, between
from peftlib.methods.bases.entries import ChosenEntries


@dataclass(frozen=True)
class LTSFTConfig(MethodConfig):
    """``density``: K as a share of the backbone's parameters; ``freeze_norms``; ``l1`` of both trainings; the warm-up
    training takes ``epochs`` over the calibration batches, or ``steps``, at ``first_rate``."""

    density: float = 0.08
    freeze_norms: bool = True
    l1: float = 0.0
    epochs: float = 3.0
    steps: int | None = None
    first_rate: float = 5e-5

    def __post_init__(self):
        between("density", self.density, 0, 1)
        at_least("l1", self.l1, 0)
        between("epochs", self.epochs, 0, float("inf"))
        between("first_rate", self.first_rate, 0, float("inf"))
        if self.steps is not None:
            at_least("steps", self.steps, 1)


class LTSFT(ChosenEntries):
    Config = LTSFTConfig
    learning_rate = 1e-4

    def attach(self, host: Host) -> None:
        super().attach(host)
        norms = [m for m in host.model.modules() if type(m).__name__.endswith("Norm")]
        self.frozen = {id(p) for m in norms for p in m.parameters()} if self.config.freeze_norms else set()
        free = sum(p.numel() for p in self._free())
        if self.k > free:
            raise TargetError(f"density={self.config.density} is {self.k:,} entries, and {free:,} are not of norms")
        self.parameters = sum(p.numel() for p in host.model.parameters())
        self.head_start: list[torch.Tensor] = []

    def _free(self) -> list[nn.Parameter]:
        """The candidates that are not frozen."""
        return [p for p in self.candidates.values() if id(p) not in self.frozen]

    def calibrate(self, batches: Iterable[dict[str, torch.Tensor]], checkpoint: Path | None = None) -> None:
        c, free = self.config, self._free()
        theta = [*free, *self.trained_head().values()]
        kept = "cpu" if not c.l1 else self.host.device
        with atomic.kept(theta, kept) as theta_0:
            change = self._warm_up(theta, theta_0, batches)
        chosen = iter(sparse.top_entries(change[: len(free)], self.k))
        none = torch.empty(0, dtype=torch.int64, device=self.host.device)
        self.train(none if id(p) in self.frozen else next(chosen) for p in self.candidates.values())

    def _warm_up(
        self, theta: list[nn.Parameter], theta_0: list[torch.Tensor], batches: Iterable[dict[str, torch.Tensor]]
    ) -> list[torch.Tensor]:
        """How much each entry of theta changes in a training of everything; theta is then theta_0 again."""
        c = self.config

        def loss(model: nn.Module, batch: importance.Batch) -> torch.Tensor:
            value = importance.loss(model, batch)
            return value + self._distance(zip(theta, theta_0)) if c.l1 else value

        change = []
        with precision.in_float32(self.host.model, theta):
            warmup.train(
                self.host.model,
                [{"params": theta, "lr": c.first_rate}],
                batches,
                epochs=c.epochs,
                steps=c.steps,
                schedule=Schedule("linear"),
                seed=self.seed,
                what="lt_sft, warm-up training of everything",
                loss=loss,
            )
            with torch.no_grad():
                for theta_1, start in zip(theta, theta_0):
                    start = start.to(theta_1.device)
                    change.append((theta_1 - start).float().abs())  # |theta_1 - theta_0|, of the tensor's shape
                    theta_1.copy_(start)
        return change

    def _distance(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """l_1 / N times the sum of absolute differences."""
        return self.config.l1 / self.parameters * sum((a - b).abs().sum() for a, b in pairs)  # ()

    def on_step_start(self, training: TrainingState) -> None:
        if training.step == 0 or not self.head_start:
            self.head_start = [p.detach().clone() for p in self.trained_head().values()] if self.config.l1 else []

    def run_state(self) -> dict[str, torch.Tensor]:
        return {f"head_start.{i}": start for i, start in enumerate(self.head_start)}

    def load_run_state(self, state: dict[str, torch.Tensor]) -> None:
        self.head_start = [state[f"head_start.{i}"].to(self.host.device) for i in range(len(state))]

    def penalty(self, forward: ForwardPass) -> torch.Tensor | None:
        if not (self.config.l1 and self.children):  # the warm-up training has a loss of its own
            return None
        entries = ((child.values, child.original) for child in self.children.values())
        return self._distance((*entries, *zip(self.trained_head().values(), self.head_start)))
