"""What a category and a method's entry hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peftlib.errors import UnknownNameError
from peftlib.taxonomy.design import DESIGNS, Design, modified

_PACKAGE = Path(__file__).resolve().parent.parent
_FUNCTIONS = {
    "ceil": math.ceil,
    "enumerate": enumerate,
    "int": int,
    "len": len,
    "max": max,
    "min": min,
    "round": round,
    "sum": sum,
}


@dataclass(frozen=True)
class Category:
    """A node of the tree. ``path`` is its folder below ``peftlib/methods/``."""

    path: str
    title: str
    summary: str
    chapter: str = ""
    """The notebook of this category (without suffix) below ``notebooks/``; empty for inner nodes."""

    @property
    def parent(self) -> str:
        """The path of the category above; empty at the top."""
        return self.path.rpartition("/")[0]


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
    """Trained parameters without the task head on an encoder, right after attaching (where calibration chooses a mask:
    the entries that it will choose). A Python expression over L, d, f, H, V (layers, hidden size, inner size, heads,
    vocabulary), total (the backbone's parameters without the task head), head (the task head's parameters), pooler
    (1 where the backbone has one below its head, as BERT has, else 0), sources (the adapters that it builds on)
    and the fields of the method's config."""
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
    below_head: str = ""
    """Why it is not better than the head alone on the measured few-shot track, where it is not."""

    @property
    def module(self) -> str:
        """The dotted name of the method's module, or of its package."""
        return ".".join(["peftlib", "methods", *self.category.split("/"), self.name])

    @property
    def file(self) -> str:
        """The file that holds the method's class, relative to the folder that holds ``peftlib``."""
        path = self.module.replace(".", "/")
        return f"{path}/method.py" if (_PACKAGE.parent / path).is_dir() else f"{path}.py"

    @property
    def design(self) -> Design:
        """What form its change has, how it is inserted and how it is composed."""
        return DESIGNS[self.name]

    @property
    def modifies(self) -> tuple[str, ...]:
        """The kinds of representation that it changes."""
        return modified(self.sites)

    @property
    def place(self) -> tuple[tuple[str, ...], ...]:
        """The words for its form, what it modifies, its insertion and its composition."""
        return self.design.form, self.modifies, self.design.insertion, self.design.composition

    @property
    def available(self) -> bool:
        """Whether peftlib has this method's file. Looks, and imports nothing."""
        return (_PACKAGE.parent / self.file).is_file()

    @property
    def chapter(self) -> str:
        """The notebook that holds the method, without suffix."""
        from peftlib.taxonomy import category

        return category(self.category).chapter

    def trained(self, **values: Any) -> int:
        """Evaluate :attr:`count`: the trained parameters without the task head.

        ``values`` are the backbone's sizes and the config's fields. Raises UnknownNameError for a name that the
        expression needs and ``values`` lacks.
        """
        try:
            number = eval(self.count, {"__builtins__": {}, **_FUNCTIONS, **values})
        except NameError as error:
            raise UnknownNameError(f"value in the parameter formula of {self.name}", error.name, values) from None
        if number != int(number):
            raise ValueError(f"the parameter formula of {self.name} gives {number!r}, which is no whole number")
        return int(number)


@dataclass(frozen=True)
class Node:
    """A category with the methods right in it and the categories below it."""

    category: Category
    entries: tuple[Entry, ...] = ()
    children: tuple[Node, ...] = field(default=())
