r"""DyLoRA: LoRA at a rank that is drawn anew at every step, so that any smaller rank can be cut out after training.

.. math:: y = W x + \frac{\alpha}{b} B_{:, :b} A_{:b, :} x, \qquad b \sim \mathcal U\{r_{\min}, \dots, r\}

Shapes: W (out, in), A (r, in), B (out, r). B starts at zero, so the start is the identity. One b a step serves all
matrices; components above it get no gradient. With ``frozen`` those below it get none either, so that only component b
learns. Outside of training the rank is r:

>>> with adapted.method.at_rank(3):      # look at another one
...     evaluate(adapted)
>>> adapted.method.cut(3)                # keep that one: save(), merge() and the model are then of rank 3

The scale is alpha / b at every rank, also after a cut, which leaves what LoRA of rank b and the same alpha is. The
update is linear and merges exactly, as LoRA's. Trained: r (in + out) a matrix; stored: as many, or b (in + out).

Source: Valipour et al. 2023, arXiv:2210.07558, and its code. The uniform distribution and that ``frozen`` is off by
default are chosen here. As in the code, an optimizer's momentum and weight decay also move components without gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import Nested, add_to_weight, check_rank
from peftlib.methods.base import ConfigError, Method, MethodConfig, TrainingState, at_least


@dataclass(frozen=True)
class DyLoRAConfig(MethodConfig):
    """``rank`` r, the largest; ``min_rank``, the smallest that is drawn; ``alpha`` (at rank b the update is scaled by
    alpha / b), ``targets`` (site patterns), ``frozen``: only the last drawn component learns; ``dropout`` on the
    update's input."""

    rank: int = 8
    min_rank: int = 1
    alpha: float = 16.0
    targets: tuple[str, ...] | str = ("*attention.query", "*attention.value")
    frozen: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        at_least("rank", self.rank, 1)
        at_least("min_rank", self.min_rank, 1)
        if self.min_rank > self.rank:
            raise ConfigError(f"min_rank={self.min_rank} is above rank={self.rank}; it is the smallest rank drawn")


class DyLoRA(Method):
    Config = DyLoRAConfig
    learning_rate = 2e-3

    def attach(self, host: Host) -> None:
        c = self.config
        self.rank = c.rank
        self.updates: dict = {}
        for site in host.anatomy.sites(c.targets):
            check_rank(c.rank, site)
            update = Nested(site.in_features, site.out_features, c.rank, c.alpha, c.dropout)
            self.updates[site] = host.after(site, "lora", update)

    def on_step_start(self, training: TrainingState) -> None:
        low = min(self.config.min_rank, self.rank)
        rank = int(torch.randint(low, self.rank + 1, ()))
        for update in self.updates.values():
            update.draw(rank, only_last=self.config.frozen)

    @contextmanager
    def at_rank(self, rank: int) -> Iterator[None]:
        """Compute at this rank in evaluation mode, and in merge(), inside a ``with`` block."""
        self._check(rank)
        try:
            for update in self.updates.values():
                update.choose(rank)
            yield
        finally:
            for update in self.updates.values():
                update.choose(self.rank)

    def cut(self, rank: int) -> None:
        """Keep this rank only, for good. Do it after training: an optimizer knows the old parameters."""
        self._check(rank)
        for update in self.updates.values():
            update.cut(rank)
        self.rank = rank

    def _check(self, rank: int) -> None:
        if rank not in range(1, self.rank + 1):
            raise ConfigError(f"rank {rank!r} is not here; choose one from 1 to {self.rank}")

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        stored = {len(tensor) for name, tensor in state.items() if name in self._first_factors()}
        if len(stored) == 1 and 0 < min(stored) < self.rank:
            self.cut(min(stored))
        self.host.load_state(state)

    def _first_factors(self) -> set[str]:
        return {f"{path}.A" for path, child in self.host.paths().items() if isinstance(child, Nested)}

    def merge(self) -> None:
        for site, update in self.updates.items():
            add_to_weight(site, update.delta())
