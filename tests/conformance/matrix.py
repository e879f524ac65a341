"""The matrix method x check x family, collected from the test reports of one run (of all its workers)."""

from __future__ import annotations

import json
from pathlib import Path

import peftlib
from peftlib.conformance.case import FAMILIES
from peftlib.conformance.checks import CHECKS

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "results" / "conformance.json"


def titles() -> dict[str, str]:
    return {check.name: check.title for check in CHECKS.values()}


def cell(document: dict, method: str, check: str, family: str) -> str | None:
    """What a document says of one cell; None where it knows nothing of it."""
    return document["methods"].get(method, {}).get(check, {}).get(family)


def updated(document: dict, cells: list[tuple[str, str, str, str]]) -> dict:
    """The document with these (method, check, family, outcome), in the order of the taxonomy and the table; methods
    and checks that are no more are left out."""
    found = {(m, c, f): outcome for m, c, f, outcome in cells}
    rows = {}
    for method in peftlib.methods():
        rows[method] = {
            check: {
                f: outcome
                for f in FAMILIES
                if (outcome := found.get((method, check, f)) or cell(document, method, check, f)) is not None
            }
            for check in CHECKS
        }
    return {"checks": titles(), "methods": {m: checks for m, checks in rows.items() if any(checks.values())}}


def write(document: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
