r"""LoraHub: a gradient-free search for the mixture of existing LoRA modules that fits a few examples of a new task.

.. math:: \hat A = \sum_i w_i A_i, \quad \hat B = \sum_i w_i B_i, \qquad
          \min_w \; \mathcal L(w) + \lambda \frac 1N \sum_i |w_i|, \qquad |w_i| \le 1.5

Shapes: A_i (r, in), B_i (out, r) of the N sources, w (N,), one w for the whole model. ``calibrate`` searches it, from
w = 0, on the first ``examples`` rows; :func:`peftlib.fit` does so by itself:

>>> adapted = peftlib.attach(model, "lorahub", sources=["adapters/sst2", "adapters/rte"])
>>> adapted.calibrate(batches)
>>> adapted.method.weights, adapted.method.history

Where all sources have a task head of the model's shape, heads are mixed too, as changes of the model's own,
:math:`h_0 + \sum_i w_i (h_i - h_0)`, unless ``attach(train_head=False)`` keeps it. Afterwards nothing of the mixture
trains; a task head does. The update is a product of two sums, so w and -w give the same one. Trained: N numbers;
stored: the mixture, r (in + out) a matrix, and w. Merge: exact, as LoRA's.

Source: Huang et al. 2023, arXiv:2307.13269, and its code. Where we differ: the optimizer is CMA-ES, there NGOpt,
nevergrad's choice for the problem; the loss is a mean over examples, which the code divides by their number once more;
the paper's models have no task heads, and its code would mix their tensors like all others, so that w = 0 gave a head
of zeros. Chosen here: 40 evaluations, 64 examples, the first spread of 0.5.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from peftlib.anatomy import Site
from peftlib.errors import DataError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import LowRank, sites_of_rank
from peftlib.methods.base import ConfigError, MethodConfig, SavedAdapter, at_least, between
from peftlib.methods.bases.low_rank import LowRankUpdates


@dataclass(frozen=True)
class LoraHubConfig(MethodConfig):
    """``evaluations`` of the loss in the search, each on the same ``examples`` rows; ``price`` lambda of the weights'
    mean size, ``bound`` of their size, ``spread``: standard deviation of the first weights drawn."""

    evaluations: int = 40
    examples: int = 64
    price: float = 0.05
    bound: float = 1.5
    spread: float = 0.5

    def __post_init__(self):
        at_least("evaluations", self.evaluations, 1)
        at_least("examples", self.examples, 1)
        at_least("price", self.price, 0)
        between("bound", self.bound, 0, float("inf"))
        between("spread", self.spread, 0, self.bound)


class Mixture(nn.Module):
    """Holds the weights w (N,) of the sources."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("weights", torch.zeros(size))


