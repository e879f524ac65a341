"""Finding a task by name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import datasets
import pandas as pd
from datasets import Dataset

from peftlib import sources
from peftlib.errors import DataError, SourceError, UnknownNameError
from peftlib.tasks import embedded, files, generation, glue, rows, smoke
from peftlib.tasks.task import KINDS, Task
from peftlib.tasks.text import normalized, sentences

SOURCES = ("auto", "embedded", "generated", "folder", "hub")
FEW_SHOT = "-fewshot"
_DEFAULT_METRICS = {
    "classification": ("accuracy", "nll", "ece"),
    "regression": ("pearson", "spearman", "mse"),
    "causal_lm": ("nll", "perplexity", "token_accuracy"),
    "seq2seq": ("bleu", "chrf"),
    "multiple_choice": ("accuracy", "nll", "ece"),
}


def names() -> list[str]:
    """Every task that has a name: embedded, generated, then those that need a folder or the hub."""
    return [*embedded.NAMES, *smoke.NAMES, *glue.NAMES, *generation.NAMES]


def load(
    name: str,
    *,
    source: str = "auto",
    root: str | os.PathLike | None = None,
    limit: int | Mapping[str, int] | None = None,
    seed: int = 0,
    n_train: int = 256,
    n_validation: int | None = None,
    n_test: int | None = None,
    **options,
) -> Task:
    """A task by name.

    name: one of ``names()``, or one of them with "-fewshot" appended for ``Task.few_shot``.
    source: "auto" takes embedded and generated tasks as they are; of the others, a folder's files where there are
        any, else the hub's.
    root: the folder with benchmark files; default ``$PEFTLIB_DATA``.
    limit: rows at most, in each split or by split. Splits are in hash order or as released, so these are the first.
    seed, n_train, n_validation, n_test: of a few-shot draw; a task's own splits do not depend on them.
    options: of the task; ``shots`` for mmlu.

    Raises UnknownNameError for a name or source that does not exist, SourceError where the data cannot be reached.
    """
    if source not in SOURCES:
        raise UnknownNameError("source of a task", source, SOURCES)
    base = name.removesuffix(FEW_SHOT)
    if base not in names():
        raise UnknownNameError("task", name, names(), f"Any of them may end in {FEW_SHOT!r}.")
    task = _find(base, source, root, options)
    if name != base:
        task = task.few_shot(n_train, n_validation, n_test, seed=seed)
    return task if limit is None else task.limited(limit)


def _find(name: str, source: str, root: str | os.PathLike | None, options: dict) -> Task:
    if options and name != "mmlu":
        raise UnknownNameError(f"option of task {name!r}", next(iter(options)), ["limit", "seed", "root", "source"])
    for module, kind in ((embedded, "embedded"), (smoke, "generated")):
        if name in module.NAMES:
            if source not in ("auto", kind):
                raise SourceError(f"the task {name!r} is {kind}: source={source!r} does not have it")
            return module.load(name)
    if source in ("embedded", "generated"):
        raise SourceError(f"the task {name!r} is not {source}: it comes from a folder or the hub")
    module = glue if name in glue.NAMES else generation
    folder = files.data_root(root)
    if source != "hub" and folder is not None and module.in_folder(name, folder):
        return module.from_folder(name, folder, **options)
    if source == "folder":
        where = f"{folder} does not have its files" if folder else "no folder is given"
        raise SourceError(f"the task {name!r} is not in a folder: {where}. Set root= or PEFTLIB_DATA.")
    return _from_hub(module, name, options)


def texts(name: str, **options) -> list[str]:
    """The sentences of a task's training texts, without labels, each once and in the order of the rows; ``options`` as
    for :func:`load`."""
    train = load(name, **options).splits["train"]
    columns = [column for column in ("text", "text_pair") if column in train.column_names]
    found = (sentence for row in train for column in columns for sentence in sentences(row[column]))
    return list(dict.fromkeys(sentence for sentence in found if normalized(sentence)))


def _from_hub(module, name: str, options: dict) -> Task:
    reachable = sources.hub_reachable()
    before = datasets.config.HF_HUB_OFFLINE
    # Without the hub, what an earlier run cached still serves, and a miss is known at once.
    datasets.config.HF_HUB_OFFLINE = before or not reachable
    try:
        return module.from_hub(name, **options)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        why = f"the hub's copy cannot be read: {error}"
        if not reachable:
            why = (
                "there is no folder with its files, the hub is not reachable, and the local cache "
                f"({datasets.config.HF_DATASETS_CACHE}) does not hold it"
            )
        raise SourceError(
            f"cannot load the task {name!r}: {why}. Ways out: a network connection; a folder with the released files "
            f"as root= or PEFTLIB_DATA; or a task that needs neither: {', '.join((*embedded.NAMES, *smoke.NAMES))}."
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def custom(
    name: str,
    splits: Mapping[str, Dataset | pd.DataFrame | Sequence[Mapping]],
    *,
    kind: str = "classification",
    text: str = "text",
    text_pair: str | None = None,
    label: str | None = "label",
    label_names: Sequence[str] = (),
    metrics: Sequence[str] = (),
    max_length: int = 128,
) -> Task:
    """A task from your own rows: lists of dictionaries, ``datasets.Dataset`` or ``pandas.DataFrame`` objects, by split.

    text, text_pair, label: the names of your columns. With ``label=None``, or in a split other than "train" that lacks
    the column or has no label in it (None, nan, -1), rows can be predicted only. Classes are numbers from 0, or names
    out of label_names, which default to those that a Dataset knows, else to the numbers.

    Where there is no "validation", it is cut from "train" by a hash of the text.

    Raises UnknownNameError for another kind, DataError that names row and column for what such a task cannot use.
    """
    if kind not in KINDS:
        raise UnknownNameError("kind of task", kind, KINDS)
    classes = kind in ("classification", "multiple_choice")
    columns_of = rows.splits(name, splits)
    label_names = tuple(label_names) or (rows.class_names(splits, label) if classes else ())
    wanted = {"text": text, "text_pair": text_pair, "label": label}
    made: dict[str, Dataset] = {}
    for split, columns in columns_of.items():
        values: dict[str, list] = {}
        for role, column in wanted.items():
            if column is None or (role == "label" and split != "train" and column not in columns):
                continue
            if column not in columns:
                raise DataError(
                    f"task {name!r} has no column {column!r} in split {split!r}; it has: {', '.join(columns)}. Name "
                    f"yours with {role}=."
                )
            given = rows.Column(name, split, column, columns[column])
            if role != "label":
                values[role] = given.texts()
            elif split == "train" or not given.unlabelled:
                values[role] = given.classes(label_names) if classes else _answers(given, kind)
        made[split] = Dataset.from_dict(values)
    if "validation" not in made and "train" in made:
        train, validation = glue.cut(made["train"])
        if train and validation:
            made |= {"train": Dataset.from_list(train), "validation": Dataset.from_list(validation)}
    if classes and not label_names and label is not None:
        seen = [max(split["label"]) for split in made.values() if "label" in split.column_names]
        label_names = tuple(str(number) for number in range(max(seen, default=-1) + 1))
    return Task(
        name=name,
        kind=kind,
        splits=made,
        source="custom",
        metrics=tuple(metrics) or _DEFAULT_METRICS.get(kind, ()),
        label_names=label_names,
        max_length=max_length,
    )


def _answers(labels: rows.Column, kind: str) -> list:
    return labels.numbers() if kind == "regression" else labels.texts()
