"""AutoPEFT's search: the space of structures, what is tried next, and what makes a set of structures good.

A trial has a point, which is a structure, and a score; a good structure has a high score and few parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from peftlib.anatomy import Anatomy
from peftlib.errors import UnsupportedError
from peftlib.methods.base import at_least, one_of
from peftlib.methods.bases.search import Point, ProposedStructures

STRATEGIES = ("bayesian", "random")
SURROGATES = ("gp", "saas")


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
        """Stored parameters without the task head, (...), of points (..., 3 + layers); those of the MLP that makes prefixes
        in training do not count, as in the original."""
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
    """How structures are proposed.

    Args:
        strategy: "bayesian", or "random".
        initial: random trials before the first model; ``batch``: trials that are proposed together.
        reference: the score that counts for nothing, 0.5 for two balanced classes.
        surrogate: model of the score: "gp" (Matern or squared-exponential kernel with a length scale a dimension, as
            BoTorch has it) or "saas" (priors for few dimensions that matter, at their most probable values).

    Two searches of one seed have the same first trials.
    """

    strategy: Literal["bayesian", "random"] = "bayesian"
    initial: int = 8
    batch: int = 2
    reference: float = 0.5
    surrogate: Literal["gp", "saas"] = "gp"

    space_type: ClassVar = Space

    def __post_init__(self):
        one_of("strategy", self.strategy, STRATEGIES)
        one_of("surrogate", self.surrogate, SURROGATES)
        at_least("initial", self.initial, 2)
        at_least("batch", self.batch, 1)

    def space(self, parts: Anatomy, backbone: str) -> Space:
        if parts.stacks != ("encoder",):
            raise UnsupportedError(
                f"the space of structures is that of encoders, and {backbone} has {', '.join(parts.stacks)}"
            )
        return Space(parts.d, parts.num_layers)

    def prepare(self) -> None:
        if self.strategy == "bayesian":
            _bayesian()

    def propose(
        self, space: Space, points: Sequence[Point], scores: Sequence[float], seed: int
    ) -> tuple[list[Point], str]:
        done, seen = len(points), set(points)
        if self.strategy == "random" or done < self.initial:
            generator = np.random.default_rng([seed, done])
            return [next(p for p in iter(lambda: space.sample(generator), None) if p not in seen)], "random"
        # A batch that was cut off is proposed again from what was known before it.
        known = done - (done - self.initial) % self.batch
        found = _bayesian().batch(
            points[:known],
            [height(score, self.reference) for score in scores[:known]],
            space.thrift,
            levels=[len(space.sizes)] * 3 + [2] * space.layers,
            # Something must be on: one layer, and one size other than 0, which is the last.
            floors=[(range(3, 3 + space.layers), 1, 1), (range(3), -1, 1 - 3 * (len(space.sizes) - 1))],
            count=self.batch,
            surrogate=self.surrogate,
            seed=1000 * seed + known,
        )
        return found[done - known :], self.surrogate

    def pareto(self, space: Space, points: Sequence[Point], scores: Sequence[float]) -> list[int]:
        return pareto(space, points, scores)

    def hypervolume(
        self, space: Space, points: Sequence[Point], scores: Sequence[float], measured: Sequence[float] | None = None
    ) -> float:
        return hypervolume(space, points, scores, self.reference, measured)


def _bayesian() -> ModuleType:
    """The module that needs BoTorch, which is an extra and takes seconds to import."""
    try:
        from peftlib.methods.hybrid.automatic.autopeft import bayesian
    except ImportError as error:
        raise UnsupportedError(
            'a bayesian search needs botorch: pip install "peftlib[search]", or use strategy="random"'
        ) from error
    return bayesian
