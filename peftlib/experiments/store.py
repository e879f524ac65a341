"""The store of results: one small JSON file a run, written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from peftlib import taxonomy
from peftlib.conformance import fingerprint
from peftlib.errors import DataError
from peftlib.experiments.spec import RATES, RunSpec, comparable, with_defaults
from peftlib.methods.registry import find
from peftlib.sources import write_text

RESULTS = Path("results")


def read(path: Path) -> dict[str, Any]:
    """One run record. Raises DataError naming the file when it is not one."""
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); delete it and run the sweep again") from error
    if not isinstance(record, dict) or "spec" not in record or "metrics" not in record:
        raise DataError(f"{path} is not a run record; records have 'spec' and 'metrics'")
    return record


def _completed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with all options of its method, where peftlib has the method."""
    spec = record["spec"]
    if spec["method"] not in taxonomy.methods():
        return record
    return record | {"spec": spec | {"options": with_defaults(spec["method"], spec["options"])}}


TIE = 0.03
"""Differences of a validation metric that the search takes for noise: the standard error of an accuracy between 0.5 and
0.7 on the few-shot track's 256 rows is 0.03."""


def write_json(path: Path, document: dict[str, Any]) -> Path:
    """Write a document as one step."""
    return write_text(path, json.dumps(document, indent=1, sort_keys=True) + "\n")


class Store:
    """Runs below one folder: ``<profile>/<track>/<method>-<seed>-<key>.json``; failures in ``failed/`` beside them."""

    def __init__(self, root: str | os.PathLike = RESULTS):
        self.root = Path(root)

    def path(self, spec: RunSpec) -> Path:
        return self.root / spec.profile / spec.track / f"{spec.method}-{spec.seed}-{spec.key}.json"

    def has(self, spec: RunSpec) -> bool:
        """Whether the run is there, also from before its method got options that the run leaves at their defaults."""
        if self.path(spec).is_file():
            return True
        asked = dataclasses.asdict(spec)
        return any(r["spec"] == asked for r in self.records(spec.profile, spec.track, spec.method))

    def write(self, spec: RunSpec, record: dict[str, Any], *, failed: bool = False) -> Path:
        """Write a record. A failed one goes to ``failed/`` and never replaces a result."""
        path = self.path(spec)
        if failed:
            path = self.root / "failed" / path.relative_to(self.root)
        write_json(path, record)
        return path

    def fingerprint(self, method: str) -> str | None:
        """The digest of a method's recorded behaviour, for a new run to carry; None where nothing is recorded."""
        return fingerprint.read(self.root).digest(method)

    @contextmanager
    def claim(self, spec: RunSpec) -> Iterator[bool]:
        """Whether this process may do the run: False when it is done, or another living process is at it.

        The operating system frees the claim of a process that was killed.
        """
        locks = self.root / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{spec.key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield not self.has(spec)
        finally:
            lock.release()

    def records(self, profile: str, track: str | None = None, method: str | None = None) -> list[dict[str, Any]]:
        """All finished runs that match, in the order of their paths; options that a method got later are at their
        defaults."""
        pattern = f"{track or '*'}/{method or '*'}-*-*.json"
        found = [read(path) for path in sorted((self.root / profile).glob(pattern))]
        return [_completed(r) for r in found if method is None or r["spec"]["method"] == method]

    def searched(self, profile: str, track: str, method: str, seed: int = 0) -> list[dict[str, Any]]:
        """The comparable runs at one seed and at the rates of the search."""
        found = [r for r in self.records(profile, track, method) if comparable(r["spec"])]
        return [r for r in found if r["spec"]["seed"] == seed and r["spec"]["learning_rate"] in RATES]

    def best_rate(self, profile: str, track: str, method: str, metric: str, seed: int = 0) -> float | None:
        """The learning rate with the best validation metric at one seed, of the runs that can be compared with other
        methods' (default options, the track's settings); None without such runs.

        Values within ``TIE`` of the best are equally good: of these the run with the lowest validation loss decides,
        then the smaller rate. Where the runs did not decide (:func:`decided`), it is the method's own rate.
        """
        runs = self.searched(profile, track, method, seed)
        return best_rate(runs, metric) if runs else None


def best_rate(runs: Sequence[dict[str, Any]], metric: str) -> float:
    """The learning rate of the best of a search's runs; see :meth:`Store.best_rate`."""
    own = find(runs[0]["spec"]["method"]).learning_rate
    if not decided(runs, metric) and any(r["spec"]["learning_rate"] == own for r in runs):
        return own
    best = max(r["metrics"]["validation"][metric] for r in runs)
    good = [r for r in runs if r["metrics"]["validation"][metric] >= best - TIE]
    return min((r["metrics"]["validation"]["loss"], r["spec"]["learning_rate"]) for r in good)[1]


def decided(runs: Sequence[dict[str, Any]], metric: str) -> bool:
    """Whether a search's runs differ by more than noise on validation data, by 4 ``TIE``: the best and the worst of
    eight that have learned nothing are about 3 apart."""
    values = [r["metrics"]["validation"][metric] for r in runs]
    return max(values) - min(values) > 4 * TIE


def summarize(records: list[dict[str, Any]], metric: str, split: str = "test") -> list[dict[str, Any]]:
    """One row a method, settings and rate: mean and standard deviation of a metric over seeds, sizes and costs.

    Rows carry ``method``, ``track``, ``learning_rate``, ``options``, ``seeds``, ``mean``, ``std`` (0 for one seed),
    ``trained``, ``head``, ``percent``, ``stored_bytes``,
    ``seconds_per_step``, ``peak_memory`` and ``runs`` (their keys).
    """
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        spec = record["spec"]
        key = (spec["track"], spec["method"], spec["learning_rate"], json.dumps(spec["options"], sort_keys=True))
        groups.setdefault(key, []).append(record)
    rows = []
    for (track, method, rate, options), runs in groups.items():
        values = [r["metrics"][split][metric] for r in runs]
        first = runs[0]
        rows.append(
            {
                "track": track,
                "method": method,
                "learning_rate": rate,
                "options": json.loads(options),
                "seeds": sorted(r["spec"]["seed"] for r in runs),
                "mean": statistics.mean(values),
                "std": statistics.stdev(values) if len(values) > 1 else 0.0,
                "trained": first["count"]["trained"],
                "head": first["count"]["head"],
                "percent": first["count"]["percent"],
                "stored_bytes": first["count"]["stored_bytes"],
                "seconds_per_step": statistics.median(r["seconds_per_step"] for r in runs),
                "peak_memory": max(r["peak_memory"] for r in runs),
                "runs": sorted(r["key"] for r in runs),
            }
        )
    return rows
