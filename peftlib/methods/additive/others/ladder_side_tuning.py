r"""Ladder side-tuning: a slim transformer beside the backbone, fed by gated ladders; no gradient enters the backbone.

.. math:: s_\ell = \mathrm{Side}_\ell\bigl(g_\ell\, s_{\ell-1} + (1 - g_\ell)(W_\ell h_\ell + b_\ell)\bigr), \qquad
          g_\ell = \sigma(\alpha_\ell / T)

Shapes: h (B, n, d), the output of backbone layer l; s (B, n, d/r); W (d/r, d). Side layers are of the backbone's class
with hidden, inner and head sizes divided by r and the same number of heads. s_0 is a projection of the embeddings; the
last state, behind a slim final norm where the family has one, is projected back to d and given to the frozen head, to
which the backbone's own last state does not go. alpha starts at 0, so g at 1/2: the start is not the backbone's output.
Trained: side layers, projections, gates. No merge: it is a network of its own.

``init="fisher"`` fills the side layers with the backbone's most important rows and columns by squared gradients of
``samples`` training rows (in :func:`calibrate`), "magnitude" by the weights' size, "random" not at all.

Source: Sung et al. 2022, arXiv:2206.06522, and its code: r = 8, T = 0.1, 1,024 samples; on T5-base side layers 0, 4 and
8 of each stack are dropped (``dropped_layers``; here none by default). Theirs picks the rows of queries, keys and
values across heads; here each head keeps its own most important ones, which grouped keys need and which keeps heads
whole. Gradients are those of the whole model's loss with the task head as it is. An encoder hands its side state to the
decoder's side layers as additional columns of its output. Keys and values of side layers live in the same cache as the
backbone's, which must be a dynamic one. ``output_hidden_states`` lists the side layers' states too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from peftlib.errors import UnknownNameError
from peftlib.mechanisms import importance, side
from peftlib.mechanisms.host import Host
from peftlib.methods.base import ConfigError, Method, MethodConfig, at_least

INITS = ("fisher", "magnitude", "random")


@dataclass(frozen=True)
class LadderSideTuningConfig(MethodConfig):
    """``reduction`` r, ``dropped_layers`` (indices in each stack that get no side layer), ``temperature`` T, ``init``
    and its ``samples`` (rows whose gradients are taken)."""

    reduction: int = 8
    dropped_layers: tuple[int, ...] = ()
    temperature: float = 0.1
    init: Literal["fisher", "magnitude", "random"] = "fisher"
    samples: int = 1024

    def __post_init__(self):
        at_least("reduction", self.reduction, 2)
        at_least("samples", self.samples, 1)
        if not self.temperature > 0:
            raise ConfigError(f"temperature={self.temperature!r} must be above 0")
        if self.init not in INITS:
            raise UnknownNameError("init", self.init, INITS)


class LadderSideTuning(Method):
    Config = LadderSideTuningConfig
    learning_rate = 5e-4

    def __init__(self, config: LadderSideTuningConfig):
        super().__init__(config)
        self.calibrates = config.init == "fisher"

    def attach(self, host: Host) -> None:
        c = self.config
        self.ladders = side.attach(host, self.name, c.reduction, c.dropped_layers, c.temperature)
        if c.init != "random" and not host.anatomy.embeddings.weight.is_meta:
            self._prune(side.Importance())

    def calibrate(self, batches: Iterable[dict[str, torch.Tensor]], checkpoint: Path | None = None) -> None:
        parameters = side.scored_parameters(self.host.anatomy)
        for ladder in self.ladders.values():
            ladder.bypassed = True
        try:
            sums = importance.per_example(self.host.model, parameters, batches, self.config.samples)
        finally:
            for ladder in self.ladders.values():
                ladder.bypassed = False
        self._prune(side.Importance({id(p): total for p, total in zip(parameters, sums)}))

    def _prune(self, importance: side.Importance) -> None:
        for stack, ladder in self.ladders.items():
            side.prune_into(ladder, self.host.anatomy, stack, self.config.reduction, importance)
