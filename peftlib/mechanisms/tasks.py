"""The tasks of a batch's rows: how ``task_ids`` reach the children of multi-task methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peftlib.errors import DataError
from peftlib.mechanisms.call import Kept, Local, in_backward
from peftlib.mechanisms.outputs import Args, Kwargs


class InModel(Local):
    """How many forwards of the model and of models inside it run in this thread; the task of rows that name none, and
    the tasks of the rows that ``generate()`` was given."""

    everywhere: int | None = None
    """The task, in every model and thread, of rows that name none and are not inside ``with adapted.task(i)``."""

    def __init__(self) -> None:
        self.depth = 0
        self.default: int | None = None
        self.generating: torch.Tensor | None = None


@contextmanager
def unnamed_rows(task: int) -> Iterator[None]:
    """Inside ``with``, rows that name no task are of this one, in every model and thread: for checks of any method."""
    before, InModel.everywhere = InModel.everywhere, task
    try:
        yield
    finally:
        InModel.everywhere = before


class Tasks:
    """Which task each row of the batch in the model belongs to. Children of multi-task methods ask it."""

    def __init__(self) -> None:
        self.count: int | None = None
        """How many tasks the method knows; None where it knows none, or one for all."""
        self._given = Kept()
        self._here = InModel()

    @property
    def default(self) -> int | None:
        """The task, in this thread, of rows that name none."""
        default = self._here.default
        return InModel.everywhere if default is None else default

    @default.setter
    def default(self, task: int | None) -> None:
        self._here.default = task

    def ids(self, rows: int, device: torch.device) -> torch.Tensor:
        """Task numbers (rows,): the batch's ``task_ids``, else the default for every row.

        A part of the model that works on a multiple of the batch's rows (beams, tokens) gets them repeated.
        """
        given = self._now(rows, device)
        return given.repeat_interleave(rows // len(given))

    def grouped(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (rows, ..., n) as (groups, tokens, n), and the one task of each group, (groups,)."""
        given = self._now(len(x), x.device)
        return x.reshape(len(given), -1, x.shape[-1]), given

    def _now(self, rows: int, device: torch.device) -> torch.Tensor:
        """The tasks of equal parts of the rows: the batch's during a forward and where a backward pass repeats a part
        of it, or those that ``generate()`` was given."""
        inside = self._here.depth > 0 or torch.compiler.is_compiling() or in_backward()
        given = self._given.get() if inside else None
        if given is None:
            given = self._unnamed()
        given = given.to(device)
        if rows % len(given):
            raise DataError(f"the batch has {len(given)} task_ids, which do not fit {rows} rows")
        return given

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

    def _unnamed(self) -> torch.Tensor:
        """The tasks of rows without ``task_ids``. Raises DataError where there are several and nothing says which."""
        here = self._here
        if here.generating is not None:
            return here.generating
        if self.default is None and (self.count or 1) > 1:
            raise DataError(
                f"this adapter serves {self.count} tasks, and nothing says which one these rows are of: give task_ids "
                "(rows,) beside the model's inputs (transformers.Trainer drops that column unless its arguments have "
                "remove_unused_columns=False), or run inside `with adapted.task(number)`"
            )
        return torch.full((1,), self.default or 0)

    def enter(self, ids: torch.Tensor | None) -> None:
        """A forward begins; one inside another has the other's tasks."""
        self._here.depth += 1
        if ids is not None and not torch.compiler.is_compiling():
            self.check(ids)
        if ids is not None or self._here.depth == 1:
            self._given.set(self._unnamed() if ids is None else ids)

    def leave(self) -> None:
        self._here.depth -= 1

    @contextmanager
    def generating(self, ids: torch.Tensor | None) -> Iterator[None]:
        """Inside ``with``, rows have these tasks where a forward has no ``task_ids``."""
        if ids is not None:
            self.check(ids)
        self._here.generating = ids
        try:
            yield
        finally:
            self._here.generating = None


def enter_model(tasks: Tasks, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    kwargs = dict(kwargs)
    tasks.enter(kwargs.pop("task_ids", None))
    return args, kwargs


def leave_model(tasks: Tasks, module: nn.Module) -> None:
    tasks.leave()


def generate_with_tasks(tasks: Tasks, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In the place of ``generate(...)``: ``task_ids`` (rows,) hold for all its forwards and beams."""
    with tasks.generating(kwargs.pop("task_ids", None)):
        return generate(*args, **kwargs)
