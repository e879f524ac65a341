"""The tasks of a batch's rows: how ``task_ids`` reach the children of multi-task methods."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftlib.errors import DataError
from peftlib.mechanisms.outputs import Args, Kwargs


class Tasks:
    """Which task each row of the batch in the model belongs to. Children of multi-task methods ask it."""

    def __init__(self) -> None:
        self.given: torch.Tensor | None = None
        self.running = False
        self.default: int | None = None
        self.count: int | None = None
        """How many tasks the method knows; None where it knows none, or one for all."""

    def ids(self, rows: int, device: torch.device) -> torch.Tensor:
        """Task numbers (rows,): the batch's ``task_ids``, else the default for every row.

        A part of the model that works on a multiple of the batch's rows (beams, tokens) gets them repeated.
        """
        given = self._given(rows, device)
        return given.repeat_interleave(rows // len(given))

    def grouped(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (rows, ..., n) as (groups, tokens, n), and the one task of each group, (groups,)."""
        given = self._given(len(x), x.device)
        return x.reshape(len(given), -1, x.shape[-1]), given

    def _given(self, rows: int, device: torch.device) -> torch.Tensor:
        """The tasks of equal parts of the rows. The batch's count during the model's forward and where checkpointing
        repeats a part of it; an encoder that ``generate()`` runs on its own belongs to the default task."""
        if self.given is None or not (self.running or torch.is_grad_enabled()):
            return torch.full((1,), self._unnamed(), device=device)
        given = self.given.to(device)
        if rows % len(given):
            raise DataError(f"the batch has {len(given)} task_ids, which do not fit {rows} rows")
        return given

    def _unnamed(self) -> int:
        """The task of rows that name none. Raises DataError where there are several and nothing says which."""
        if self.default is None and (self.count or 1) > 1:
            raise DataError(
                f"this adapter serves {self.count} tasks, and nothing says which one these rows are of: give task_ids "
                "(rows,) beside the model's inputs (transformers.Trainer drops that column unless its arguments have "
                "remove_unused_columns=False), or run inside `with adapted.task(number)`"
            )
        return self.default or 0

    def check(self, ids: torch.Tensor | int) -> None:
        """Raise DataError for a task that the method does not know."""
        if self.count is None:
            return
        ids = torch.as_tensor(ids)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.count:
            wrong = low if low < 0 else high
            raise DataError(
                f"task {wrong} is not one of this adapter's tasks, 0 to {self.count - 1}; attach it with tasks=..."
            )


def take_task_ids(tasks: Tasks, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    tasks.given, tasks.running = kwargs.pop("task_ids", None), True
    if tasks.given is not None and not torch.compiler.is_compiling():
        tasks.check(tasks.given)
    return args, kwargs


def leave_model(tasks: Tasks, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
    tasks.running = False
