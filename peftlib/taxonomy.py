"""The survey's taxonomy: the one source for folders, chapters, tables, cards and tests.

Adding a method takes one :class:`Entry` here, one file at ``peftlib/methods/<category>/<name>.py`` and one
test file. Nothing else lists methods.

Source of the order: Xu et al. 2023, arXiv:2312.12148.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from peftlib.errors import UnknownNameError


@dataclass(frozen=True)
class Category:
    """A node of the tree. ``path`` is its folder below ``peftlib/methods/``."""

    path: str
    title: str
    summary: str
    chapter: str = ""
    """The notebook of this category (without suffix) below ``notebooks/``; empty for inner nodes."""


@dataclass(frozen=True)
class Entry:
    """What is known of a method before any code runs."""

    name: str
    category: str
    title: str
    cite: str
    """BibTeX key in ``book/references.bib``."""
    arxiv: str
    """arXiv identifier; empty where there is none."""
    summary: str
    """What it does, in one sentence."""
    equation: str
    """LaTeX, without dollar signs."""
    symbols: str
    """The symbols of the equation with their shapes, one sentence (Markdown with $...$)."""
    sites: tuple[str, ...]
    """Where it acts, in the words of ``peftlib.anatomy``."""
    trains: str
    """What is trained, in words."""
    count: str
    """Trained parameters without the task head on an encoder: a Python expression over L, d, f, H, V
    (layers, hidden size, inner size, heads, vocabulary) and the fields of the method's config."""
    start: Literal["identity", "near", "changed"]
    """Output right after attaching: exactly the backbone's, close to it, or different by nature."""
    start_note: str
    merge: Literal["exact", "no"]
    merge_note: str
    """How it folds into plain weights, or why it does not."""
    life: tuple[str, ...] = ()
    """What happens beside plain gradient steps."""
    original: str = ""
    """``owner/name`` of the original repository, where one is known."""

    @property
    def module(self) -> str:
        return ".".join(["peftlib", "methods", *self.category.split("/"), self.name])

    @property
    def available(self) -> bool:
        """Whether peftlib has this method's file."""
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:
            return False

    @property
    def chapter(self) -> str:
        return category(self.category).chapter
