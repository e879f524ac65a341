"""AutoPEFT's search: the space of structures, what is tried next, and what makes a set of structures good.

A trial has a point, which is a structure, and a score; a good structure has a high score and few parameters.

As in the original's code: of 200 trials 100 are random, then four at a time have the largest noisy expected
hypervolume improvement under Gaussian processes of score and size, whose sparse axis-aligned priors are sampled by
NUTS, on outcomes that a copula transform has made normal. Where we differ: no structure is tried twice; the local
searches for the improvement, from neighbours of the Pareto set, look at all neighbours of a point (the code: at random
ones, 2,000 in all).
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from types import ModuleType
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from peftlib.anatomy import Anatomy
from peftlib.errors import UnsupportedError
from peftlib.methods.base import at_least, between, one_of
from peftlib.methods.bases.search import Point, ProposedStructures

STRATEGIES = ("bayesian", "random")
SURROGATES = ("saas", "map_saas", "gp")


@dataclass(frozen=True)
class Space:
    """AutoPEFT's structures on an encoder of width ``d``.

    A point is the indices of three sizes (serial, parallel, length) in :attr:`sizes` and one bit a layer.
    """

    d: int
    layers: int

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """d, d / 2, d / 4, ..., 1, 0, rounded down."""
        return (*(self.d >> k for k in range(self.d.bit_length())), 0)

    def options(self, point: Point) -> dict[str, Any]:
        """A point as options of ``autopeft``."""
        serial, parallel, length = (self.sizes[i] for i in point[:3])
        return {"serial": serial, "parallel": parallel, "length": length, "layers": list(point[3:])}

    def parameters(self, points: torch.Tensor) -> torch.Tensor:
        """Stored parameters without the task head, (...), of points (..., 3 + layers); those of the MLP that makes
        prefixes in training do not count, as in the original."""
        chosen = torch.tensor(self.sizes, dtype=torch.float64)[points[..., :3].round().long()]  # (..., 3)
        adapters, length = chosen[..., :2], chosen[..., 2]  # (..., 2), (...)
        one = ((2 * self.d + 1) * adapters + self.d * (adapters > 0)).sum(-1) + 2 * self.d * length  # (...)
        return points[..., 3:].round().sum(-1) * one  # (...)

    def valid(self, point: Point) -> bool:
        """Whether the structure has anything to train."""
        return any(point[3:]) and any(self.sizes[i] for i in point[:3])

    def sample(self, generator: np.random.Generator) -> Point:
        """A valid point, uniformly."""
        while True:
            sizes = generator.integers(len(self.sizes), size=3)
            point = tuple(int(i) for i in (*sizes, *generator.integers(2, size=self.layers)))
            if self.valid(point):
                return point

    def neighbour(self, point: Point, generator: np.random.Generator) -> Point:
        """A valid point that differs from this one in one coordinate, uniformly."""
        while True:
            i = int(generator.integers(len(point)))
            levels = len(self.sizes) if i < 3 else 2
            other = (*point[:i], int((point[i] + 1 + generator.integers(levels - 1)) % levels), *point[i + 1 :])
            if self.valid(other):
                return other

    def thrift(self, points: torch.Tensor) -> torch.Tensor:
        """How few parameters points have, on a log scale: 1 for the smallest structure, 0 for the largest."""
        most = self.parameters(torch.tensor([0, 0, 0] + self.layers * [1])).log()
        least = math.log(2 * self.d)  # a prefix of one position in one layer
        return (most - self.parameters(points).clamp(min=1).log()) / (most - least)


def pareto(space: Space, points: Sequence[Point], scores: Sequence[float]) -> list[int]:
    """The positions of the trials that no other beats in score and size, by rising size; of equal ones the first."""
    sizes = [float(space.parameters(torch.tensor(point))) for point in points]
    best, kept = -math.inf, []
    for i in sorted(range(len(points)), key=lambda i: (sizes[i], -scores[i])):
        if scores[i] > best:
            best = scores[i]
            kept.append(i)
    return kept


def hypervolume(
    space: Space,
    points: Sequence[Point],
    scores: Sequence[float],
    reference: float,
    measured: Sequence[float] | None = None,
) -> float:
    """The share of the space of outcomes that the Pareto set of these trials dominates, in 0 to 1.

    The outcomes are the score from the reference to 1 and the number of parameters, on a log scale, from the largest
    structure to the smallest. With ``measured`` the heights are those scores, of the set that ``scores`` give.
    """
    measured = scores if measured is None else measured
    volume, reached = 0.0, 0.0
    for i in pareto(space, points, scores):
        h = max(0.0, height(measured[i], reference))
        width = float(space.thrift(torch.tensor(points[i])))
        # By rising size, widths fall: a trial adds the strip by which it is higher than all smaller ones.
        volume += max(0.0, h - reached) * width
        reached = max(reached, h)
    return volume


def height(score: float, reference: float) -> float:
    """A score from the reference, 0, to the best possible, 1."""
    return (score - reference) / (1 - reference)


@dataclass(frozen=True)
class AutoPEFTSearch(ProposedStructures):
    """How structures are proposed; the defaults are those of the original's code, for 200 trials.

    Args:
        strategy: "bayesian", or "random".
        initial: random trials before the first model; ``batch``: trials that are proposed together.
        reference: the score that counts for nothing, 0.5 for two balanced classes (the code: 0.7 for all its tasks, to
            be set by a few random trials); ``most``: the number of parameters that does, as a share of the largest
            structure's (the code's 26 % of BERT-base are two thirds).
        surrogate: model of score and size: "saas" (Gaussian processes with priors for few dimensions that matter, fully
            Bayesian), "map_saas" (these priors, at the most probable values) or "gp" (as BoTorch has it: a length scale
            a dimension).
        copula: the models see the outcomes as a normal distribution's quantiles at their ranks, not standardized.
        warmup, samples, thinning: steps of the No-U-Turn sampler before it counts, those that do, and of how many one
            is kept.

    Two searches of one seed have the same first trials.
    """

    strategy: Literal["bayesian", "random"] = "bayesian"
    initial: int = 100
    batch: int = 4
    reference: float = 0.5
    most: float = 0.67
    surrogate: Literal["saas", "map_saas", "gp"] = "saas"
    copula: bool = True
    warmup: int = 128
    samples: int = 64
    thinning: int = 4

    trials: ClassVar = 200
    space_type: ClassVar = Space

    def __post_init__(self):
        one_of("strategy", self.strategy, STRATEGIES)
        one_of("surrogate", self.surrogate, SURROGATES)
        at_least("initial", self.initial, 2)
        between("most", self.most, 0, 1)
        for name in ("batch", "warmup", "samples", "thinning"):
            at_least(name, getattr(self, name), 1)

    def space(self, parts: Anatomy, backbone: str) -> Space:
        if parts.stacks != ("encoder",):
            raise UnsupportedError(
                f"the space of structures is that of encoders, and {backbone} has {', '.join(parts.stacks)}"
            )
        return Space(parts.d, parts.num_layers)

    def prepare(self) -> None:
        if self.strategy == "bayesian":
            _bayesian(self.surrogate)

    def propose(
        self, space: Space, points: Sequence[Point], scores: Sequence[float], seed: int
    ) -> tuple[list[Point], str]:
        done, seen = len(points), set(points)
        if self.strategy == "random" or done < self.initial:
            generator = np.random.default_rng([seed, done])
            return [next(p for p in iter(lambda: space.sample(generator), None) if p not in seen)], "random"
        # A batch that was cut off is proposed again from what was known before it.
        known = done - (done - self.initial) % self.batch
        tried = list(points[:known])
        generator = np.random.default_rng([seed, known, 1])
        best = [tried[i] for i in pareto(space, tried, scores[:known])]
        sizes = space.parameters(torch.tensor(tried))
        largest = float(space.parameters(torch.tensor([0, 0, 0] + space.layers * [1])))

        def start(avoid: Set[Point]) -> Point:
            """A neighbour of one of the best trials; a random structure where all of those seem to be known."""
            near = (space.neighbour(best[generator.integers(len(best))], generator) for _ in range(100))
            far = iter(lambda: space.sample(generator), None)
            return next(point for point in chain(near, far) if point not in avoid)

        found = _bayesian(self.surrogate).batch(
            tried,
            torch.stack([torch.tensor(scores[:known], dtype=torch.float64), -sizes], dim=1),  # (n, 2)
            torch.tensor([self.reference, -self.most * largest], dtype=torch.float64),
            start,
            levels=[len(space.sizes)] * 3 + [2] * space.layers,
            # Something must be on: one layer, and one size other than 0, which is the last.
            floors=[(range(3, 3 + space.layers), 1, 1), (range(3), -1, 1 - 3 * (len(space.sizes) - 1))],
            count=self.batch,
            surrogate=self.surrogate,
            copula=self.copula,
            nuts={"warmup_steps": self.warmup, "num_samples": self.samples, "thinning": self.thinning},
            seed=1000 * seed + known,
        )
        return found[done - known :], self.surrogate

    def pareto(self, space: Space, points: Sequence[Point], scores: Sequence[float]) -> list[int]:
        return pareto(space, points, scores)

    def hypervolume(
        self, space: Space, points: Sequence[Point], scores: Sequence[float], measured: Sequence[float] | None = None
    ) -> float:
        return hypervolume(space, points, scores, self.reference, measured)


def _bayesian(surrogate: str) -> ModuleType:
    """The module that needs BoTorch, which is an extra and takes seconds to import."""
    try:
        from peftlib.methods.hybrid.automatic.autopeft import bayesian

        if surrogate == "saas":
            import numpyro  # noqa: F401 - BoTorch samples with it
    except ImportError as error:
        raise UnsupportedError(
            f'a bayesian search needs {error.name}: pip install "peftlib[search]", or use strategy="random"'
        ) from error
    return bayesian
