"""GLUE (Wang et al. 2019), from the released files or from the hub.

The labels of GLUE's test sets are not public. So, as is usual, the official development set is "test" here.
"validation" is cut from the official training set by a hash of the text: a tenth of it, and about 2,000 rows at most;
"train" is the rest. Rows with equal texts stay on one side of that cut. The few training rows that also stand in the
official development set (16 sentences of CoLA, 6 pairs of STS-B) stay in training, as in published results.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets import Dataset

from peftlib.errors import DataError
from peftlib.tasks import files
from peftlib.tasks.task import Task
from peftlib.tasks.text import fraction, normalized

HUB = "nyu-mll/glue"
VALIDATION_SHARE, VALIDATION_ROWS = 0.1, 2000


@dataclass(frozen=True)
class _Set:
    folder: str
    texts: tuple[str, ...]
    """Columns of the texts in the released files."""
    label: str
    hub_texts: tuple[str, ...]
    metrics: tuple[str, ...]
    classes: tuple[str, ...] = ("0", "1")
    """Labels as the files write them, in the order of the class numbers; none for a score."""
    names: tuple[str, ...] = ()
    header: tuple[str, ...] = ()
    """Column names of a file without a header line."""
    dev: str = "dev"
    skip_short: bool = False


_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
_ACCURACY = ("accuracy", "f1", "nll", "ece")
SETS = {
    "cola": _Set(
        "CoLA",
        ("sentence",),
        "label",
        ("sentence",),
        ("matthews", "accuracy", "nll", "ece"),
        names=("unacceptable", "acceptable"),
        header=("source", "label", "mark", "sentence"),
    ),
    "sst2": _Set("SST-2", ("sentence",), "label", ("sentence",), _ACCURACY, names=("negative", "positive")),
    "mrpc": _Set(
        "MRPC", ("#1 String", "#2 String"), "Quality", _PAIR, _ACCURACY, names=("not_equivalent", "equivalent")
    ),
    "stsb": _Set("STS-B", _PAIR, "score", _PAIR, ("pearson", "spearman", "mse"), classes=()),
    "rte": _Set("RTE", _PAIR, "label", _PAIR, ("accuracy", "nll", "ece"), classes=_ENTAILMENT),
    "qnli": _Set(
        "QNLI",
        ("question", "sentence"),
        "label",
        ("question", "sentence"),
        ("accuracy", "nll", "ece"),
        classes=_ENTAILMENT,
    ),
    "qqp": _Set(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        ("question1", "question2"),
        _ACCURACY,
        names=("not_duplicate", "duplicate"),
        skip_short=True,
    ),
    "mnli": _Set(
        "MNLI",
        _PAIR,
        "gold_label",
        ("premise", "hypothesis"),
        ("accuracy", "nll", "ece"),
        classes=("entailment", "neutral", "contradiction"),
        dev="dev_matched",
    ),
}
NAMES = tuple(f"glue/{name}" for name in SETS)


def in_folder(name: str, root: Path) -> bool:
    """Whether ``root`` has the files of the task."""
    facts = SETS[name.removeprefix("glue/")]
    place = root / "glue" / facts.folder
    return all(files.find(place / f"{part}.tsv") for part in ("train", facts.dev))


def from_folder(name: str, root: Path) -> Task:
    """A task of ``NAMES`` from ``root/glue/CoLA/train.tsv`` and so on (or ``.tsv.gz``)."""
    facts = SETS[name.removeprefix("glue/")]

    def rows(part: str) -> list[dict]:
        path = root / "glue" / facts.folder / f"{part}.tsv"
        found = files.tsv(path, facts.header, skip_short=facts.skip_short)
        wanted = (*facts.texts, facts.label)
        if missing := [column for column in wanted if column not in found[0]]:
            raise DataError(f"{path} has no column {missing[0]!r}; it has: {', '.join(found[0])}")
        return [_row([row[c] for c in facts.texts], _label(row[facts.label], facts, path)) for row in found]

    parts = {"train": rows("train"), "test": rows(facts.dev)}
    if name == "glue/mnli" and files.find(root / "glue" / facts.folder / "dev_mismatched.tsv"):
        parts["test_mismatched"] = rows("dev_mismatched")
    return _task(name, facts, parts, "folder")


def from_hub(name: str) -> Task:
    """A task of ``NAMES`` from the hub's copy, or from the local cache of it."""
    short = name.removeprefix("glue/")
    facts = SETS[short]
    found = datasets.load_dataset(HUB, short)

    def rows(part: str) -> list[dict]:
        return [_row([row[c] for c in facts.hub_texts], row["label"]) for row in found[part]]

    if short == "mnli":
        parts = {
            "train": rows("train"),
            "test": rows("validation_matched"),
            "test_mismatched": rows("validation_mismatched"),
        }
    else:
        parts = {"train": rows("train"), "test": rows("validation")}
    return _task(name, facts, parts, "hub")


def _label(value: str, facts: _Set, path: Path) -> int | float:
    if not facts.classes:
        return float(value)
    if value not in facts.classes:
        raise DataError(f"{path}: label {value!r} is none of {', '.join(facts.classes)}")
    return facts.classes.index(value)


def _row(texts: list[str], label: int | float) -> dict:
    return dict(zip(("text", "text_pair"), texts)) | {"label": label}


def _task(name: str, facts: _Set, parts: dict[str, list[dict]], source: str) -> Task:
    train, validation = cut(parts.pop("train"))
    splits = {"train": train, "validation": validation, **parts}
    return Task(
        name=name,
        kind="classification" if facts.classes else "regression",
        splits={split: Dataset.from_list(rows) for split, rows in splits.items()},
        source=source,
        metrics=facts.metrics,
        label_names=facts.names or facts.classes,
    )


def cut(rows: Iterable[dict]) -> tuple[list[dict], list[dict]]:
    """Training and validation rows, by a hash of the text."""
    rows = list(rows)
    share = min(VALIDATION_SHARE, VALIDATION_ROWS / max(1, len(rows)))
    train, validation = [], []
    for row in rows:
        key = "\0".join(normalized(row[column]) for column in ("text", "text_pair") if column in row)
        (validation if fraction(key, "validation") < share else train).append(row)
    return train, validation
