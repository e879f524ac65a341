"""Warm-up training: a dense training inside a calibration, before a method chooses what it trains.

It has an optimizer of its own, which is dropped at the end. The global random state, the parameters' flags and the
model's mode are afterwards what they were before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeGuard

import torch
from rich.progress import track
from torch import nn

from peftlib.errors import DataError
from peftlib.mechanisms import importance
from peftlib.mechanisms.importance import Batch
from peftlib.mechanisms.schedules import Schedule

DEFAULT = Schedule("linear", 0.06)
"""A rise of the rate over the first 6 % of the steps, then a straight line down to 0."""


def train(
    model: nn.Module,
    groups: Iterable[dict[str, Any]],
    batches: Iterable[Batch],
    *,
    epochs: float,
    steps: int | None = None,
    schedule: Schedule = DEFAULT,
    max_norm: float = 1.0,
    seed: int = 0,
    what: str = "warm-up training",
    loss: Callable[[nn.Module, Batch], torch.Tensor] = importance.loss,
    after_step: Callable[[], None] = lambda: None,
) -> int:
    """AdamW on the groups' parameters, without weight decay; each group's gradient is cut to ``max_norm``.

    Args:
        groups: optimizer groups, ``{"params": [...], "lr": rate}``, with a ``"schedule"`` where that is another one.
        batches: with a length (a DataLoader): read anew each epoch; without: kept in memory.
        epochs: passes over the batches; ``steps`` overrides them.
        schedule: of the learning rates.
        seed: of dropout and of every other draw meanwhile.
        what: title of the progress bar.
        loss: the loss of a batch, by default the model's own.
        after_step: called after each step.

    Returns the number of steps. Raises DataError for batches without rows or labels, or a loss that is not finite.
    """
    batches = batches if sized(batches) else list(batches)
    if not len(batches):
        raise DataError("there is nothing to run the warm-up training on: the calibration batches are empty")
    total = steps if steps is not None else max(1, round(epochs * len(batches)))
    groups = [{"schedule": schedule, **group, "params": list(group["params"])} for group in groups]
    factors = [group.pop("schedule").over(total) for group in groups]
    parameters = [p for group in groups for p in group["params"]]
    flags = [p.requires_grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        with importance.in_training_mode(model, seed):
            for _, batch in zip(_shown(range(total), total, what), _forever(batches)):
                value = loss(model, batch)
                value.backward(inputs=parameters)
                for group in groups:
                    nn.utils.clip_grad_norm_(group["params"], max_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                after_step()
        if not bool(value.isfinite()):
            raise DataError(
                "the loss of the warm-up training is not finite; look at the labels, the precision and the rate"
            )
    finally:
        for parameter, flag in zip(parameters, flags):
            parameter.requires_grad_(flag)
            parameter.grad = None
    return total


def sized(batches: Iterable[Batch]) -> TypeGuard[Collection[Batch]]:
    """Whether the batches have a length, and can thus be read more than once."""
    try:
        len(batches)  # type: ignore[arg-type]  # whether it can be done is the question
    except TypeError:
        return False
    return True


def _forever(batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        yield from batches


def _shown(steps: range, total: int, what: str) -> Iterable[int]:
    return track(steps, what, total=total, transient=True, disable=not sys.stdout.isatty())
