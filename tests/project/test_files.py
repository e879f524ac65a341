"""What the repository holds: its top level, no traces of one machine, one version, one address."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
import yaml

import peftlib

from . import ROOT, pyproject, tracked

TOP_LEVEL = {
    ".ci",
    ".github",
    ".gitignore",
    ".pre-commit-config.yaml",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "_config.yml",
    "_toc.yml",
    "book",
    "environment.yml",
    "notebooks",
    "peftlib",
    "pyproject.toml",
    "requirements.lock",
    "results",
    "tests",
    "tools",
}
# Written in pieces, so that this file does not hold what it looks for.
TRACES = {
    "a path of one machine": re.compile(rf"(?<![\w./])/(?:{'work'}|{'root'}|{'home'}/\w+|{'Users'}/\w+)/"),
    "a package registry's host": re.compile("|".join([r"pypi\.{}".format("org"), r"files\.{}".format("pythonhosted"),
        r"registry\.{}".format("npmjs"), r"download\.{}".format("pytorch"), r"conda\.{}".format("anaconda")])),
}  # fmt: skip
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def texts() -> list[tuple[Path, str]]:
    """Every tracked text file."""
    found = []
    for path in tracked():
        try:
            found.append((path.relative_to(ROOT), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    return found


def test_top_level_is_the_agreed_one():
    assert {path.relative_to(ROOT).parts[0] for path in tracked()} == TOP_LEVEL


@pytest.mark.parametrize("kind", TRACES)
def test_no_traces(kind):
    hits = [
        f"{path}:{number}: {line.strip()[:120]}"
        for path, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if TRACES[kind].search(line)
    ]
    assert not hits, "\n".join(hits)


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("a path of one machine", f"open('/{'work'}/x')"),
        ("a path of one machine", f"cd /{'home'}/ada/project"),
        ("a package registry's host", f"https://pypi.{'org'}/simple"),
    ],
)
def test_traces_are_recognized(kind, line):
    assert TRACES[kind].search(line)


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert pyproject()["project"]["version"] == peftlib.__version__ == citation["version"]


def test_the_address_is_that_of_the_book_config():
    """``repository.url`` in _config.yml decides; whatever else names the repository on its host agrees."""
    address = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"].rstrip("/")
    host, _, slug = address.removeprefix("https://").partition("/")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"] == address
    assert address in (ROOT / "README.md").read_text()

    name = slug.split("/")[1]
    forms = re.compile(
        rf"(?:{re.escape(host)}/|colab\.research\.google\.com/github/|raw\.githubusercontent\.com/)"
        rf"(?P<slug>[\w.-]+/{re.escape(name)})\b"
    )
    named = {(str(path), match["slug"]) for path, text in texts() for match in forms.finditer(text)}
    assert {found for _, found in named} == {slug}, sorted(named)


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_clean(path):
    """No outputs, counts or per-machine metadata; a ``parameters`` cell for papermill; the plain Python kernel."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell.id for cell in code if cell.outputs or cell.execution_count is not None]
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info", "accelerator", "colab"}
    assert all(set(cell.metadata) <= {"tags", "editable", "slideshow"} for cell in notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_opens_in_colab_from_the_one_address(path):
    address = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"].rstrip("/")
    slug = address.removeprefix("https://").partition("/")[2]
    link = f"https://colab.research.google.com/github/{slug}/blob/main/notebooks/{path.name}"
    assert link in nbformat.read(path, as_version=4).cells[0].source
