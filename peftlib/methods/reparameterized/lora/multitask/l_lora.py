r"""L-LoRA: LoRA layers in their tangent space, so that what several tasks learned can be added.

.. math:: y = W x + \frac{\alpha}{r} \bigl(B A_0 + B_0 (A - A_0)\bigr) x, \qquad
          \theta = \theta_0 + \lambda \sum_t (\theta_t - \theta_0)

Shapes: W (out, in), A (r, in), B (out, r); A_0, B_0 their start. Each LoRA layer, not the network, is replaced by its
first-order expansion, so it is exactly linear in A and B. B_0 is zero: the start is the identity, A has no gradient and
stays A_0, and the layer is LoRA-FA's. With ``std_B`` above 0, B_0 is N(0, std_B^2) and A trains too; the start is then
not the identity. Trained: r out a matrix; stored: A_0 too. Merge: exact.

Modules of several tasks with the same start (attach them with the same ``seed``) are fused by task arithmetic; the
fused one is an ordinary module, with the model's own task head:

>>> adapted = peftlib.attach(model, "l_lora", scaling=0.4, sources=["adapters/sst2", "adapters/rte"])
>>> adapted.method.fuse([0.3, 0.5])                           # other weights, one a source
>>> adapted.method.disentanglement_error([sst2, rte], [0.3, 0.5])

The error is 0 where a task's predictions are untouched by the other tasks' changes.

Source: Tang et al. 2023, arXiv:2310.04742, and its code (rank 16, alpha 32, dropout 0.1 on query and value), which
takes the expansion by ``torch.func.jvp``; here it is written out. The error is that of Ortiz-Jimenez et al. 2023
(arXiv:2305.12827), for the share of predictions that change. ``scaling`` of 0.3 is chosen here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.anatomy import Site
from peftlib.errors import StateError
from peftlib.mechanisms import low_rank
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import LowRank
from peftlib.mechanisms.precision import cast
from peftlib.methods.base import ConfigError, MethodConfig, SavedAdapter, at_least
from peftlib.methods.bases.low_rank import LowRankUpdates


@dataclass(frozen=True)
class LLoRAConfig(MethodConfig):
    """``rank`` r, ``alpha`` (the update is scaled by alpha / r), ``targets`` (site patterns), ``dropout`` on the
    update's input, ``std_B``: standard deviation of B's start, ``scaling`` lambda of the sources' changes."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] | str = ("*attention.query", "*attention.value")
    dropout: float = 0.1
    std_B: float = 0.0
    scaling: float = 0.3

    def __post_init__(self):
        at_least("rank", self.rank, 1)
        at_least("std_B", self.std_B, 0)


