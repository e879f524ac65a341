"""A method's options and default learning rate, read from its file without importing it: torch would come along."""

from __future__ import annotations

import ast
import dataclasses
import importlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from peftlib.taxonomy.types import Entry

_ROOT = Path(__file__).resolve().parents[2]


def options(entry: Entry) -> dict[str, Any]:
    """The fields of a method's config with their defaults, in their order."""
    if entry.location:
        return {f.name: f.default for f in dataclasses.fields(_imported(entry).Config)}
    path = _ROOT / entry.file
    config = _value(_method_class(path), "Config")
    found: dict[str, Any] = {}
    for at, cls in reversed(list(_lineage(path, config.id))) if isinstance(config, ast.Name) else ():
        for node in cls.body:
            if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.unparse(node.annotation):
                continue
            if isinstance(node.target, ast.Name) and node.value is not None:
                found[node.target.id] = _constant(at, node.value)
    return found


def learning_rate(entry: Entry) -> float:
    """A method's default learning rate."""
    if entry.location:
        return _imported(entry).learning_rate
    path = _ROOT / entry.file
    for at, cls in _lineage(path, _method_class(path).name):
        if (value := _value(cls, "learning_rate")) is not None:
            return float(_constant(at, value))
    raise AssertionError(f"{path} has no learning rate")


def _imported(entry: Entry) -> Any:
    """The class of a method from outside, whose module is there already."""
    return importlib.import_module("peftlib.methods.registry").find(entry.name)


@lru_cache(maxsize=256)
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _method_class(path: Path) -> ast.ClassDef:
    """The class in a method's file that has a ``Config``."""
    classes = (node for node in _tree(path).body if isinstance(node, ast.ClassDef))
    return next(cls for cls in classes if _value(cls, "Config") is not None)


def _lineage(path: Path, name: str) -> Iterator[tuple[Path, ast.ClassDef]]:
    """A class and what it inherits from, nearest first, each with its file."""
    at, node = _find(path, name)
    if isinstance(node, ast.ClassDef):
        yield at, node
        for base in node.bases:
            if isinstance(base, ast.Name):
                yield from _lineage(at, base.id)


def _find(path: Path, name: str) -> tuple[Path, ast.AST | None]:
    """What a name stands for in a file: a class or a value that is defined there, or in the module of peftlib that it
    is imported from."""
    for node in _tree(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return path, node
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name) and target.id == name:
                    return path, node.value
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    for one, value in zip(target.elts, node.value.elts):
                        if isinstance(one, ast.Name) and one.id == name:
                            return path, value
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peftlib."):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _find(_file(node.module or ""), alias.name)
    return path, None


def _file(module: str) -> Path:
    path = _ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _value(cls: ast.ClassDef, name: str) -> ast.expr | None:
    for node in cls.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return node.value
    return None


def _constant(path: Path, value: ast.AST) -> Any:
    """A default as Python has it: a literal, a quotient of two, or a name that stands for one."""
    if isinstance(value, ast.Name):
        at, found = _find(path, value.id)
        if found is not None:
            return _constant(at, found)
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "tuple":
        return tuple(_constant(path, value.args[0]))
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Div):
        return _constant(path, value.left) / _constant(path, value.right)
    return ast.literal_eval(value)
