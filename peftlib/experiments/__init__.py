"""Experiments: what a run is, one run, the store of results, and sweeps that can be killed at any moment."""

from peftlib.experiments.run import Trained, execute, run, train
from peftlib.experiments.spec import PROFILES, SEARCH_RATES, Profile, RunSpec, Track, profile, run_spec, search_specs
from peftlib.experiments.store import TIE, Store, summarize
from peftlib.experiments.sweep import sweep

__all__ = [
    "PROFILES",
    "SEARCH_RATES",
    "TIE",
    "Profile",
    "RunSpec",
    "Store",
    "Track",
    "Trained",
    "execute",
    "profile",
    "run",
    "run_spec",
    "search_specs",
    "summarize",
    "sweep",
    "train",
]
