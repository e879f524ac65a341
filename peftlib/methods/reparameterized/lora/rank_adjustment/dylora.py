r"""DyLoRA: LoRA at a rank that is drawn anew at every step, so that any smaller rank can be cut out after training.

.. math:: y = W x + \frac{\alpha}{b} B_{:, :b} A_{:b, :} x, \qquad b \sim \mathcal U\{r_{\min}, \dots, r\}

Shapes: W (out, in), A (r, in), B (out, r). B starts at zero, so the start is the identity. A step draws one b for all
matrices; components above it get no gradient. Those below it are used and get none either, so that only component b
learns, unless ``frozen`` is off. Outside of training the rank is r:

>>> with adapted.method.at_rank(3):      # look at another one
...     evaluate(adapted)
>>> adapted.method.cut(3)                # keep that one: save(), merge() and the model are then of rank 3

The scale is alpha / b at every rank: after a cut the update is LoRA's of rank b with the same alpha. It is linear and
merges exactly, as LoRA's. Trained: r (in + out) a matrix; stored: as many, or b (in + out).

Source: Valipour et al. 2023, arXiv:2210.07558, and its code, whose GLUE runs draw uniformly from 1 to 8 and freeze what
is below. As in the code, an optimizer's momentum and weight decay also move components without gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.anatomy import Site
from peftlib.mechanisms import low_rank
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import LowRank, thin
from peftlib.mechanisms.precision import cast
from peftlib.methods.base import ConfigError, MethodConfig, TrainingState, at_least
from peftlib.methods.bases.low_rank import LowRankUpdates


@dataclass(frozen=True)
class DyLoRAConfig(MethodConfig):
    """``rank`` r, the largest; ``min_rank``, the smallest that is drawn; ``alpha`` (at rank b the update is scaled by
    alpha / b), ``targets`` (site patterns), ``frozen``: only the last drawn component learns; ``dropout`` on the
    update's input."""

    rank: int = 8
    min_rank: int = 1
    alpha: float = 16.0
    targets: tuple[str, ...] | str = ("*attention.query", "*attention.value")
    frozen: bool = True
    dropout: float = 0.0

    def __post_init__(self):
        at_least("rank", self.rank, 1)
        at_least("min_rank", self.min_rank, 1)
        if self.min_rank > self.rank:
            raise ConfigError(f"min_rank={self.min_rank} is above rank={self.rank}; it is the smallest rank drawn")


class Nested(LowRank):
    """``forward(x, y) = y + alpha / b * B[:, :b] A[:b] x``: an update that works at every rank b up to its own, r.

    In training :meth:`draw` sets b, otherwise :meth:`choose`; at first both are r. ``drawn`` and ``chosen`` (r,) weigh
    the components: alpha / b up to b, then 0. ``learns`` (r,) marks those that get a gradient. Shapes, with N rows of t
    tokens: x (N, t, in), y (N, t, out), A (r, in), B (out, r).
    """

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__(in_features, out_features, rank, 1.0, dropout)
        self.alpha = alpha
        # As tensors, so that a compiled graph serves every rank.
        for name in ("drawn", "chosen", "learns"):
            self.register_buffer(name, torch.ones(rank), persistent=False)
        self._reset()

    def _reset(self) -> None:
        for name in ("drawn", "chosen"):
            setattr(self, name, self._weights(len(self.A)))
        self.learns = torch.ones_like(self.drawn)

    def _weights(self, rank: int) -> torch.Tensor:
        weights = torch.zeros(len(self.A), dtype=self.A.dtype, device=self.A.device)
        weights[:rank] = self.alpha / rank
        return weights

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        A, B, weights = self.A, self.B, self.chosen  # (r, in), (out, r), (r,)
        if self.training:
            learns, weights = self.learns.bool(), self.drawn  # (r,)
            A, B = torch.where(learns[:, None], A, A.detach()), torch.where(learns, B, B.detach())  # the same values
        x = cast(self.dropout(x), A).flatten(0, -2)  # (N, t, in) -> (N t, in)
        Ax = F.linear(x, A) * weights  # (N t, in) -> (N t, r)
        return low_rank.update(y, Ax, B, self.scale)  # (N t, r) -> (N, t, out)

    def draw(self, rank: int, only_last: bool = False) -> None:
        """Train at this rank; with ``only_last`` its components below the last are used and get no gradient."""
        self.drawn.copy_(self._weights(rank))
        self.learns.fill_(1)
        if only_last:
            self.learns[: rank - 1] = 0

    def choose(self, rank: int) -> None:
        """Compute at this rank outside of training, also in :meth:`delta`."""
        self.chosen.copy_(self._weights(rank))

    def cut(self, rank: int) -> None:
        """Drop the components above this rank."""
        B = thin(len(self.B), rank).to(self.B).copy_(self.B.detach()[:, :rank])
        self.A = nn.Parameter(self.A.detach()[:rank].clone(), requires_grad=self.A.requires_grad)
        self.B = nn.Parameter(B, requires_grad=self.B.requires_grad)
        self._reset()

    def delta(self) -> torch.Tensor:
        """The (out, in) update at the chosen rank, formed in float32 or wider."""
        A, B, weights = (t.detach().to(self.delta_dtype) for t in (self.A, self.B, self.chosen))
        return (B * weights) @ A  # (out, r) (r, in) -> (out, in)


class DyLoRA(LowRankUpdates):
    Config = DyLoRAConfig
    learning_rate = 2e-3

    def attach(self, host: Host) -> None:
        super().attach(host)
        self.rank = self.config.rank

    def update(self, site: Site) -> Nested:
        c = self.config
        return Nested(site.in_features, site.out_features, c.rank, c.alpha, c.dropout)

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
        stored = {len(state[name]) for path in self.named() if (name := f"{path}.A") in state}
        if len(stored) == 1 and 0 < min(stored) < self.rank:
            self.cut(min(stored))
        self.host.load_state(state)
