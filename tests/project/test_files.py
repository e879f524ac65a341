"""What the repository holds: its top level, no traces of one machine, one version, one address."""

from __future__ import annotations

import ast
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
    "CHANGELOG.md",
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


def test_files_of_the_library_that_are_no_modules_are_package_data():
    """An installed peftlib has them only where pyproject.toml says so."""
    declared = pyproject()["tool"]["setuptools"]["package-data"]
    data = {ROOT.joinpath(*p.split("."), file) for p, patterns in declared.items() for file in patterns}
    packaged = {path for pattern in data for path in pattern.parent.glob(pattern.name)}
    assert packaged == {path for path in tracked() if path.is_relative_to(ROOT / "peftlib") and path.suffix != ".py"}


def test_paths_that_contributing_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:\.ci|book|peftlib|results|tests|tools)/[\w./]*)`", text)
    assert len(named) > 30
    assert not [path for path in named if not (ROOT / path).exists()]


def versions_stated(path: Path, text: str, version: str) -> list[str]:
    """Lines of a file that name ``version``, or set a variable or key called version; pins of packages are neither."""
    named = rf"(?<![\w.=]){re.escape(version)}(?![\w.])"
    stated = re.compile(rf"^\s*(?:__version__|version)\s*[:=]\s*[\"']?\d+\.\d|{named}")
    return [f"{path}: {line.strip()}" for line in text.splitlines() if stated.search(line)]


def test_the_version_stands_in_one_place():
    """In the package; what builds it reads it there, and the changelog names it as the newest release."""
    assert pyproject()["project"]["dynamic"] == ["version"]
    assert pyproject()["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "peftlib.__version__"}
    stated = [
        line
        for path, text in texts()
        if path.parts[0] != "results" and path.name != "CHANGELOG.md"
        for line in versions_stated(path, text, peftlib.__version__)
    ]
    assert stated == [f'peftlib/__init__.py: __version__ = "{peftlib.__version__}"']
    releases = re.findall(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert releases[0] == peftlib.__version__


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("version: 3.2.{}", 1),  # an older one too
        ('version = "3.2.{}"', 1),
        ("peftlib 3.2.{}, of", 0),
        ("peftlib {version}, of", 1),
        ("package=={version} other", 0),
        ('"package>={version}",', 0),
    ],
)
def test_a_second_version_is_noticed(line, number):
    line = line.format(1, version=peftlib.__version__)
    assert len(versions_stated(Path("x"), line, peftlib.__version__)) == number


def test_the_version_is_read_without_importing_torch():
    """What the build reads is a plain assignment, so that it needs none of the library's dependencies."""
    tree = ast.parse((ROOT / "peftlib" / "__init__.py").read_text())
    values = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__version__"]
    ]
    assert values == [peftlib.__version__]


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "peftlib" / "py.typed").is_file()
    assert "py.typed" in pyproject()["tool"]["setuptools"]["package-data"]["peftlib"]


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
