"""Tasks of the survey's generation tracks: English-Romanian translation, Alpaca, and MMLU."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import datasets
from datasets import Dataset

from peftlib.errors import DataError
from peftlib.tasks import files
from peftlib.tasks.task import Task
from peftlib.tasks.text import fraction, normalized

NAMES = ("wmt16-enro", "alpaca", "mmlu")

_PREFIX = "translate English to Romanian: "  # what T5 was trained to expect
_CEDILLA = str.maketrans("şŞţŢ", "șȘțȚ")
_LETTERS = ("A", "B", "C", "D")
_TRAINING_PAIRS = (("ro-sts", "RO-STS.train"), ("mlqe-pe", "train"))


def in_folder(name: str, root: Path) -> bool:
    """Whether ``root`` has the files of the task."""
    needed = {
        "wmt16-enro": root / "mt" / "wmt16-enro" / "newstest2016.en",
        "alpaca": root / "instruct" / "alpaca_random_9229.jsonl",
        "mmlu": root / "mmlu" / "test" / "abstract_algebra_test.csv",
    }
    return files.find(needed[name]) is not None


def from_folder(name: str, root: Path, **options) -> Task:
    """A task of ``NAMES`` from files below ``root``."""
    if name == "wmt16-enro":
        return _translation(_folder_pairs(root / "mt"), "folder")
    if name == "alpaca":
        path = root / "instruct" / "alpaca_random_9229.jsonl"
        return _instructions([json.loads(line) for line in files.lines(path)], "folder")
    return _mmlu(_folder_questions(root / "mmlu"), "folder", **options)


def from_hub(name: str, **options) -> Task:
    """A task of ``NAMES`` from the hub. Its WMT16 has the official training corpora, which no folder here has."""
    if name == "wmt16-enro":
        found = datasets.load_dataset("wmt/wmt16", "ro-en")
        pairs = {
            split: [(row["translation"]["en"], row["translation"]["ro"]) for row in found[split]]
            for split in ("train", "validation", "test")
        }
        return _translation(pairs, "hub")
    if name == "alpaca":
        return _instructions(list(datasets.load_dataset("tatsu-lab/alpaca", split="train")), "hub")
    found = datasets.load_dataset("cais/mmlu", "all")
    questions = {
        part: [(row["subject"], row["question"], row["choices"], row["answer"]) for row in found[part]]
        for part in ("dev", "test")
    }
    return _mmlu(questions, "hub", **options)


def _aligned(place: Path) -> list[tuple[str, str]]:
    """Pairs of two line-aligned files ``place.en`` and ``place.ro``."""
    sides = [files.lines(place.with_name(f"{place.name}.{language}")) for language in ("en", "ro")]
    if len(sides[0]) != len(sides[1]):
        raise DataError(f"{place}.en has {len(sides[0])} lines and {place}.ro has {len(sides[1])}: they must align")
    return list(zip(*sides))


def _folder_pairs(place: Path) -> dict[str, list[tuple[str, str]]]:
    """WMT16's development and test news; for training, what freely redistributable pairs the folder holds."""
    train = []
    for folder, name in _TRAINING_PAIRS:
        if files.find(place / folder / f"{name}.en"):
            train += _aligned(place / folder / name)
    tatoeba = place / "tatoeba" / "ron-eng.tsv"
    if files.find(tatoeba):
        train += [(row["en"], row["ro"]) for row in files.tsv(tatoeba, ("en", "ro", "attribution"))]
    news = place / "wmt16-enro"
    return {"train": train, "validation": _aligned(news / "newsdev2016"), "test": _aligned(news / "newstest2016")}


def _translation(pairs: dict[str, list[tuple[str, str]]], source: str) -> Task:
    """Training pairs once each, in hash order, with one spelling of the Romanian letters with a comma below."""
    order = sorted(dict.fromkeys(pairs["train"]), key=lambda pair: fraction("\0".join(pair), "order"))
    splits = pairs | {"train": order}
    return Task(
        name="wmt16-enro",
        kind="seq2seq",
        splits={
            split: Dataset.from_dict(
                {"text": [_PREFIX + en for en, _ in rows], "label": [ro.translate(_CEDILLA) for _, ro in rows]}
            )
            for split, rows in splits.items()
            if rows
        },
        source=source,
        metrics=("bleu", "chrf"),
    )


def _instructions(rows: list[dict], source: str) -> Task:
    """Instruction, optional input, answer. Rows without an answer are left out; a twentieth each is held out."""
    splits: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        if row["output"].strip():
            given = f"### Input:\n{row['input']}\n\n" if row["input"].strip() else ""
            text = f"### Instruction:\n{row['instruction']}\n\n{given}### Response:\n"
            at = fraction(normalized(row["instruction"] + " " + row["input"]), "split")
            split = "train" if at < 0.9 else "validation" if at < 0.95 else "test"
            splits[split].append({"text": text, "label": row["output"]})
    return Task(
        name="alpaca",
        kind="causal_lm",
        splits={split: Dataset.from_list(found) for split, found in splits.items()},
        source=source,
        metrics=("nll", "perplexity", "token_accuracy"),
        max_length=512,
    )


def _folder_questions(place: Path) -> dict[str, list[tuple[str, str, list[str], int]]]:
    questions: dict[str, list] = {"dev": [], "test": []}
    for part, found in questions.items():
        subjects = {p.name.split(f"_{part}.csv")[0] for p in (place / part).glob(f"*_{part}.csv*")}
        for subject in sorted(subjects):
            path = place / part / f"{subject}_{part}.csv"
            for number, cells in enumerate(files.quoted_csv(path), 1):
                if len(cells) != 6 or cells[5] not in _LETTERS:
                    raise DataError(f"{path}, row {number}: not a question, four choices and A to D: {cells!r:.120}")
                found.append((subject, cells[0], cells[1:5], _LETTERS.index(cells[5])))
    return questions


def _mmlu(questions: dict[str, list[tuple[str, str, list[str], int]]], source: str, *, shots: int = 5) -> Task:
    """Test questions after ``shots`` answered ones of their subject. Nothing of MMLU is for training."""
    examples = defaultdict(list)
    for subject, question, choices, answer in questions["dev"]:
        examples[subject].append(f"{_question(question, choices)} {_LETTERS[answer]}\n\n")
    if missing := {s for s, *_ in questions["test"] if len(examples[s]) < shots}:
        raise DataError(f"mmlu with shots={shots}: too few development questions of {', '.join(sorted(missing))}")
    rows = [
        {
            "text": f"Multiple choice questions about {subject.replace('_', ' ')}, with answers.\n\n"
            + "".join(examples[subject][:shots])
            + _question(question, choices),
            "label": answer,
            "subject": subject,
        }
        for subject, question, choices, answer in questions["test"]
    ]
    return Task(
        name="mmlu",
        kind="multiple_choice",
        splits={"test": Dataset.from_list(rows)},
        source=source,
        metrics=("accuracy", "nll", "ece"),
        label_names=_LETTERS,
        max_length=2048,
    )


def _question(question: str, choices: list[str]) -> str:
    return question + "".join(f"\n{letter}. {choice}" for letter, choice in zip(_LETTERS, choices)) + "\nAnswer:"
