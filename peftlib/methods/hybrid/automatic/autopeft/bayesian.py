"""Bayesian optimization over a lattice, by BoTorch: which points may widen a Pareto set of two outcomes most."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence, Set

import torch
from botorch.acquisition.multi_objective import qNoisyExpectedHypervolumeImprovement
from botorch.exceptions.warnings import InputDataWarning, NumericsWarning
from botorch.fit import fit_fully_bayesian_model_nuts, fit_gpytorch_mll
from botorch.models import ModelListGP, SingleTaskGP
from botorch.models.fully_bayesian import SaasFullyBayesianSingleTaskGP
from botorch.models.map_saas import AdditiveMapSaasSingleTaskGP
from botorch.models.model import Model
from botorch.models.transforms import Standardize
from botorch.optim import optimize_acqf_discrete_local_search
from gpytorch.mlls import ExactMarginalLogLikelihood
from linear_operator.utils.warnings import NumericalWarning

POINT_ESTIMATES = {"gp": SingleTaskGP, "map_saas": AdditiveMapSaasSingleTaskGP}

STARTS = 10
"""Local searches for each new point."""

Point = tuple[int, ...]


def batch(
    points: Sequence[Point],
    outcomes: torch.Tensor,
    reference: torch.Tensor,
    start: Callable[[Set[Point]], Point],
    levels: Sequence[int],
    floors: Iterable[tuple[Iterable[int], int, int]],
    count: int,
    *,
    surrogate: str,
    copula: bool,
    nuts: dict[str, int],
    seed: int,
) -> list[Point]:
    """New points with the largest noisy expected hypervolume improvement, found by local search.

    Args:
        points: those tried so far, integers below ``levels``.
        outcomes: their two outcomes (n, 2), both to be large. Each is modelled by a Gaussian process.
        reference: the outcomes (2,) from which the hypervolume counts.
        start: gives a valid point, not in a set, from which to search.
        floors: constraints (coordinates, factor, least): factor times the coordinates' sum is at least that.
        count: how many new points.
        surrogate: "saas" (fully Bayesian, by the No-U-Turn sampler), or a name in ``POINT_ESTIMATES``.
        copula: whether the models see the outcomes as :func:`normal_quantiles`.
        nuts: ``warmup_steps``, ``num_samples`` and ``thinning`` of the sampler.
        seed: of all that is drawn.
    """
    scale = torch.tensor(levels, dtype=torch.float64) - 1
    x = torch.tensor(points, dtype=torch.float64) / scale
    if copula:
        outcomes, reference = normal_quantiles(outcomes, outcomes), normal_quantiles(reference[None], outcomes)[0]
    with torch.random.fork_rng([]), warnings.catch_warnings():
        # Kernels of points that lie close together get a small constant on their diagonal; quantiles of few outcomes
        # are not quite standardized; BoTorch would have the improvement's logarithm, the original has it as it is.
        for kind in (NumericalWarning, InputDataWarning, NumericsWarning):
            warnings.simplefilter("ignore", kind)
        torch.manual_seed(seed)
        transform = None if copula else Standardize(1)
        models = [_fitted(surrogate, x, y[:, None], transform, nuts, seed) for y in outcomes.T]
        improvement = qNoisyExpectedHypervolumeImprovement(
            model=ModelListGP(*models),
            ref_point=reference.tolist(),
            X_baseline=x,
            prune_baseline=True,
            cache_root=False,
        )
        constraints = []
        for coordinates, factor, least in floors:
            where = torch.tensor(list(coordinates))
            constraints.append((where, factor * scale[where], least - 1e-6))
        found: list[Point] = []
        for _ in range(count):
            avoid = {*points, *found}
            pending = torch.tensor(found, dtype=torch.float64).reshape(-1, len(levels)) / scale
            improvement.set_X_pending(pending if found else None)
            best, _ = optimize_acqf_discrete_local_search(
                improvement,
                discrete_choices=[torch.arange(n, dtype=torch.float64) / (n - 1) for n in levels],
                q=1,
                num_restarts=STARTS,
                batch_initial_conditions=torch.tensor([start(avoid) for _ in range(STARTS)], dtype=torch.float64)[
                    :, None
                ]
                / scale,
                inequality_constraints=constraints,
                X_avoid=torch.cat([x, pending]),
            )
            found.append(tuple(int(i) for i in (best[0] * scale).round().tolist()))
    return found


def normal_quantiles(values: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """For each outcome the quantile of a standard normal distribution at the share of ``seen`` outcomes (n, 2) that are
    at most ``values`` (m, 2); shares are kept within 1e-4 of 0 and 1."""
    share = (seen <= values[:, None]).double().mean(1)  # (m, n, 2) -> (m, 2)
    return torch.special.ndtri(share.clamp(1e-4, 1 - 1e-4))


def _fitted(
    surrogate: str, x: torch.Tensor, y: torch.Tensor, transform: Standardize | None, nuts: dict[str, int], seed: int
) -> Model:
    if surrogate == "saas":
        model = SaasFullyBayesianSingleTaskGP(x, y, outcome_transform=transform)
        fit_fully_bayesian_model_nuts(model, **nuts, disable_progbar=True, seed=seed)
        return model
    model = POINT_ESTIMATES[surrogate](x, y, outcome_transform=transform)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model
