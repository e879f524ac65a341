"""The errors a user can meet. Each message names the value that was wrong and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PeftlibError(Exception):
    """Base of every error that peftlib raises on purpose."""


class UnknownNameError(PeftlibError, ValueError):
    """A method, family, task, backbone or profile that does not exist."""

    def __init__(self, kind: str, name: object, known: Iterable[str], hint: str = ""):
        known = list(known)
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        message = f"unknown {kind} {name!r}"
        if near:
            message += "; did you mean " + " or ".join(repr(n) for n in near) + "?"
        message += f" Known: {', '.join(known)}."
        super().__init__(message + (f" {hint}" if hint else ""))


class ConfigError(PeftlibError, ValueError):
    """A value that a method's config cannot have."""


class EntryError(PeftlibError, ValueError):
    """A method's entry in which a field is missing, wrong or taken: ``entry`` and ``field`` say which."""

    def __init__(self, entry: str, field: str, problem: str):
        self.entry, self.field = entry, field
        super().__init__(f"entry of {entry or 'a method'}: {field} {problem}")


class TargetError(PeftlibError, ValueError):
    """A target that matches nothing, or a value that does not fit the matrix it is meant for."""


class UnsupportedError(PeftlibError, ValueError):
    """A method that this backbone, task or model class cannot host."""


class StateError(PeftlibError, RuntimeError):
    """An operation that does not fit the current state: attaching twice, training without the lifecycle."""


class MergeError(PeftlibError, RuntimeError):
    """A method that cannot be folded into plain backbone weights."""


class LoadError(PeftlibError, ValueError):
    """A saved adapter that is damaged or was made for another backbone or method."""


class DataError(PeftlibError, ValueError):
    """Data that a task cannot use: no labels, missing columns, an empty split."""


class SourceError(PeftlibError, OSError):
    """A model or data set that its source does not have, or that cannot be reached without a network."""
