"""Which stored runs are of a method as it no longer is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from peftlib.conformance import fingerprint
from peftlib.experiments.store import RESULTS, read


@dataclass(frozen=True)
class Stale:
    """A run that measured another behaviour: its file, its method, and both digests."""

    path: Path
    method: str
    then: str
    now: str | None


def stale(root: str | os.PathLike = RESULTS) -> list[Stale]:
    """The runs below a folder of results whose method has another recorded fingerprint today, in the order of their
    paths. A run that is older than fingerprints is held to the first one of its method.

    Raises DataError for a file that is no run.
    """
    recorded = fingerprint.read(root)
    today = {method: recorded.digest(method) for method in recorded.methods}
    found = []
    for path in _runs(Path(root)):
        record = read(path)
        method = record["spec"]["method"]
        now = today.get(method)
        then = record.get("fingerprint") or recorded.first.get(method)
        if then is not None and then != now:
            found.append(Stale(path, method, then, now))
    return found


def _runs(root: Path) -> list[Path]:
    """Finished runs: those of the tracks, and those of searches."""
    return sorted(
        path
        for pattern in ("*/*/*.json", "search/*/*/*.json")
        for path in root.glob(pattern)
        if path.relative_to(root).parts[0] != "failed" and path.stem.count("-") >= 2
    )
