"""The matrix method x check x family, collected from the test reports of one run (of all its workers)."""

from __future__ import annotations

import json
from pathlib import Path

import peftlib
from tests.conformance.case import FAMILIES
from tests.conformance.checks import CHECKS

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "results" / "conformance.json"


def titles() -> dict[str, str]:
    return {check.name: check.title for check in CHECKS.values()}


def document(cells: list[tuple[str, str, str, str]]) -> dict:
    """The JSON document of these (method, check, family, outcome), in the order of the taxonomy and the table."""
    found = {(m, c, f): outcome for m, c, f, outcome in cells}
    return {
        "checks": titles(),
        "methods": {
            method: {
                check: {f: found[method, check, f] for f in FAMILIES if (method, check, f) in found} for check in CHECKS
            }
            for method in peftlib.methods()
        },
    }


def complete(cells: list[tuple[str, str, str, str]]) -> bool:
    """Whether every cell was run."""
    seen = {(m, c, f) for m, c, f, _ in cells}
    return all(
        all((method, name, f) in seen for f in check.families)
        if check.families
        else any((method, name, f) in seen for f in FAMILIES)
        for method in peftlib.methods()
        for name, check in CHECKS.items()
    )


def write(document: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
