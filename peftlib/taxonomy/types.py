"""What a category and a method's entry hold."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from peftlib.errors import EntryError, UnknownNameError

_PACKAGE = Path(__file__).resolve().parent.parent

# The design space of the methods, after the dimensions of He et al. 2022, arXiv:2110.04366. Their table places
# adapters, prefix tuning, LoRA and their own variants by the form of the change, the representation that it modifies,
# its insertion (sequential or parallel) and its composition (added, scaled, gated). The words for methods that their
# table does not have, and the places of these methods, are ours.

FORMS = {
    "bottleneck": "down, nonlinearity, up",
    "low-rank": "product of thin matrices",
    "attention": "softmax over trained keys or layers",
    "vector": "a trained vector",
    "network": "a network beside the backbone",
    "entries": "chosen entries of the weights",
    "tensors": "whole tensors",
    "projection": "image of a small vector",
    "rotation": "orthogonal matrix",
}
INSERTIONS = {
    "sequential": "reads what it changes",
    "parallel": "reads the input of what it changes",
    "input": "stands among the inputs",
    "in place": "is the network's own weights",
    "beside": "reads the network, which does not read it",
}
COMPOSITIONS = {
    "added": "h + delta",
    "scaled": "h + s delta, s fixed",
    "gated": "h + g delta or (1 - g) h + g delta, g trained or computed",
    "multiplied": "scale o h, mask o W",
    "joined": "among the tokens, or the weights of a softmax",
    "replaced": "new values for old ones",
}
REPRESENTATIONS = {
    "input": ("embeddings",),
    "attention": ("attention.query", "attention.key", "attention.value", "attention.heads", "attention.output"),
    "feed-forward": ("ffn.up", "ffn.gate", "ffn.down"),
    "hidden state": ("layers",),
    "norms": ("norms",),
    "all weights": ("weights", "biases"),
    "output": ("head",),
}
"""What is modified: a kind of representation, and the sites that are of it."""


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
SIZES = ("L", "d", "f", "H", "V", "total", "head", "pooler", "sources")
"""What a parameter formula may name beside a config's fields; see :attr:`Entry.count`."""

Start = Literal["identity", "near", "changed"]
Merge = Literal["exact", "no"]
Origin = Literal["survey", "since the survey", "baseline", "yours"]


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
    """What is known of a method before any code runs. Raises EntryError that names a field which is empty or wrong."""

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
    form: str
    """What form its change has: a word of ``FORMS``, or several with " + " where it has several modules."""
    insertion: str
    """Where its change stands: words of ``INSERTIONS``, as in :attr:`form`."""
    composition: str
    """How its change is composed with what was there: words of ``COMPOSITIONS``, as in :attr:`form`."""
    trains: str
    """What is trained, in words."""
    count: str
    """Trained parameters without the task head on an encoder, right after attaching (where calibration chooses a mask:
    the entries that it will choose). A Python expression over L, d, f, H, V (layers, hidden size, inner size, heads,
    vocabulary), total (the backbone's parameters without the task head), head (the task head's parameters), pooler
    (1 where the backbone has one below its head, as BERT has, else 0), sources (the adapters that it builds on)
    and the fields of the method's config."""
    start: Start
    """Output right after attaching: exactly the backbone's, close to it, or different by nature."""
    start_note: str
    merge: Merge
    merge_note: str
    """How it folds into plain weights, or why it does not."""
    life: tuple[str, ...] = ()
    """What happens beside plain gradient steps."""
    original: str = ""
    """``owner/name`` of the original repository, where one is known."""
    below_head: str = ""
    """Why it is not better than the head alone on the measured few-shot track, where it is not."""
    tiny: dict[str, Any] = field(default_factory=dict)
    """Options for the tiny models of the conformance suite (two layers of width 32), where the defaults do not fit."""
    tiny_rate: float | None = None
    """The learning rate with which it learns eight texts there, where ten times its own does not suit."""
    exceptions: dict[str, str] = field(default_factory=dict)
    """What it cannot do of what every method must: name of a conformance check, or "check on family" -> why. The suite
    sees to it that a check named here really fails."""
    origin: Origin = "yours"
    location: str = ""
    """The module of a method from outside of peftlib; :func:`peftlib.register` fills it in."""

    def __post_init__(self) -> None:
        for name in ("name", "category", "title", "cite", "summary", "equation", "symbols", "trains", "count"):
            if not getattr(self, name):
                raise EntryError(self.name, name, "is empty")
        if not self.name.isidentifier():
            raise EntryError(self.name, "name", f"is {self.name!r}, which cannot be the name of a module")
        for name, known in (("form", FORMS), ("insertion", INSERTIONS), ("composition", COMPOSITIONS)):
            for word in self._words(name):
                if word not in known:
                    raise EntryError(self.name, name, f"has {word!r}; known are {', '.join(known)}")
        for name, values in (("start", get_args(Start)), ("merge", get_args(Merge)), ("origin", get_args(Origin))):
            if getattr(self, name) not in values:
                raise EntryError(self.name, name, f"is {getattr(self, name)!r}; known are {', '.join(values)}")
        try:
            ast.parse(self.count, mode="eval")
        except SyntaxError as error:
            raise EntryError(self.name, "count", f"is no formula: {error.msg} in {self.count!r}") from None

    def _words(self, name: str) -> tuple[str, ...]:
        return tuple(getattr(self, name).split(" + "))

    @property
    def module(self) -> str:
        """The dotted name of the method's module, or of its package."""
        return self.location or ".".join(["peftlib", "methods", *self.category.split("/"), self.name])

    @property
    def file(self) -> str:
        """The file that holds the class of a method of peftlib, relative to the folder that holds ``peftlib``."""
        path = self.module.replace(".", "/")
        return f"{path}/method.py" if (_PACKAGE.parent / path).is_dir() else f"{path}.py"

    @property
    def modifies(self) -> tuple[str, ...]:
        """The kinds of representation that it changes."""
        return tuple(kind for kind, words in REPRESENTATIONS.items() if any(site in words for site in self.sites))

    @property
    def place(self) -> tuple[tuple[str, ...], ...]:
        """The words for its form, what it modifies, its insertion and its composition."""
        return self._words("form"), self.modifies, self._words("insertion"), self._words("composition")

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
            raise EntryError(self.name, "count", f"gives {number!r}, which is no whole number")
        return int(number)

    def check_count(self, options: Iterable[str]) -> None:
        """Raise EntryError where the formula names something that is neither a size of the backbone nor an option."""
        options, tree = tuple(options), ast.parse(self.count, mode="eval")
        bound = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        known = {*SIZES, *_FUNCTIONS, *options, *bound}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id not in known:
                raise EntryError(self.name, "count", f"names {node.id!r}; known are {', '.join((*SIZES, *options))}")


@dataclass(frozen=True)
class Node:
    """A category with the methods right in it and the categories below it."""

    category: Category
    entries: tuple[Entry, ...] = ()
    children: tuple[Node, ...] = field(default=())
