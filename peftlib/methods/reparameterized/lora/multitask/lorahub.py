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

Source: Huang et al. 2023, arXiv:2307.13269, and its code: 40 evaluations of the loss on 5 examples, by nevergrad's
NGOpt (which for so few takes COBYLA: a linear model of the loss in a shrinking region, without anything random). Where
we differ: the loss is the mean over the examples, as in the paper; the code divides that by their number once more. The
paper's models have no task heads, and its code would mix their tensors like all others, so that w = 0 gave a head of
zeros.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from peftlib.anatomy import Site
from peftlib.errors import DataError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import LowRank, check_rank
from peftlib.methods.base import ConfigError, MethodConfig, SavedAdapter, at_least, between
from peftlib.methods.bases.low_rank import LowRankUpdates


@dataclass(frozen=True)
class LoraHubConfig(MethodConfig):
    """``evaluations`` of the loss in the search, each on the same ``examples`` rows; ``price`` lambda of the weights'
    mean size, ``bound`` of their size, ``optimizer``: a name in ``nevergrad.optimizers.registry``, such as "CMA"."""

    evaluations: int = 40
    examples: int = 5
    price: float = 0.05
    bound: float = 1.5
    optimizer: str = "NGOpt"

    def __post_init__(self):
        at_least("evaluations", self.evaluations, 1)
        at_least("examples", self.examples, 1)
        at_least("price", self.price, 0)
        between("bound", self.bound, 0, float("inf"))


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
        sites = host.anatomy.sites(self.sources[0].config.targets)
        for site in sites:
            check_rank(self.sources[0].config.rank_at(site), site)
        return sites

    def update(self, site: Site) -> LowRank:
        c = self.sources[0].config
        update = LowRank(site.in_features, site.out_features, c.rank_at(site), c.scale_at(site)).requires_grad_(False)
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
            losses = [float(self.host.model(**batch).loss) * len(batch["input_ids"]) for batch in rows]
            return sum(losses) / sum(len(batch["input_ids"]) for batch in rows) + c.price * float(np.abs(point).mean())

        found = minimize(
            value, len(self.sources), bound=c.bound, evaluations=c.evaluations, seed=self.seed, optimizer=c.optimizer
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
        rows = len(batch["input_ids"])
        yield {k: v[:count] for k, v in batch.items()}
        if (count := count - rows) <= 0:
            return


@dataclass(frozen=True)
class Found:
    """The point that a search recommends; ``history`` has the best value after each evaluation."""

    point: np.ndarray
    history: tuple[float, ...]


def minimize(
    function: Callable[[np.ndarray], float],
    size: int,
    *,
    bound: float,
    evaluations: int,
    seed: int = 0,
    optimizer: str = "NGOpt",
) -> Found:
    """Search the smallest ``function(point)`` by nevergrad, with every entry of the point (size,) within +-``bound``.

    It starts at zero; ``seed`` is for what an optimizer draws. The global random state is left alone. Raises
    ConfigError for an ``optimizer`` that nevergrad does not have.
    """
    history: list[float] = []

    def counted(point: np.ndarray) -> float:
        value = function(point)
        history.append(min([value, *history[-1:]]))
        return value

    with _alone():
        import nevergrad  # late: importing it takes seconds

        if optimizer not in nevergrad.optimizers.registry:
            near = difflib.get_close_matches(optimizer, nevergrad.optimizers.registry, n=3)
            raise ConfigError(
                f"optimizer={optimizer!r} is none of nevergrad's" + (f"; near are {near}" if near else "")
            )
        space = nevergrad.p.Array(init=np.zeros(size), lower=-bound, upper=bound)
        space.random_state = np.random.RandomState(seed)
        search = nevergrad.optimizers.registry[optimizer](parametrization=space, budget=evaluations)
        found = search.minimize(counted)
    return Found(found.value, tuple(history))


@contextmanager
def _alone() -> Iterator[None]:
    """Inside, NumPy's global generator may be drawn from and seeded, as nevergrad does; afterwards it is as before.
    There are no warnings, such as SciPy's about a tolerance that nevergrad gives it."""
    before = np.random.get_state()  # noqa: NPY002
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
