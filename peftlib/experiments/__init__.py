"""Experiments: what a run is, one run, the store of results, and sweeps that can be killed at any moment."""

from peftlib.experiments.costs import read_costs, write_costs
from peftlib.experiments.run import Trained, execute, run, train
from peftlib.experiments.search import (
    Log,
    SearchSpec,
    logs,
    read_log,
    search,
    search_structures,
    structure_search,
    structure_specs,
)
from peftlib.experiments.spec import (
    PROFILES,
    RATES,
    SEARCH_RATES,
    Profile,
    RunSpec,
    Track,
    next_rate,
    profile,
    run_spec,
    search_specs,
)
from peftlib.experiments.stale import Stale, stale
from peftlib.experiments.store import TIE, Store, summarize
from peftlib.experiments.sweep import search_rates, sweep

__all__ = [
    "PROFILES",
    "RATES",
    "SEARCH_RATES",
    "TIE",
    "Log",
    "Profile",
    "RunSpec",
    "SearchSpec",
    "Stale",
    "Store",
    "Track",
    "Trained",
    "execute",
    "logs",
    "next_rate",
    "profile",
    "read_costs",
    "read_log",
    "run",
    "run_spec",
    "search",
    "search_rates",
    "search_specs",
    "search_structures",
    "stale",
    "structure_search",
    "structure_specs",
    "summarize",
    "sweep",
    "train",
    "write_costs",
]
