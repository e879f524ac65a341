"""The table of contents, the notebooks and the taxonomy agree, and the prose keeps to what there is."""

from __future__ import annotations

import re

import yaml
from pybtex.database import parse_file

from peftlib import taxonomy

from ..project import ROOT

TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PROSE = sorted((ROOT / "book").glob("*.md"))


def files(part: dict | list) -> list[str]:
    if isinstance(part, list):
        return [name for item in part for name in files(item)]
    return [value for key, value in part.items() if key in ("root", "file")] + [
        name for value in part.values() if isinstance(value, list | dict) for name in files(value)
    ]


def test_every_notebook_stands_in_the_contents_once_in_the_order_of_its_number():
    listed = [name for name in files(TOC) if name.startswith("notebooks/")]
    there = sorted(f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert listed == there


def test_every_page_of_prose_stands_in_the_contents_once():
    listed = sorted(name for name in files(TOC) if name.startswith("book/"))
    assert listed == [f"book/{path.stem}" for path in PROSE]


SHOWN = re.compile(r'source\(\\"(\w+)\\"')


def test_chapters_show_the_methods_of_their_own_category():
    """The methods whose code a chapter shows are its own, and each is trained there too."""
    for path in (ROOT / "notebooks").glob("[1-9]*.ipynb"):
        text = path.read_text()
        shown = SHOWN.findall(text)
        assert shown, path.name
        for name in shown:
            assert taxonomy.entry(name).chapter == path.stem
            assert re.search(rf'run_spec\(PROFILE, None, \\"{name}\\"', text), f"{path.name} does not train {name}"


def test_every_chapter_belongs_to_a_category():
    chapters = {category.chapter for category in taxonomy.CATEGORIES}
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} <= chapters


def test_citations_exist():
    known = set(parse_file(ROOT / "book" / "references.bib").entries)
    for path in PROSE:
        for keys in re.findall(r"\{cite:\w+\}`([^`]+)`", path.read_text()):
            assert set(keys.split(",")) <= known, path.name


def test_commands_of_the_prose_exist():
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.M))
    for path in PROSE:
        assert set(re.findall(r"^make ([a-z]+)", path.read_text(), re.M)) <= targets, path.name
