"""Methods that came after the survey: one file a method, which holds its entry as ``ENTRY``. A new file is found."""

from __future__ import annotations

import importlib
import pkgutil

from peftlib.taxonomy.types import Category, Entry

CATEGORIES = (
    Category(
        "since_survey",
        "Since the survey",
        "Methods that were published after the survey, or that it leaves out.",
    ),
)


def _entries() -> tuple[Entry, ...]:
    """In the order of their arXiv numbers, that is, of time."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    entries = (importlib.import_module(f"{__name__}.{name}").ENTRY for name in names)
    return tuple(sorted(entries, key=lambda entry: (entry.arxiv or "9", entry.name)))


METHODS = _entries()
