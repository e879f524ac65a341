"""The survey's taxonomy: the one source for folders, chapters, tables, cards and tests.

Adding a method takes one :class:`Entry` in this package, one file at ``peftlib/methods/<category>/<name>.py`` and one
test file. Nothing else lists methods.

Source of the order: Xu et al. 2023, arXiv:2312.12148.
"""

from __future__ import annotations

from peftlib.errors import UnknownNameError
from peftlib.taxonomy import additive, baselines, hybrid, partial, reparameterized, unified
from peftlib.taxonomy.types import Category, Entry, Node

__all__ = ["CATEGORIES", "METHODS", "Category", "Entry", "Node", "category", "entry", "methods", "tree"]

_CLASSES = (additive, partial, reparameterized, hybrid, unified, baselines)

CATEGORIES: tuple[Category, ...] = tuple(c for part in _CLASSES for c in part.CATEGORIES)
"""Every node of the tree, parents before children; the baselines last."""

METHODS: tuple[Entry, ...] = tuple(e for part in _CLASSES for e in part.METHODS)
"""The survey's 59 methods in its order, then the baselines."""

_CATEGORY_OF = {c.path: c for c in CATEGORIES}
_ENTRY_OF = {e.name: e for e in METHODS}


def methods(category: str | None = None, available: bool = True) -> list[str]:
    """The names of the methods in taxonomy order, the baselines last.

    ``category`` keeps one branch of the tree, such as ``"partial"`` or ``"partial/bias"``. ``available=False`` adds
    the methods that peftlib does not have yet. Raises UnknownNameError for a category that does not exist.
    """
    if category is not None and category not in _CATEGORY_OF:
        raise UnknownNameError("category", category, _CATEGORY_OF)
    return [
        e.name
        for e in METHODS
        if (category is None or f"{e.category}/".startswith(f"{category}/")) and (e.available or not available)
    ]


def entry(name: str) -> Entry:
    """What is known of a method; raises UnknownNameError with near names."""
    try:
        return _ENTRY_OF[name]
    except (KeyError, TypeError):
        raise UnknownNameError("method", name, _ENTRY_OF) from None


def category(path: str) -> Category:
    """A node of the tree by its path; raises UnknownNameError with near paths."""
    try:
        return _CATEGORY_OF[path]
    except (KeyError, TypeError):
        raise UnknownNameError("category", path, _CATEGORY_OF) from None


def tree(path: str = "") -> tuple[Node, ...]:
    """The categories right below ``path`` (the whole tree by default), each with its methods and its own branches."""
    if path:
        category(path)
    return tuple(
        Node(c, tuple(e for e in METHODS if e.category == c.path), tree(c.path)) for c in CATEGORIES if c.parent == path
    )
