"""The suite: every check of a method on every family, as cells of the matrix."""

from __future__ import annotations

from pathlib import Path

from peftlib.conformance.checks import CHECKS, Declined
from peftlib.errors import PeftlibError, UnsupportedError
from peftlib.methods import find


def outcome(method: str, name: str, family: str, tmp: Path) -> str:
    """The cell of the matrix: "yes", "no: reason" or "not supported: reason". Raises where a promise is broken."""
    check = CHECKS[name]
    case = check.case(method, family)
    try:
        case.start()
    except UnsupportedError as error:
        return f"not supported: {error}"
    exceptions = find(method).exceptions
    reason = exceptions.get(f"{name} on {family}", exceptions.get(name))
    try:
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
