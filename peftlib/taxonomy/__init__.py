"""The taxonomy of methods: the one source for folders, chapters, tables, cards and tests. It imports no torch.

What a method is follows from one declaration, its :class:`Entry`: the card's words, its place in the design space, its
key in the bibliography, and, by its category and name, the file that holds its config and class. The survey's methods
have theirs in the files of this package, methods since the survey one file each in ``since_survey/``. A method of your
own is added with :func:`peftlib.register`.

Source of the order: Xu et al. 2023, arXiv:2312.12148.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType

from peftlib.errors import EntryError, UnknownNameError
from peftlib.taxonomy import additive, baselines, hybrid, partial, reparameterized, since_survey, unified
from peftlib.taxonomy.types import Category, Entry, Node, Origin

__all__ = ["CATEGORIES", "METHODS", "Category", "Entry", "Node", "add", "category", "entry", "methods", "tree"]

_SURVEY = (additive, partial, reparameterized, hybrid, unified)
_PARTS: tuple[tuple[Origin, tuple[ModuleType, ...]], ...] = (
    ("survey", _SURVEY),
    ("since the survey", (since_survey,)),
    ("baseline", (baselines,)),
)
YOURS = Category("yours", "Your own methods", "Methods that were registered from outside of peftlib.")

CATEGORIES: tuple[Category, ...] = tuple(c for _, parts in _PARTS for part in parts for c in part.CATEGORIES)
"""Every node of the tree, parents before children; the baselines last."""

METHODS: tuple[Entry, ...] = tuple(
    dataclasses.replace(e, origin=origin) for origin, parts in _PARTS for part in parts for e in part.METHODS
)
"""peftlib's methods: the survey's in its order, those since the survey in that of time, then the baselines."""

_CATEGORY_OF = {c.path: c for c in (*CATEGORIES, YOURS)}
_ENTRY_OF = {e.name: e for e in METHODS}


def methods(category: str | None = None) -> list[str]:
    """The names of the methods in the order of ``METHODS``, then those that were registered from outside.

    ``category`` keeps one branch of the tree, such as ``"partial"`` or ``"partial/bias"``. Raises UnknownNameError for
    a category that does not exist.
    """
    if category is not None and category not in _CATEGORY_OF:
        raise UnknownNameError("category", category, _CATEGORY_OF)
    return [n for n, e in _ENTRY_OF.items() if category is None or f"{e.category}/".startswith(f"{category}/")]


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


def add(entry: Entry) -> None:
    """Add the entry of a method from outside; :func:`peftlib.register` calls this. One of the same module takes the
    place of the one before. Raises EntryError for a name that is taken or a category that does not exist."""
    if entry.category not in _CATEGORY_OF:
        raise EntryError(entry.name, "category", f"is {entry.category!r}; known are {', '.join(_CATEGORY_OF)}")
    known = _ENTRY_OF.get(entry.name)
    if known is not None and (known.origin, known.location) != (entry.origin, entry.location):
        raise EntryError(entry.name, "name", f"is taken by a method in {known.module}; choose another name")
    _ENTRY_OF[entry.name] = entry
