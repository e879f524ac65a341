"""Which stored runs can be compared with each other, and what they come to."""

from __future__ import annotations

import statistics
from functools import cached_property
from typing import Any

from peftlib import taxonomy
from peftlib.experiments import RATES, Store, profile, summarize
from peftlib.experiments.spec import comparable
from peftlib.experiments.store import best_rate
from peftlib.methods.registry import find

Record = dict[str, Any]


class Standings:
    """The runs of one profile that can be compared: a track's own settings, the methods' default options."""

    def __init__(self, store: Store, profile_name: str):
        self.store = store
        self.profile = profile(profile_name)

    @property
    def first(self) -> str:
        """The track on which learning rates are searched."""
        return next(iter(self.profile.tracks))

    @cached_property
    def records(self) -> dict[str, list[Record]]:
        """Track -> its comparable runs, at every learning rate."""
        return {
            track: [r for r in self.store.records(self.profile.name, track) if comparable(r["spec"])]
            for track in self.profile.tracks
        }

    @cached_property
    def search(self) -> list[Record]:
        """The runs of the learning-rate search: its rates at seed 0 on the first track."""
        return [r for r in self.records[self.first] if r["spec"]["seed"] == 0 and r["spec"]["learning_rate"] in RATES]

    @cached_property
    def searched_rates(self) -> list[float]:
        """The rates that the search tried with any method, in ascending order."""
        return sorted({r["spec"]["learning_rate"] for r in self.search})

    @cached_property
    def rates(self) -> dict[str, float]:
        """Method -> the rate at which it is compared: what the search found, else the method's own default."""
        searched: dict[str, list[Record]] = {}
        for record in self.search:
            searched.setdefault(record["spec"]["method"], []).append(record)
        return {
            name: best_rate(searched[name], searched[name][0]["metric"])
            if name in searched
            else find(name).learning_rate
            for name in taxonomy.methods()
        }

    @cached_property
    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Track -> one row a method at its rate, best mean first; rows as ``experiments.summarize`` makes them."""
        found = {}
        for track, records in self.records.items():
            chosen = [r for r in records if r["spec"]["learning_rate"] == self.rates[r["spec"]["method"]]]
            summary = summarize(chosen, chosen[0]["metric"]) if chosen else []
            found[track] = sorted(summary, key=lambda row: (-row["mean"], row["trained"]))
        return found

    @cached_property
    def calibration(self) -> list[dict[str, Any]]:
        """One row a method on the first track: how well its probabilities fit, as means over the runs of ``rows``, of
        the negative log-likelihood ``nll`` (nats) and the expected calibration error ``ece`` of the test split; lowest
        ``nll`` first."""
        tests = {r["key"]: r["metrics"]["test"] for r in self.records[self.first]}
        rows = [
            {"method": row["method"], "accuracy": row["mean"]}
            | {name: statistics.mean(tests[key][name] for key in row["runs"]) for name in ("nll", "ece")}
            for row in self.rows[self.first]
        ]
        return sorted(rows, key=lambda row: row["nll"])

    def metric(self, track: str) -> str:
        """The main metric of a track that has runs."""
        return self.records[track][0]["metric"]

    def above_head(self, method: str) -> float | None:
        """How much higher a method's mean on the first track is than that of the head alone; None without both."""
        means = {row["method"]: row["mean"] for row in self.rows[self.first]}
        return means[method] - means["head"] if {method, "head"} <= means.keys() else None

    def of(self, method: str) -> dict[str, dict[str, Any]]:
        """Track -> the row of one method, where it has runs."""
        return {track: row for track, rows in self.rows.items() for row in rows if row["method"] == method}
