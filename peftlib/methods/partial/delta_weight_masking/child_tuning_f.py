r"""Child-Tuning F: at every step a random child network, a part of all entries, gets its gradient.

.. math::
    \theta \leftarrow \theta - \eta\, \Bigl(\tfrac{1}{p}\, M_t \odot \nabla_\theta \mathcal L\Bigr), \qquad
    M_t \sim \mathrm{Bernoulli}(p)

Shapes: theta and M have the shapes of all the model's parameters. M is drawn anew at each step t; the gradients that
pass are divided by p, so that their expectation is the gradient. The optimizer sees the masked gradients: with Adam an
entry that is masked at a step still moves by its momentum. Trained: all parameters. Memory and the saved file are those
of full fine-tuning, because every entry moves. Start: identity, nothing is added. Merge: there is nothing to fold.

Source: Xu et al. 2021, arXiv:2109.05687, and its code, which masks after clipping and before Adam's moments, every
parameter that has a gradient, the head included; so it is here. Departure: a step's mask follows from the seed of
``attach`` and the step's number, so that all processes of a distributed run and a resumed run draw the same one.
``density`` is the paper's p (the code's ``reserve_p``), 0.3 by default as in Child-Tuning D; the paper's own choice for
F varies by task.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peftlib.mechanisms.host import Host
from peftlib.methods.base import Method, MethodConfig, TrainingState, between


@dataclass(frozen=True)
class ChildTuningFConfig(MethodConfig):
    """``density`` p: the share of the gradients' entries that is expected to pass at a step."""

    density: float = 0.3

    def __post_init__(self):
        between("density", self.density, 0, 1)


class ChildTuningF(Method):
    Config = ChildTuningFConfig
    learning_rate = 1e-4

    def attach(self, host: Host) -> None:
        self.seed = int(torch.randint(2**31, (), device="cpu"))
        host.train(host.model.parameters())

    @torch.no_grad()
    def on_gradients(self, training: TrainingState) -> None:
        p = self.config.density
        generators: dict[torch.device, torch.Generator] = {}
        for parameter in self.host.trained().values():
            if (g := parameter.grad) is None:
                continue
            if g.device not in generators:
                generators[g.device] = torch.Generator(g.device).manual_seed(self.seed + training.step)
            M = torch.empty_like(g).bernoulli_(p, generator=generators[g.device])  # the parameter's shape
            g.mul_(M).div_(p)  # M g / p, in place
