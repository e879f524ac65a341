"""A small book: warnings are errors each time, and what changed arrives."""

from __future__ import annotations

import shutil

import pytest
import yaml

from peftlib.report import book, pages
from peftlib.report.book import BookError

from ..project import ROOT

pytestmark = pytest.mark.book


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository with three pages of prose, no notebooks and no generated pages."""
    monkeypatch.setattr(pages, "generate", lambda root: {})
    shutil.copy(ROOT / "_config.yml", tmp_path)
    (tmp_path / "book" / "_static").mkdir(parents=True)
    (tmp_path / "book" / "_static" / "book.css").write_text("p {}\n")
    (tmp_path / "book" / "references.bib").write_text("")
    (tmp_path / "book" / "intro.md").write_text("# Intro\n\n[more](more.md)\n")
    (tmp_path / "book" / "more.md").write_text("# More\n\n$x^2$\n")
    (tmp_path / "book" / "last.md").write_text("# Last\n")
    contents(tmp_path, "more", "last")
    return tmp_path


def contents(root, *chapters: str) -> None:
    toc = {"format": "jb-book", "root": "book/intro", "chapters": [{"file": f"book/{name}"} for name in chapters]}
    (root / "_toc.yml").write_text(yaml.safe_dump(toc))


def build(root):
    return book.build("smoke", execute=False, root=root)


def test_a_warning_is_an_error_every_time(root):
    page = root / "book" / "intro.md"
    good = page.read_text()
    page.write_text(good + "\n[nowhere](nowhere.md)\n")
    for _ in range(2):
        with pytest.raises(BookError, match="nowhere"):
            build(root)
    page.write_text(good)
    assert (build(root) / "book/intro.html").is_file()


def test_changed_styles_arrive_and_removed_pages_go(root):
    html = build(root)
    assert (html / "book/more.html").is_file()
    (root / "book/_static/book.css").write_text("p { color: red }\n")
    build(root)
    assert "red" in (html / "_static/book.css").read_text()

    (root / "book/more.md").unlink()
    (root / "book/intro.md").write_text("# Intro\n")
    contents(root, "last")
    build(root)
    assert (html / "book/intro.html").is_file()
    assert not (html / "book/more.html").exists()


def test_a_generated_page_does_not_replace_prose(root, monkeypatch):
    monkeypatch.setattr(pages, "generate", lambda root: {"book/intro.md": "# Other\n"})
    with pytest.raises(BookError, match=r"book/intro\.md"):
        build(root)


def test_notebooks_that_were_never_executed_are_named(root):
    (root / "notebooks").mkdir()
    for name in ("00_first", "10_second"):
        (root / f"notebooks/{name}.ipynb").write_text("{}")
    with pytest.raises(BookError, match=r"00_first, 10_second: run `peftlib book --profile smoke` without"):
        build(root)
