"""Learning-rate schedules: transformers' own, by their names."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any

import torch

from peftlib.errors import ConfigError, UnknownNameError


def scheduler(
    name: str, optimizer: torch.optim.Optimizer, warmup_steps: int, total: int, options: dict[str, Any] | None = None
) -> Any:
    """The schedule of this name over ``total`` steps, in the first ``warmup_steps`` of which the rate rises from 0."""
    return _optimization().get_scheduler(name, optimizer, warmup_steps, total, options)


def check(name: str, options: dict[str, Any] | None) -> None:
    """Raise UnknownNameError for a schedule that does not exist, ConfigError for options that it does not take."""
    # These two follow a metric, which a step of the project's loop does not have.
    kinds = _optimization().SchedulerType
    known = [kind.value for kind in kinds if kind.value not in ("reduce_lr_on_plateau", "greedy")]
    if name not in known:
        raise UnknownNameError("schedule", name, known)
    try:
        scheduler(name, torch.optim.SGD([torch.zeros(1)], lr=1.0), 0, 1, options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"schedule_options={options!r} do not fit the schedule {name!r}: {error}") from error


def _optimization() -> ModuleType:
    # Imported late: it brings in transformers' Trainer and the optional packages that know it. One of them,
    # bitsandbytes, logs that a CPU kernel which nothing here uses is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import transformers

    return transformers
