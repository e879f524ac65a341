"""People's own rows: used as they mean, or refused with the row and the column."""

from __future__ import annotations

import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Value

import peftlib
from peftlib import tasks
from peftlib.errors import DataError, UnknownNameError

TEXTS = ["the movie is great", "a bad film", "i love it", "dull and boring"]
NAMES = ("neg", "pos")
GOOD = {"classification": 0, "multiple_choice": 0, "regression": 0.5}
nan = float("nan")


def made(labels, kind="classification", split="train", texts=TEXTS, **options) -> tasks.Task:
    rows = [{"body": t, "mood": y} for t, y in zip(texts, labels)]
    good = [{"body": t, "mood": GOOD.get(kind, "a")} for t in TEXTS]
    splits = {"train": good, "validation": good} | {split: rows}
    return tasks.custom("mine", splits, kind=kind, text="body", label="mood", **options)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["pos", "neg", "pos", "neg"], NAMES),
        ([1, 0, 1, 0], NAMES),
        ([1.0, 0.0, 1.0, 0.0], NAMES),
        ([True, False, True, False], NAMES),
        (["1", "0", "1", "0"], ("0", "1")),
        ([1, 0, 1, 0], ()),
    ],
)
def test_classes(labels, names):
    task = made(labels, label_names=names)
    assert list(task.splits["train"]["label"]) == [1, 0, 1, 0]
    assert task.label_names == (names or ("0", "1"))
    tokenizer = peftlib.backbones.load("tiny-bert").tokenizer
    assert task.encode(tokenizer, "train")["labels"] == [1, 0, 1, 0]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize(
    ("kind", "row", "value", "names", "way_out"),
    [
        ("classification", 2, "Pos", NAMES, "class of 2 .neg, pos."),
        ("classification", 1, "pos", (), "label_names="),
        ("classification", 1, "1", (), "label_names="),
        ("classification", 3, 0.9, NAMES, "regression"),
        ("classification", 0, None, NAMES, "leave unlabelled rows out"),
        ("classification", 0, nan, (), "leave unlabelled rows out"),
        ("classification", 2, -1, NAMES, "leave unlabelled rows out"),
        ("classification", 1, 2, NAMES, "label_names"),
        ("classification", 1, [1.0, 0.0], NAMES, "one row has one class"),
        ("multiple_choice", 1, 7, tuple("ABCD"), "label_names"),
        ("regression", 0, None, (), "finite number"),
        ("regression", 3, nan, (), "finite number"),
        ("regression", 3, float("inf"), (), "finite number"),
        ("regression", 1, "0.5", (), "finite number"),
        ("causal_lm", 1, None, (), "no text"),
        ("seq2seq", 1, 3, (), "no text"),
        ("seq2seq", 1, ["a", "b"], (), "join its words"),
    ],
)
def test_labels_that_are_refused(kind, row, value, names, way_out, split):
    labels = [GOOD.get(kind, "a")] * 4
    labels[row] = value
    with pytest.raises(DataError, match=rf"in column 'mood' \(row {row} of split '{split}'\).*{way_out}"):
        made(labels, kind, split, label_names=names)


@pytest.mark.parametrize("missing", [None, nan, 3, ["a", "film"]])
def test_texts_that_are_refused(missing):
    with pytest.raises(DataError, match=r"in column 'body' \(row 0 of split 'train'\) is no text"):
        made([0, 1, 0, 1], texts=[missing, *TEXTS[1:]])


@pytest.mark.parametrize("missing", [None, nan, -1])
def test_a_split_without_any_label_can_be_predicted_only(missing):
    rows = [{"text": t, "label": missing} for t in TEXTS]
    train = [{"text": t, "label": i % 2} for i, t in enumerate(TEXTS)]
    assert tasks.custom("m", {"train": train, "test": rows}).splits["test"].column_names == ["text"]
    with pytest.raises(DataError, match="row 0 of split 'train'"):
        tasks.custom("m", {"train": rows})


def test_frames_and_data_sets_that_know_their_classes():
    frame = pd.DataFrame({"text": TEXTS * 10, "label": [1, 0, 1, 0] * 10})
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(NAMES))})
    known = Dataset.from_dict({"text": TEXTS, "label": [1, 0, 1, 0]}, features=features)
    assert tasks.custom("m", {"train": frame, "test": frame}).num_labels == 2
    assert tasks.custom("m", {"train": known, "test": known}).label_names == NAMES


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("rows.jsonl", "by split.*str was given"),
        ([{"text": "a", "label": 0}], "by split.*list was given"),
        (pd.DataFrame({"text": TEXTS}), "by split.*DataFrame was given"),
        ({"train": "rows.jsonl"}, "split 'train' is a str.*load_dataset"),
        ({"train": {"text": TEXTS}}, "split 'train' is a dict.*list of dictionaries"),
        ({"train": [("a", 0), ("b", 1)]}, "split 'train' has a tuple as row 0"),
        ({"train": 3}, "split 'train' is a int"),
    ],
)
def test_rows_of_another_form(given, says):
    with pytest.raises(DataError, match=says):
        tasks.custom("m", given)


def test_a_row_may_lack_a_column_and_is_named():
    with pytest.raises(DataError, match=r"None in column 'label' \(row 1 of split 'train'\)"):
        tasks.custom("m", {"train": [{"text": "a", "label": 0}, {"text": "b"}]})


def test_an_unknown_kind_comes_before_the_rows():
    with pytest.raises(UnknownNameError, match="kind of task 'token_classification'"):
        tasks.custom("m", {"train": [{"tokens": ["a"], "tags": [1]}]}, kind="token_classification", text="tokens")
