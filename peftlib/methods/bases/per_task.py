"""What the methods share that have a part for each of several tasks. One task can be kept alone, and then merged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Protocol

from peftlib.errors import ConfigError, MergeError
from peftlib.methods.base import Method


class Part(Protocol):
    """A module or list with one piece for each task."""

    def __len__(self) -> int: ...

    def keep(self, task: int) -> None:
        """Drop every other task's piece."""


class PerTask(Method):
    """``task_parts()`` gives the parts, none where all rows belong to one task; ``each_task_has`` names them in
    errors."""

    each_task_has: ClassVar[str]

    def task_parts(self) -> Iterable[Part]:
        raise NotImplementedError

    @property
    def tasks(self) -> int:
        """How many tasks it serves now."""
        return next(map(len, self.task_parts()), 1)

    def keep(self, task: int) -> None:
        """Drop every other task for good; every row then belongs to this one. Do it after training, because an
        optimizer knows the old parameters."""
        if task not in range(self.tasks):
            raise ConfigError(f"task {task!r} is not here; choose one from 0 to {self.tasks - 1}")
        for part in self.task_parts():
            part.keep(task)
        self.host.tasks.count, self.host.tasks.default = None, 0

    def check_mergeable(self) -> None:
        if self.tasks > 1:
            raise MergeError(
                f"{self.name} has {self.each_task_has} for each of its {self.tasks} tasks, and a merged weight serves "
                "one: call adapted.method.keep(task) first"
            )
