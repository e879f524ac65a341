"""Learning-rate schedules, and the stages of a training that each have one.

A schedule is transformers' own, by its name. A method whose training has stages (:meth:`Method.stages`) starts the
schedule anew in each: warm-up, full rate, decay.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

from peftlib.errors import ConfigError, UnknownNameError

Factor = Callable[[int], float]
"""By which the learning rate is multiplied at a step, counted from 0."""


@dataclass(frozen=True)
class Schedule:
    """How the learning rate goes over a training of any length.

    ``name`` is one of transformers' ``get_scheduler``; ``warmup`` is the share of the steps in which the rate rises
    linearly from 0, or, from 1 on, their number; ``options`` are what the schedule takes beside them, such as
    ``{"num_cycles": 2}`` of "cosine_with_restarts". ``rate`` is the optimizer's learning rate, for those that go down
    to a rate that is given as such.
    """

    name: str = "constant"
    warmup: float = 0.0
    options: dict[str, Any] | None = field(default=None, hash=False)
    rate: float = 1.0

    def warmup_steps(self, steps: int) -> int:
        """In how many of so many steps the rate rises."""
        return round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)

    def over(self, steps: int, warmup_steps: int | None = None) -> Factor:
        """The factor by step of a training of so many steps; ``warmup_steps`` replaces the schedule's own."""
        rising = self.warmup_steps(steps) if warmup_steps is None else warmup_steps
        return _factor(self.name, rising, steps, json.dumps(self.options), self.rate)

    def check(self) -> None:
        """Raise UnknownNameError for a schedule that does not exist, ConfigError for options that it does not take."""
        # These two follow a metric, which a step of the project's loop does not have.
        kinds = _transformers().SchedulerType
        known = [kind.value for kind in kinds if kind.value not in ("reduce_lr_on_plateau", "greedy")]
        if self.name not in known:
            raise UnknownNameError("schedule", self.name, known)
        try:
            self.over(1, 0)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"schedule_options={self.options!r} do not fit the schedule {self.name!r}: {error}"
            ) from error


@dataclass(frozen=True)
class Stage:
    """A part of a training with a learning-rate schedule of its own: ``steps`` of them, by ``schedule`` or, without
    one, by that of the whole training."""

    title: str
    steps: int
    schedule: Schedule | None = None


def current(stages: Sequence[Stage], step: int) -> tuple[Stage, int]:
    """The stage of a step, and the step at which it began."""
    start = 0
    for stage in stages:
        if step < start + stage.steps:
            break
        start += stage.steps
    else:
        start -= stage.steps  # after the last step
    return stage, start


def staged(schedule: Schedule, stages: Sequence[Stage]) -> Factor:
    """The factor by step of a training in stages."""

    def factor(step: int) -> float:
        stage, start = current(stages, step)
        return (stage.schedule or schedule).over(stage.steps)(step - start)

    return factor


@lru_cache(maxsize=256)
def _factor(name: str, warmup_steps: int, steps: int, options: str, rate: float) -> Factor:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
    made = _transformers().get_scheduler(name, optimizer, warmup_steps, steps, json.loads(options))
    return made.lr_lambdas[0]


def _transformers() -> ModuleType:
    # Imported late: it brings in transformers' Trainer and the optional packages that know it. One of them,
    # bitsandbytes, logs that a CPU kernel which nothing here uses is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import transformers

    return transformers
