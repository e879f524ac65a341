"""The generated pages: everything from the sources, nothing else, the same each time."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from peftlib import taxonomy
from peftlib.experiments import Store, logs
from peftlib.report import Standings, cards, conformance, counts, pages

from ..project import ROOT
from .stored import TRAINED, make

CHAPTER = "30_low_rank"
TEXT = '{"cells": ["report.source(\\"lora\\")"]}'


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A repository with a store and one chapter."""
    path = tmp_path_factory.mktemp("root")
    shutil.copy(ROOT / "_config.yml", path)
    counts.counts(ROOT)
    (path / counts.CACHE).parent.mkdir()
    shutil.copy(ROOT / counts.CACHE, path / counts.CACHE)  # they are the book's own, which it takes a while to count
    (path / "notebooks").mkdir()
    (path / "notebooks" / f"{CHAPTER}.ipynb").write_text(TEXT)
    make(path)
    return path


@pytest.fixture(scope="module")
def files(root):
    return pages.generate(root)


@pytest.fixture(scope="module")
def sources(root):
    return cards.Sources(
        counts=counts.counts(root),
        standings=Standings(Store(root / "results"), "embedded"),
        matrix=None,
        chapters={CHAPTER: TEXT},
        repository=pages.repository(root),
    )


def test_the_same_inputs_give_the_same_bytes(root, files):
    assert pages.generate(root) == files


def test_every_method_has_a_card_with_its_facts(files):
    for entry in taxonomy.METHODS:
        card = files[f"cards/{entry.name}.md"]
        assert card.startswith(f"# {entry.title}\n")
        assert f"$$\n{entry.equation}\n$$" in card
        assert entry.symbols in card
        assert entry.trains in card
        assert entry.merge_note in card
        assert f"`{entry.cite}`" in card
        assert f"https://arxiv.org/abs/{entry.arxiv}" in card or not entry.arxiv
        assert "## Parameters on published backbones" in card


def test_a_card_has_the_survey_s_count_and_names_its_runs(files, sources):
    card = files["cards/lora.md"]
    assert "| RoBERTa-base, 2 classes | 887,042 | 592,130 | 0.712 |" in card
    row = sources.standings.of("lora")["few-shot"]
    assert f"accuracy {row['mean']:.3f} ± {row['std']:.3f} | 3 |" in card
    assert all(f"`{key}`" in card for key in row["runs"])
    assert "On few-shot it is 6.0 points below training the head alone." in card


def test_the_searches_page_shows_what_is_stored():
    stored = Store(ROOT / "results/search").records("embedded", "few-shot")
    page = pages.searches_page(logs(ROOT / "results"), stored)
    for log in logs(ROOT / "results"):
        assert f"`results/{log.spec.path}`" in page
        assert f"| {log.spec.strategy} | {log.spec.seed} | {len(log.trials)} | {log.hypervolume():.3f} |" in page
    assert all(f"`{record['key']}`" in page for record in stored)
    assert pages.searches_page([], []).count("No stored searches.") == 2


def test_a_card_says_what_is_missing(files):
    assert "bias" in files["cards/bitfit.md"].partition("LLaMA-7B: ")[2].splitlines()[0]
    assert "No stored runs." in files["cards/ia3.md"]
    assert "No stored result of the conformance suite." in files["cards/lora.md"]


def test_links_go_to_chapters_that_exist_only(files):
    assert f"[chapter](../notebooks/{CHAPTER}.ipynb)" in files["cards/lora.md"]
    assert "[chapter]" not in files["cards/bitfit.md"]
    assert "[chapter]" not in files["cards/krona.md"], "its chapter does not have it"


def test_every_link_inside_the_book_has_a_target(root, files):
    known = set(files) | {str(path.relative_to(ROOT)) for path in (ROOT / "book").rglob("*") if path.is_file()}
    known.add(f"notebooks/{CHAPTER}.ipynb")
    for name, text in files.items():
        if not name.endswith(".md"):
            continue
        folder = name.rpartition("/")[0]
        for link in re.findall(r"\]\(([^)#:]+)\)|:::\{figure\} (\S+)", text):
            target = next(filter(None, link))
            parts = [*folder.split("/")] if folder else []
            for part in target.split("/"):
                if part == "..":
                    parts.pop()
                else:
                    parts.append(part)
            assert "/".join(parts) in known, f"{name} links to {target}"


def test_taxonomy_page_is_the_tree(files):
    text = files["taxonomy.md"]
    at = [text.index(f"](cards/{entry.name}.md)") for entry in taxonomy.METHODS]
    assert at == sorted(at)
    for category in taxonomy.CATEGORIES:
        assert re.search(rf"^#+ {re.escape(category.title)}$", text, re.M)
    for entry in taxonomy.METHODS:
        assert f"- [{entry.title}]" in text


def test_leaderboard_is_the_store(files, sources):
    text, _, calibration = files["leaderboard.md"].partition("\n## Calibration\n")
    rows = sources.standings.rows["few-shot"]
    lines = [line for line in text.splitlines() if line.startswith("| [")]
    assert [line.split("]")[0][3:] for line in lines] == [row["method"] for row in rows]
    for row in rows:
        assert all(f"`{key}`" in text for key in row["runs"])
        assert f"| {row['trained']:,} |" in text
    _, _, sentences = text.partition("\n## Sentences\n")
    assert "No stored runs." in sentences.partition("\n## ")[0]
    missing = next(line for line in text.splitlines() if line.startswith("Without stored runs here: "))
    assert "ia3" in missing
    assert not [name for name in TRAINED if re.search(rf"\b{name}\b", missing)]
    best = sources.standings.calibration[0]
    first = next(line for line in calibration.splitlines() if line.startswith("| ["))
    assert first.split(" | ")[1:] == [f"{best['accuracy']:.3f}", f"{best['nll']:.3f}", f"{best['ece']:.3f} |"]


def test_search_table_marks_the_chosen_rate(files):
    text = files["leaderboard.md"].partition("## Learning-rate search")[2]
    row = next(line for line in text.splitlines() if line.startswith("| lora |"))
    assert "**0.750**" in row
    assert "| 0.600 |" in row


def test_conformance_page_shows_every_cell(tmp_path):
    assert "There is no stored matrix" in pages.conformance_page(None)
    path = tmp_path / conformance.FILE
    path.parent.mkdir()
    row = {"start": {"bert": "yes", "t5": "yes"}, "merge": {"bert": "no: it is nonlinear", "t5": "no: it is nonlinear"}}
    path.write_text(json.dumps({"checks": {"start": "The start", "merge": "Merged"}, "methods": {"ia3": row}}))
    text = pages.conformance_page(conformance.read(tmp_path))
    assert "1. The start\n2. Merged" in text
    assert "| [ia3](cards/ia3.md) | 2 | – |" in text
    assert "- ia3, check 2: it is nonlinear" in text
    assert "2 cells hold, 2 are declined for a stated reason, 0 fail; 1 methods, 2 checks." in text


def test_tables_of_the_prose(files):
    for track, settings in Standings(Store("nowhere"), "embedded").profile.tracks.items():
        assert f"| {track} |" in files["tables/tracks.md"]
        assert f"| {settings.epochs:g} | {settings.batch_size} | {settings.max_length} |" in files["tables/tracks.md"]
    assert "| `paper` |" in files["tables/profiles.md"]
