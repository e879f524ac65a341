"""Searching what to train by pruning: a change of all parameters is trained for a while, and the part of it that
matters least to the loss, to first order, is set back, in one round or in several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from peftlib.mechanisms import importance, warmup
from peftlib.mechanisms.importance import Batch
from peftlib.mechanisms.sparse import top_entries

Choose = Callable[[list[torch.Tensor], list[torch.Tensor], int], list[torch.Tensor]]
"""From signed scores (:func:`peftlib.mechanisms.importance.first_order`), masks of what is left and a smaller budget to
masks of what stays."""


def search(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Iterable[Batch],
    budget: int,
    choose: Choose,
    *,
    rate: float,
    epochs: float,
    steps: int | None = None,
    rounds: int = 1,
    limit: int | None = None,
    beside: Iterable[nn.Parameter] = (),
    seed: int = 0,
    what: str = "searching what to train",
) -> list[torch.Tensor]:
    """Masks of the ``budget`` entries that stay. Everything has its values of before again when this returns.

    Each of ``rounds`` trains what is left for its part of ``epochs`` (or ``steps``), scores the change on the batches
    (at most ``limit``) and sets back what ``choose`` leaves out; the entries left fall in equal ratios to ``budget``.
    ``beside`` are trained along, such as a task head, and not pruned.
    """
    parameters, beside = list(parameters), list(beside)
    batches = batches if warmup.sized(batches) else list(batches)
    starts = [p.detach().clone() for p in (*parameters, *beside)]
    masks = [torch.ones_like(p, dtype=torch.bool) for p in parameters]
    total = sum(p.numel() for p in parameters)

    @torch.no_grad()
    def set_back() -> None:
        for parameter, mask, start in zip(parameters, masks, starts):
            parameter.copy_(torch.where(mask, parameter, start))

    for round_ in range(1, rounds + 1):
        warmup.train(
            model,
            [{"params": [*parameters, *beside], "lr": rate}],
            batches,
            epochs=epochs / rounds,
            steps=None if steps is None else math.ceil(steps / rounds),
            seed=seed + round_,
            what=f"{what}, round {round_} of {rounds}",
            after_step=set_back,
        )
        scores = importance.first_order(model, parameters, batches, limit, starts[: len(parameters)])
        left = budget if round_ == rounds else round(total * (budget / total) ** (round_ / rounds))
        masks = choose(scores, masks, left)
        set_back()
    with torch.no_grad():
        for parameter, start in zip((*parameters, *beside), starts):
            parameter.copy_(start)
    return masks


def entries(scores: list[torch.Tensor], masks: list[torch.Tensor], budget: int) -> list[torch.Tensor]:
    """A choice for :func:`search`: the entries with the largest absolute scores, whatever tensor they are in."""
    # What is left comes before what is out, also where its score is zero.
    sizes = [torch.where(mask, score.abs() + 1e-30, 0) for score, mask in zip(scores, masks)]
    chosen = [torch.zeros_like(mask) for mask in masks]
    for mask, indices in zip(chosen, top_entries(sizes, budget)):
        mask.view(-1)[indices] = True
    return chosen


def best_groups(scores: Sequence[float], sizes: Sequence[int], budget: int) -> list[int]:
    """The groups with the largest sum of scores among those whose sizes add up to ``budget`` exactly.

    By dynamic programming over sizes in units of their greatest common divisor. Among equals, the first ones. Raises
    ValueError where no groups have that size together; :func:`reachable` says which have.
    """
    unit = math.gcd(budget, *sizes)
    sizes, room = [size // unit for size in sizes], budget // unit
    best = torch.full((room + 1,), -torch.inf, dtype=torch.float64)
    best[0] = 0
    taken = torch.zeros(len(sizes), room + 1, dtype=torch.bool)
    # From the last to the first, so that the way back meets the first ones first.
    for i in reversed(range(len(sizes))):
        if sizes[i] <= room:
            with_it = torch.full_like(best, -torch.inf)
            with_it[sizes[i] :] = best[: room + 1 - sizes[i]] + scores[i]
            taken[i] = (with_it >= best) & with_it.isfinite()
            best = torch.where(taken[i], with_it, best)
    if not best[room].isfinite():
        raise ValueError(f"no groups of these sizes add up to {budget}")
    chosen = []
    for i in range(len(sizes)):
        if taken[i, room]:
            chosen.append(i)
            room -= sizes[i]
    return chosen


def reachable(sizes: Iterable[int], most: int) -> int:
    """The largest number up to ``most`` that some of the sizes add up to."""
    sums = 1
    for size in sizes:
        sums |= sums << size
    return (sums & ((1 << (most + 1)) - 1)).bit_length() - 1
