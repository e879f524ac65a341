"""The matrix method x check x family that the conformance suite writes, read for the book."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from peftlib.errors import DataError

FILE = "results/conformance.json"


@dataclass(frozen=True)
class Cell:
    """One check of one method: family -> "yes", "no: reason" or "not supported: reason"."""

    families: dict[str, str]

    @property
    def passed(self) -> list[str]:
        return [f for f, outcome in self.families.items() if outcome == "yes"]

    @property
    def declined(self) -> dict[str, str]:
        """Family -> why the method does not do this there, as its card says."""
        return {f: o.partition(": ")[2] for f, o in self.families.items() if o.startswith("no:")}

    @property
    def failed(self) -> list[str]:
        return [f for f, o in self.families.items() if o == "fails"]

    @property
    def sign(self) -> str:
        """The cell in one or two signs: families passed, ``–`` declined by the card, ``✗`` a broken promise."""
        if self.failed:
            return f"✗{len(self.failed)}"
        if self.declined:
            return f"{len(self.passed)}–" if self.passed else "–"
        return str(len(self.passed)) if self.passed else ""

    def reasons(self) -> list[str]:
        """The reasons of what is declined, each with its families where they are not all."""
        groups: dict[str, list[str]] = {}
        for family, reason in self.declined.items():
            groups.setdefault(reason, []).append(family)
        everywhere = len(groups) == 1 and not self.passed
        return [reason if everywhere else f"{', '.join(families)}: {reason}" for reason, families in groups.items()]


@dataclass(frozen=True)
class Matrix:
    """``checks``: name -> title. ``methods``: method -> check -> cell."""

    checks: dict[str, str]
    methods: dict[str, dict[str, Cell]]

    def tally(self, method: str) -> Counter:
        """How many checks of a method pass, are declined or fail."""
        cells = self.methods.get(method, {}).values()
        return Counter(
            "failed" if c.failed else "declined" if c.declined else "passed" if c.passed else "unsupported"
            for c in cells
        )


def read(root: Path) -> Matrix | None:
    """The committed matrix; None where there is none. Raises DataError for a file that is something else."""
    path = root / FILE
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text())
        return Matrix(
            document["checks"],
            {m: {c: Cell(cells) for c, cells in row.items()} for m, row in document["methods"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not a conformance matrix ({error!r}); write it again with `make conformance`"
        ) from error
