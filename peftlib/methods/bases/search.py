"""What a search over a method's structures is: what a method says in ``structure_search``.

A structure is a choice of the method's options, scored by a training run of its own. Which structures there are, and
which to train next, is said here; :mod:`peftlib.experiments` does the runs and keeps their results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from peftlib.anatomy import Anatomy

Point = tuple[int, ...]
"""A structure as a point of its space."""


@dataclass(frozen=True)
class ListedStructures:
    """The structures are known before the first training, so that several runs can go at a time. The fields of a
    subclass are the settings of a search."""

    trials: ClassVar[int] = 24
    """How many structures to compare with, where the caller does not say."""

    def structures(self, options: dict[str, Any], count: int) -> list[dict[str, Any]]:
        """The method's options in each run of one seed, with ``count`` structures to compare with. ``options`` are
        those that the caller sets."""
        raise NotImplementedError


@dataclass(frozen=True)
class ProposedStructures:
    """Structures are proposed one after the other, from the scores of those before. The fields of a subclass, JSON
    values, are the settings of a search."""

    space_type: ClassVar[type]
    """What holds the structures of one backbone: a frozen dataclass of JSON values, whose ``options(point)`` are the
    method's options for a point."""
    strategy: str
    """How they are proposed; a part of the name of the log."""
    trials: ClassVar[int] = 24
    """How many trainings a search has, where the caller does not say."""

    def space(self, parts: Anatomy, backbone: str) -> Any:
        """The ``space_type`` of a backbone. Raises UnsupportedError for a backbone that has none."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Import what takes seconds, before the time of a proposal is measured."""

    def propose(
        self, space: Any, points: Sequence[Point], scores: Sequence[float], seed: int
    ) -> tuple[list[Point], str]:
        """The next points to try, none of them twice, and who proposes them. It depends on the arguments alone: a
        search that was cut off goes on with the same proposals."""
        raise NotImplementedError

    def pareto(self, space: Any, points: Sequence[Point], scores: Sequence[float]) -> list[int]:
        """The positions of the points that no other point beats in score and size, by rising size."""
        raise NotImplementedError

    def hypervolume(
        self, space: Any, points: Sequence[Point], scores: Sequence[float], measured: Sequence[float] | None = None
    ) -> float:
        """The share, 0 to 1, of all pairs of score and size that the Pareto set dominates; with ``measured`` scores,
        such as those on test data, the share of these that the set by ``scores`` dominates."""
        raise NotImplementedError
