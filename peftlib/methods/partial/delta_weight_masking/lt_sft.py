r"""LT-SFT: train everything, take the entries that moved most, rewind, and train those alone.

.. math::
    \theta = \theta_0 + \phi, \qquad \phi_i = 0 \text{ unless } i \in \operatorname{top}_K |\theta_1 - \theta_0|,
    \qquad \theta_{\text{task} + \text{language}} = \theta_0 + \phi_{\text{task}} + \phi_{\text{language}}

Shapes: theta and phi have the shapes of all the backbone's tensors below the head (embeddings, norms and biases
included). Warm-up training, a full fine-tuning with the head, gives theta_1. The K entries with the largest change over
all tensors together are chosen, ties by position. Then everything goes back to theta_0, the head too, and the main
training trains the K entries as sparse values and the head densely: the start is the identity, optimizer states have K
entries, nothing moves the rest. Stored: K values with their indices. Trained without the head:
``K = int(density * parameters below the head)``. Merge: exact, the values are the weights' own.

The warm-up training is :meth:`Adapted.calibrate`, on the batches given (``fit``: the training data), with an optimizer
and a learning-rate schedule of its own, which falls linearly to 0 as the code's. It takes no share of the main
training's steps: an optimizer that was built for all parameters would keep their states through the main training, and
a resumed Trainer would have to know which training it is in. Its memory is that of full fine-tuning, with a copy of the
weights on the CPU; the main training's is that of sparse training.

Vectors of tasks and languages add up: :func:`peftlib.add_vector`.

Source: Ansell et al. 2022, arXiv:2110.07560, and its code (one iteration; K is 1 % by default as there). Departures:
the code masks gradients, so its weight decay moves masked entries and its optimizer states are dense; it takes every
entry at the threshold, here exactly K are taken; the heads of language models stay frozen. The learning rate and the
length of the warm-up training are chosen here: those of full fine-tuning in this library.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from peftlib.mechanisms import warmup
from peftlib.mechanisms.schedules import Schedule
from peftlib.methods.base import MethodConfig, at_least, between
from peftlib.methods.bases.entries import ChosenEntries


@dataclass(frozen=True)
class LTSFTConfig(MethodConfig):
    """``density``: K as a share of the backbone's parameters; the warm-up training takes ``epochs`` over the
    calibration batches, or ``steps``, at ``first_rate``."""

    density: float = 0.01
    epochs: float = 3.0
    steps: int | None = None
    first_rate: float = 5e-5

    def __post_init__(self):
        between("density", self.density, 0, 1)
        between("epochs", self.epochs, 0, float("inf"))
        between("first_rate", self.first_rate, 0, float("inf"))
        if self.steps is not None:
            at_least("steps", self.steps, 1)


class LTSFT(ChosenEntries):
    Config = LTSFTConfig
    learning_rate = 5e-4

    def calibrate(self, batches: Iterable[dict[str, torch.Tensor]], checkpoint: Path | None = None) -> None:
        c = self.config
        theta = [*self.candidates.values(), *self.trained_head().values()]
        theta_0 = [p.detach().to("cpu", copy=True) for p in theta]
        warmup.train(
            self.host.model,
            [{"params": theta, "lr": c.first_rate}],
            batches,
            epochs=c.epochs,
            steps=c.steps,
            schedule=Schedule("linear"),
            seed=self.seed,
            what="lt_sft, warm-up training of everything",
        )
        change = []
        with torch.no_grad():
            for theta_1, start in zip(theta, theta_0):
                start = start.to(theta_1.device)
                change.append((theta_1 - start).float().abs())  # |theta_1 - theta_0|, of the tensor's shape
                theta_1.copy_(start)
        self.choose(change[: len(self.candidates)])
