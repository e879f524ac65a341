"""Rows that people bring along: columns that a task can use, or a DataError that names row and column."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from datasets import ClassLabel, Dataset

from peftlib.errors import DataError


def splits(task: str, given: Any) -> dict[str, dict[str, list[Any]]]:
    """Split -> column -> values, from data sets, frames or lists of dictionaries by split. Raises DataError for
    anything else, and for a split without rows."""
    if not isinstance(given, Mapping):
        raise DataError(
            f'task {task!r}: rows are given by split, as {{"train": rows, "test": rows}}, and a '
            f"{type(given).__name__} was given"
        )
    return {split: _columns(f"task {task!r}: split {split!r}", rows) for split, rows in given.items()}


def _columns(where: str, rows: Any) -> dict[str, list[Any]]:
    if isinstance(rows, Dataset):
        columns = {name: list(rows[name]) for name in rows.column_names}
    elif isinstance(rows, pd.DataFrame):
        columns = {str(name): rows[name].tolist() for name in rows.columns}
    else:
        if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
            raise DataError(
                f"{where} is a {type(rows).__name__}; give a list of dictionaries, a datasets.Dataset or a "
                'pandas.DataFrame (a file: datasets.load_dataset("json", data_files=...) and the like)'
            )
        rows = list(rows)
        other = next((i for i, row in enumerate(rows) if not isinstance(row, Mapping)), None)
        if other is not None:
            raise DataError(f"{where} has a {type(rows[other]).__name__} as row {other}; give a dictionary a row")
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row.get(name) for row in rows] for name in names}
    if not any(map(len, columns.values())):
        raise DataError(f"{where} is empty")
    return columns


def class_names(given: Mapping[str, Any], column: str | None) -> tuple[str, ...]:
    """The names of the classes where a data set knows them."""
    features = (rows.features.get(column) for rows in given.values() if isinstance(rows, Dataset))
    return next((tuple(f.names) for f in features if isinstance(f, ClassLabel)), ())


@dataclass(frozen=True)
class Column:
    """One column of one split; its methods give the values as a task has them."""

    task: str
    split: str
    name: str
    values: list[Any]

    def texts(self) -> list[str]:
        for row, value in enumerate(self.values):
            if not isinstance(value, str):
                more = "; join its words with spaces" if isinstance(value, Sequence) else ""
                raise self._refused(row, "text", f"leave the row out, or give a str{more}")
        return self.values

    def numbers(self) -> list[float]:
        for row, value in enumerate(self.values):
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise self._refused(row, "finite number", "leave the row out, or give an int or a float")
        return [float(value) for value in self.values]

    def classes(self, names: Sequence[str]) -> list[int]:
        """Class numbers from 0; labels may be names, where there are ``names``."""
        return [self._class(row, value, names) for row, value in enumerate(self.values)]

    def _class(self, row: int, value: Any, names: Sequence[str]) -> int:
        if isinstance(value, str) and value in names:
            return list(names).index(value)
        known = f"of {len(names)} ({', '.join(names)})" if names else "from 0"
        if isinstance(value, str) and not names:
            raise self._refused(row, "class number", "give class numbers from 0, or label_names=[...] for names")
        if not isinstance(value, numbers.Real) or not math.isfinite(value) or float(value) < 0:
            raise self._refused(row, f"class {known}", "leave unlabelled rows out; one row has one class")
        number = float(value)
        if not number.is_integer():
            raise self._refused(row, f"class {known}", 'scores are for kind="regression"')
        if names and number >= len(names):
            raise self._refused(row, f"class {known}", "name it in label_names, or leave the row out")
        return int(number)

    @property
    def unlabelled(self) -> bool:
        """Whether no row has a label: None, nan or, as in released test sets, -1."""
        return all(value is None or (isinstance(value, float) and math.isnan(value)) for value in self.values) or all(
            isinstance(value, numbers.Real) and value == -1 for value in self.values
        )

    def _refused(self, row: int, wanted: str, way_out: str) -> DataError:
        value = repr(self.values[row])
        value = value if len(value) <= 80 else value[:77] + "..."
        return DataError(
            f"task {self.task!r}: {value} in column {self.name!r} (row {row} of split {self.split!r}) is no "
            f"{wanted}; {way_out}"
        )
