"""The suite: every check of a method on every family, as cells of the matrix."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from peftlib.conformance.case import FAMILIES, supported_family
from peftlib.conformance.checks import CHECKS, Declined
from peftlib.errors import PeftlibError, UnknownNameError, UnsupportedError
from peftlib.mechanisms import tasks
from peftlib.taxonomy import entry

SIGNS = ("yes", "no", "not supported", "fails")
"""How a cell of the matrix begins."""


def run(
    method: str, families: Collection[str] = (), checks: Collection[str] = ()
) -> Iterator[tuple[str, dict[str, str]]]:
    """Each check with its cells, family -> one of ``SIGNS`` and the reason; by default all checks on all families.

    Raises UnknownNameError for a method, family or check that does not exist.
    """
    for kind, names, known in (("family", families, FAMILIES), ("check", checks, CHECKS)):
        for name in names:
            if name not in known:
                raise UnknownNameError(kind, name, known)
    for name in checks or CHECKS:
        cells = {}
        for family in CHECKS[name].families or (supported_family(method),):
            if not families or family in families:
                with tempfile.TemporaryDirectory() as scratch:
                    try:
                        cells[family] = outcome(method, name, family, Path(scratch))
                    except Exception as error:  # whatever it is, it is this cell's
                        cells[family] = f"fails: {type(error).__name__}: {error}"
        yield name, cells


def outcome(method: str, name: str, family: str, tmp: Path) -> str:
    """The cell of the matrix: "yes", "no: reason" or "not supported: reason". Raises where a promise is broken."""
    check = CHECKS[name]
    case = check.case(method, family)
    try:
        case.start()
    except UnsupportedError as error:
        return f"not supported: {error}"
    exceptions = entry(method).exceptions
    reason = exceptions.get(f"{name} on {family}", exceptions.get(name))
    try:
        with tasks.unnamed_rows(0):
            check.run(case, tmp)
    except UnsupportedError as error:
        return f"not supported: {error}"
    except Declined as declined:
        return f"no: {declined}"
    except (AssertionError, PeftlibError):
        if reason is None:
            raise
        return f"no: {reason}"
    if reason is not None:
        raise AssertionError(f"{method} says that it fails {name!r} ({reason}), but it passes: remove the exception")
    return "yes"