class LoraHub(LowRankUpdates):
    Config = LoraHubConfig
    learning_rate = 1e-2
    calibrates = True
    source_methods = ("lora",)

    def take_sources(self, sources: tuple[SavedAdapter, ...]) -> None:
        super().take_sources(sources)
        first, *others = (replace(source.config, dropout=0.0) for source in sources)
        for source, config in zip(sources[1:], others):
            if config != first:
                raise ConfigError(
                    f"source {source.name!r} is {config} and {sources[0].name!r} is {first}; modules that are mixed "
                    "need the same rank, scale and targets"
                )

    def targets(self, host: Host) -> list[Site]:
        source = self.sources[0].config
        return sites_of_rank(host, source.targets, source.rank)

    def update(self, site: Site) -> LowRank:
        c = self.sources[0].config
        update = LowRank(site.in_features, site.out_features, c.rank, c.scale).requires_grad_(False)
        nn.init.zeros_(update.A)
        return update

    def attach(self, host: Host) -> None:
        self.history: tuple[float, ...] = ()
        self.seed = int(torch.randint(2**31, (), device="cpu"))
        self.mixture = host.add(host.anatomy.base, "lorahub", Mixture(len(self.sources)))
        super().attach(host)

    @property
    def weights(self) -> torch.Tensor:
        """The sources' weights w, (N,)."""
        return self.mixture.weights

    def searched(self) -> int:
        return len(self.weights)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[dict[str, torch.Tensor]], checkpoint: Path | None = None) -> None:
        c = self.config
        rows = list(_first(batches, c.examples))
        if not rows:
            raise DataError("lorahub searches its weights on a few examples, and calibrate() was given none")
        mixed = self._mixed()

        def value(point: np.ndarray) -> float:
            self._mix(mixed, point)
            losses = [float(self.host.model(**batch).loss) * len(batch["labels"]) for batch in rows]
            return sum(losses) / sum(len(batch["labels"]) for batch in rows) + c.price * float(np.abs(point).mean())

        found = minimize(
            value, len(self.sources), bound=c.bound, evaluations=c.evaluations, spread=c.spread, seed=self.seed
        )
        self._mix(mixed, found.point)
        self.history = found.history

    def _mixed(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Each tensor that is mixed, its value at w = 0, and what a source of weight 1 adds to it, (N, ...)."""
        mixed = {
            f"{path}.{name}": tensor
            for path, update in self.named().items()
            for name, tensor in update.named_parameters()
        }
        head = {name: tensor for name, tensor in self.host.anatomy.head.items() if tensor.requires_grad}
        states = [source.state for source in self.sources]
        if all(name in state and state[name].shape == t.shape for name, t in head.items() for state in states):
            mixed |= head
        starts = {name: tensor.detach().clone() for name, tensor in mixed.items()}
        given = {name: torch.stack([state[name] for state in states]).to(t) for name, t in starts.items()}
        return [(tensor, starts[name], given[name] - starts[name]) for name, tensor in mixed.items()]

    def _mix(self, mixed: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], point: np.ndarray) -> None:
        self.weights.copy_(torch.as_tensor(point))
        for tensor, start, changes in mixed:
            # start + sum_i w_i change_i: (N,), (N, ...) -> (...)
            tensor.copy_(start + torch.tensordot(self.weights.to(changes.dtype), changes, dims=1))


def _first(batches: Iterable[dict[str, torch.Tensor]], count: int) -> Iterator[dict[str, torch.Tensor]]:
    """The first ``count`` rows of the batches."""
    for batch in batches:
        rows = len(batch["labels"])
        yield {k: v[:count] for k, v in batch.items()}
        if (count := count - rows) <= 0:
            return


@dataclass(frozen=True)
class Found:
    """The best point of a search and its value; ``history`` has the best value after each evaluation."""

    point: np.ndarray
    value: float
    history: tuple[float, ...]


def minimize(
    function: Callable[[np.ndarray], float], size: int, *, bound: float, evaluations: int, spread: float, seed: int
) -> Found:
    """Search the smallest ``function(point)`` by CMA-ES, with every entry of the point (size,) within +-``bound``.

    The first point is zero; further ones are drawn around the present mean, at first with standard deviation
    ``spread``. The global random state is left alone.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about plots, which nothing here draws
        import cma  # late: importing it takes seconds
    generator = np.random.default_rng(seed)
    options = {
        "bounds": [-bound, bound],
        "seed": np.nan,
        "randn": lambda *shape: generator.standard_normal(shape),
        "verbose": -9,
    }
    strategy = cma.CMAEvolutionStrategy(np.zeros(size), spread, options)
    best = np.zeros(size)
    history = [function(best)]
    while len(history) < evaluations and not strategy.stop():
        points = strategy.ask()[: evaluations - len(history)]
        values = [function(point) for point in points]
        for point, value in zip(points, values):
            if value < history[-1]:
                best = point
            history.append(min(value, history[-1]))
        if len(points) == strategy.popsize:
            strategy.tell(points, values)
    return Found(best, history[-1], tuple(history))
