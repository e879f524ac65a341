"""Search without gradients: the evolution strategy CMA-ES in a box."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Found:
    """The best point of a search and its value; ``history`` has the best value after each evaluation."""

    point: np.ndarray
    value: float
    history: tuple[float, ...]


def minimize(
    function: Callable[[np.ndarray], float], size: int, *, bound: float, evaluations: int, spread: float, seed: int
) -> Found:
    """Look for the smallest ``function(point)`` with every entry of the point (size,) within +-``bound``.

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
