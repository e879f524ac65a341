"""Several tasks in one: batches whose rows say which task they belong to."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset

from peftlib.errors import DataError
from peftlib.tasks.task import Task
from peftlib.tasks.text import fraction


def mix(tasks: Sequence[Task], *, temperature: float = 1.0, seed: int = 0) -> Task:
    """One task whose batches carry ``task_ids``: the position of each row's task in ``tasks``.

    The training split has as many rows as the tasks' have together. Task k fills a share of it in proportion to
    n_k ** (1 / temperature), n_k its training rows: 1 keeps the natural shares, a large temperature makes them equal. A
    task repeats its rows, or leaves the last ones out, to fill its share. Other splits hold every row of every task.

    The tasks must be of one kind. Classes keep their numbers, and the head has as many outputs as the largest task.
    """
    tasks = list(tasks)
    if not tasks:
        raise DataError("mix() needs at least one task")
    if len({task.kind for task in tasks}) > 1:
        raise DataError("tasks of different kinds do not mix: " + ", ".join(f"{t.name} is {t.kind}" for t in tasks))
    if len({task.name for task in tasks}) < len(tasks):
        raise DataError("mix() was given a task twice: " + ", ".join(task.name for task in tasks))
    if temperature <= 0:
        raise DataError(f"temperature={temperature} must be above 0")
    for task in tasks:
        if "train" not in task.splits or "label" not in task.splits["train"].column_names:
            raise DataError(f"task {task.name!r} has no labelled training split to mix")
    sizes = [len(task.splits["train"]) for task in tasks]
    train = []
    for number, (task, size) in enumerate(zip(tasks, _shares(sizes, temperature))):
        rows = _rows(task, "train", number)
        train += [(fraction(f"{number} {i}", f"mix {seed}"), rows[i % len(rows)]) for i in range(size)]
    splits = {"train": [row for _, row in sorted(train, key=lambda entry: entry[0])]}
    for split in tasks[0].splits:
        if split != "train" and all(split in task.splits for task in tasks):
            splits[split] = [row for number, task in enumerate(tasks) for row in _rows(task, split, number)]
    largest = max(tasks, key=lambda task: task.num_labels)
    shared = [metric for metric in tasks[0].metrics if all(metric in task.metrics for task in tasks)]
    if not shared:
        raise DataError("these tasks have no metric in common: " + ", ".join(t.name for t in tasks))
    return Task(
        name="+".join(task.name for task in tasks),
        kind=tasks[0].kind,
        splits={split: Dataset.from_list(rows) for split, rows in splits.items()},
        source="+".join(dict.fromkeys(task.source for task in tasks)),
        metrics=tuple(shared),
        label_names=largest.label_names,
        max_length=max(task.max_length for task in tasks),
        members=tuple(task.name for task in tasks),
    )


def _shares(sizes: Sequence[int], temperature: float) -> list[int]:
    """How many of sum(sizes) rows each task gets: at least one, rounded by largest remainder, exact in sum."""
    weights = [size ** (1 / temperature) for size in sizes]
    exact = [sum(sizes) * weight / sum(weights) for weight in weights]
    shares = [max(1, int(value)) for value in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda k: shares[k] - exact[k])
    for k in by_remainder[: max(0, sum(sizes) - sum(shares))]:
        shares[k] += 1
    return shares


def _rows(task: Task, split: str, number: int) -> list[dict]:
    pair = "text_pair" in task.text_columns
    return [
        {
            "text": row["text"],
            "text_pair": row["text_pair"] if pair else None,
            "label": row["label"],
            "task_id": number,
        }
        for row in task.splits[split]
    ]
