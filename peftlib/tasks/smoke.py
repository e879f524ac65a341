"""Generated tasks of a few dozen rows, for tests and the smoke profile: no package, no file, milliseconds.

Their words are common ones that the tiny backbones keep whole. They prove that things run; they measure nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from datasets import Dataset

from peftlib.tasks.task import Task
from peftlib.tasks.text import fraction

_SUBJECTS = ("movie", "film", "story", "plot", "music", "ending", "script", "camera")
_GOOD = ("good", "great", "superb", "lovely", "brilliant", "charming", "clever", "funny")
_BAD = ("bad", "poor", "awful", "dull", "boring", "clumsy", "weak", "tedious")
_SIZES = {"train": 48, "validation": 16, "test": 16}


def _single(subject: str, article: str, word: str, label: int) -> dict:
    return {"text": f"{article} {subject} was very {word}", "label": label}


def _pair(subject: str, article: str, word: str, label: int) -> dict:
    return {"text": f"i saw {article} {subject}", "text_pair": f"it was very {word}", "label": label}


def _score(subject: str, article: str, word: str, label: int) -> dict:
    """A score that grows with the place of the word: 0 to 3.5 for bad ones, 4 to 7.5 for good ones, by halves."""
    words = _BAD + _GOOD
    return {"text": f"{article} {subject} was very {word}", "label": words.index(word) / 2}


def _target(subject: str, article: str, word: str, label: int) -> dict:
    return {"text": f"{article} {subject} was {word}", "label": f"{word} {subject}"}


_CLASSES = {
    "kind": "classification",
    "label_names": ("negative", "positive"),
    "metrics": ("accuracy", "f1", "nll", "ece"),
}
_TASKS: dict[str, tuple[Callable[..., dict], dict]] = {
    "smoke": (_single, _CLASSES),
    "smoke-pair": (_pair, _CLASSES),
    "smoke-regression": (_score, {"kind": "regression", "metrics": ("pearson", "spearman", "mse")}),
    "smoke-seq2seq": (_target, {"kind": "seq2seq", "metrics": ("nll", "perplexity", "token_accuracy")}),
    "smoke-lm": (_target, {"kind": "causal_lm", "metrics": ("nll", "perplexity", "token_accuracy")}),
}
NAMES = tuple(_TASKS)


def load(name: str) -> Task:
    """One of ``NAMES``: 48, 16 and 16 distinct rows, both classes equally often."""
    make, facts = _TASKS[name]
    per_class = []
    for label in (0, 1):
        words = product(_SUBJECTS, ("the", "this"), _GOOD if label else _BAD)
        order = sorted(words, key=lambda w: fraction(" ".join(w), f"smoke {label}"))
        per_class.append([make(*w, label) for w in order])
    rows = [row for both in zip(*per_class) for row in both]
    splits, start = {}, 0
    for split, size in _SIZES.items():
        splits[split] = Dataset.from_list(rows[start : start + size])
        start += size
    return Task(name=name, splits=splits, source="generated", max_length=32, **facts)