class Tangent(LowRank):
    """``forward(x, y) = y + scale * (B A_0 + B_0 (A - A_0)) dropout(x)``: the first-order expansion of :class:`LowRank`
    around its start.

    Shapes, with b rows of t tokens: x (b, t, in), y (b, t, out), A and A_0 (r, in), B and B_0 (out, r). A_0 is
    :class:`LowRank`'s start, B_0 is N(0, std_B^2). With a zero B_0 the expansion does not depend on A, which then is
    not trained and stays A_0.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, scale: float, dropout: float = 0.0, std_B: float = 0.0
    ):
        super().__init__(in_features, out_features, rank, scale, dropout, train_A=std_B > 0)
        self.both = std_B > 0
        if self.both:
            nn.init.normal_(self.B, std=std_B)
            self.register_buffer("A_0", self.A.detach().clone())
            self.register_buffer("B_0", self.B.detach().clone())

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not self.both:
            return super().forward(x, y)
        A, A_0, B, B_0 = self.A, self.A_0, self.B, self.B_0
        x = cast(self.dropout(x), A).flatten(0, -2)  # (b, t, in) -> (b t, in)
        y = low_rank.update(y, F.linear(x, A_0), B, self.scale)  # (b t, in) -> (b t, r) -> (b, t, out)
        return low_rank.update(y, F.linear(x, A - A_0), B_0, self.scale)  # (b t, in) -> (b t, r) -> (b, t, out)

    def start(self) -> dict[str, torch.Tensor]:
        """A_0 and B_0, under the names A and B."""
        if self.both:
            return {"A": self.A_0, "B": self.B_0}
        return {"A": self.A, "B": torch.zeros_like(self.B)}

    def delta(self) -> torch.Tensor:
        if not self.both:
            return super().delta()
        A, A_0, B, B_0 = (t.detach().to(self.delta_dtype) for t in (self.A, self.A_0, self.B, self.B_0))
        return self.scale * (B @ A_0 + B_0 @ (A - A_0))  # (out, r) (r, in) -> (out, in)


class LLoRA(LowRankUpdates):
    Config = LLoRAConfig
    learning_rate = 1e-2
    source_methods = ("l_lora",)
    fewest_sources = 0

    def take_sources(self, sources: tuple[SavedAdapter, ...]) -> None:
        super().take_sources(sources)
        for source in sources:
            if _shape(source.config) != _shape(self.config):
                raise ConfigError(
                    f"source {source.name!r} is {source.config}; attach with its rank, alpha, targets and std_B"
                )

    def update(self, site: Site) -> Tangent:
        c = self.config
        return Tangent(site.in_features, site.out_features, c.rank, c.alpha / c.rank, c.dropout, c.std_B)

    def attach(self, host: Host) -> None:
        super().attach(host)
        if self.sources and self.sources[0].state is not None:
            self._take_start()
            self.fuse()

    @torch.no_grad()
    def _take_start(self) -> None:
        """Take over the sources' start. Raises ConfigError where they have different ones."""
        start = [n for n in ("A_0", "B_0") if self.config.std_B] or ["A"]
        for path, update in self.named().items():
            for name in start:
                first, *others = (source.state[f"{path}.{name}"] for source in self.sources)
                for source, other in zip(self.sources[1:], others):
                    if not torch.equal(first, other):
                        raise ConfigError(
                            f"source {source.name!r} was trained from another start than {self.sources[0].name!r}; "
                            "changes add up only from one start: attach(..., seed=...) with the same seed"
                        )
                getattr(update, name).copy_(first)

    @torch.no_grad()
    def fuse(self, weights: Sequence[float] | None = None) -> None:
        """Set the module to its start plus the sources' changes times ``weights``, one a source (default: ``scaling``
        for all). What was trained since is lost."""
        if not self.sources or self.sources[0].state is None:
            raise StateError('l_lora has no sources to fuse; attach(model, "l_lora", sources=[folder, ...])')
        weights = [self.config.scaling] * len(self.sources) if weights is None else list(weights)
        if len(weights) != len(self.sources):
            raise ConfigError(f"{len(weights)} weights were given for {len(self.sources)} sources")
        for path, update in self.named().items():
            for name, start in update.start().items():
                tensor = getattr(update, name)
                if tensor.requires_grad:
                    given = (source.state[f"{path}.{name}"].to(start) for source in self.sources)
                    tensor.copy_(start + sum(w * (value - start) for w, value in zip(weights, given)))

    @torch.no_grad()
    def disentanglement_error(self, batches: Sequence[dict[str, torch.Tensor]], weights: Sequence[float]) -> float:
        """How much the tasks disturb each other: the share of a task's predictions (one batch a source) that change
        when the other sources' changes are added, summed over the tasks. Each task is answered through the head of its
        own source. Leaves the module fused with ``weights`` and the model in evaluation mode."""
        if len(batches) != len(self.sources):
            raise ConfigError(f"{len(batches)} batches were given for {len(self.sources)} sources")
        model, head = self.host.model.eval(), self.host.anatomy.head
        own = {name: tensor.clone() for name, tensor in head.items()}
        error = 0.0
        for task, (source, batch) in enumerate(zip(self.sources, batches)):
            predictions = []
            for fused in ([w if i == task else 0.0 for i, w in enumerate(weights)], weights):
                self.fuse(fused)
                for name, tensor in head.items():
                    tensor.copy_(source.state.get(name, own[name]))
                predictions.append(model(**batch).logits.argmax(-1))
            error += float((predictions[0] != predictions[1]).float().mean())
        for name, tensor in head.items():
            tensor.copy_(own[name])
        return error


def _shape(config: LLoRAConfig) -> tuple:
    """What modules whose changes are added have in common."""
    return config.rank, config.alpha, tuple(config.targets), config.std_B
