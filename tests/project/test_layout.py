"""The house: what a module of mechanisms/ serves, and where a test stands."""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path

import pytest

from peftlib import taxonomy
from tests.project import ROOT

PACKAGE, TESTS = ROOT / "peftlib", ROOT / "tests"
MECHANISMS = sorted(p.stem for p in (PACKAGE / "mechanisms").glob("*.py") if p.stem != "__init__")


@lru_cache
def imports(path: Path) -> frozenset[str]:
    """The modules of peftlib that a file imports, as dotted names without ``peftlib.``"""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peftlib"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name.removeprefix("peftlib.") for name in (node.module, *names)}
    return frozenset(found)


@lru_cache
def method_of(path: Path) -> str | None:
    """The method that a file belongs to, None for the rest of the library."""
    here = path.relative_to(ROOT).as_posix()
    for entry in taxonomy.METHODS:
        base = entry.module.replace(".", "/")
        if here == f"{base}.py" or here.startswith(f"{base}/"):
            return entry.name
    return None


@lru_cache
def users(module: str) -> frozenset[str]:
    """Who uses a module of mechanisms/: names of methods, directly or through another mechanism or a base, and "core"
    for what is neither method, mechanism, base nor report."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if module not in imports(path):
            continue
        room, *_ = path.relative_to(PACKAGE).parts
        if method := method_of(path):
            found.add(method)
        elif room == "mechanisms":
            found |= users(f"mechanisms.{path.stem}")
        elif "bases" in path.parts:
            found |= users(f"methods.bases.{path.stem}")
        elif room != "report":
            found.add("core")
    return frozenset(found)


@pytest.mark.parametrize("module", MECHANISMS)
def test_a_mechanism_serves_two_methods_or_a_method_and_the_core(module):
    served = users(f"mechanisms.{module}")
    assert len(served) >= 2, f"mechanisms/{module}.py serves {served or 'nothing'}: it belongs into that method's file"


def test_methods_do_not_import_methods():
    for path in (PACKAGE / "methods").rglob("*.py"):
        if own := method_of(path):
            modules = {e.module.removeprefix("peftlib.") for e in taxonomy.METHODS if e.name != own}
            taken = {name for name in imports(path) if any(name == m or name.startswith(f"{m}.") for m in modules)}
            assert not taken, f"{path.name} imports {taken}; hybrids compose through peftlib.methods.combination"


ASPECTS = {
    "helpers.py",
    "facts.py",
    "conftest.py",
    "__init__.py",
    "stored.py",
    "launch_script.py",
    "packing.py",
    "torchao_script.py",
}
"""Files of tests/ that hold no tests."""


def test_tests_mirror_the_library():
    """``tests/<room>/test_<file>.py`` tests ``peftlib/<room>/<file>.py``; ``test_<file>_<aspect>.py`` an aspect of it.
    The methods' tests lie flat in tests/methods. tests/book, tests/project and tests/conformance have the book, the
    repository and the suite."""
    lost = []
    for path in sorted(TESTS.rglob("*.py")):
        room = path.relative_to(TESTS).parent.as_posix()
        if path.name in ASPECTS or room in ("book", "project", "conformance", "golden"):
            continue
        modules = {p.stem for p in (PACKAGE / room).glob("*.py")} | {"anatomy", "taxonomy"}
        if room == "methods":
            modules |= {entry.name for entry in taxonomy.METHODS}
            modules |= {p.stem for p in (PACKAGE / "methods" / "bases").glob("*.py")}
        stem = path.stem.removeprefix("test_")
        if not any(stem == m or stem.startswith(f"{m}_") for m in modules):
            lost.append(f"{room}/{path.name}")
    assert not lost, f"{lost} mirror nothing in peftlib"
