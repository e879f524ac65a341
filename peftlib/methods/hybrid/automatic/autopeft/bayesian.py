"""Bayesian optimization over a lattice, by BoTorch: which points may widen a Pareto set of two outcomes most."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.deterministic import GenericDeterministicModel
from botorch.models.map_saas import AdditiveMapSaasSingleTaskGP
from botorch.models.model import ModelList
from botorch.optim import optimize_acqf_discrete_local_search
from gpytorch.mlls import ExactMarginalLogLikelihood
from linear_operator.utils.warnings import NumericalWarning

SURROGATES = {"gp": SingleTaskGP, "saas": AdditiveMapSaasSingleTaskGP}

Point = tuple[int, ...]


def batch(
    points: Sequence[Point],
    scores: Sequence[float],
    thrift: Callable[[torch.Tensor], torch.Tensor],
    levels: Sequence[int],
    floors: Iterable[tuple[Iterable[int], int, int]],
    count: int,
    surrogate: str,
    seed: int,
) -> list[Point]:
    """New points with the largest noisy expected hypervolume improvement, in logarithms, found by local search.

    Args:
        points: those tried so far, integers below ``levels``.
        scores: the first outcome of each, noisy, which is modelled by a Gaussian process.
        thrift: the second outcome, which is known: (..., coordinates) -> (...).
        floors: constraints (coordinates, factor, least): factor times the coordinates' sum is at least that.
        count: how many new points.
        surrogate: a name in ``SURROGATES``.
        seed: of all that is drawn.

    Both outcomes are to be large, and count from 0 on.
    """
    scale = torch.tensor(levels, dtype=torch.float64) - 1
    x = torch.tensor(points, dtype=torch.float64) / scale
    y = torch.tensor(scores, dtype=torch.float64)[:, None]
    with torch.random.fork_rng([]), warnings.catch_warnings():
        # Kernels of points that lie close together get a small constant on their diagonal.
        warnings.simplefilter("ignore", NumericalWarning)
        torch.manual_seed(seed)
        score = SURROGATES[surrogate](x, y)
        fit_gpytorch_mll(ExactMarginalLogLikelihood(score.likelihood, score))
        improvement = qLogNoisyExpectedHypervolumeImprovement(
            model=ModelList(score, GenericDeterministicModel(lambda z: thrift(z * scale)[..., None])),
            ref_point=[0.0, 0.0],
            X_baseline=x,
            prune_baseline=True,
            cache_root=False,
        )
        constraints = []
        for coordinates, factor, least in floors:
            where = torch.tensor(list(coordinates))
            constraints.append((where, factor * scale[where], least - 1e-6))
        found, _ = optimize_acqf_discrete_local_search(
            improvement,
            discrete_choices=[torch.arange(n, dtype=torch.float64) / (n - 1) for n in levels],
            q=count,
            num_restarts=5,
            raw_samples=256,
            inequality_constraints=constraints,
            X_avoid=x,
        )
    return [tuple(int(i) for i in row) for row in (found * scale).round().tolist()]
