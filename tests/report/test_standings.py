"""Only comparable runs are compared, each method at the rate that the search found."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest

from peftlib import taxonomy
from peftlib.experiments import SEARCH_RATES, Store
from peftlib.methods.registry import find
from peftlib.report import Standings

from .stored import TRAINED, make, put

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path):
    return make(tmp_path)


def test_the_rate_is_chosen_on_validation_data_though_another_is_better_on_test(store):
    standings = Standings(store, "embedded")
    assert {5e-4, 2e-3} <= set(SEARCH_RATES)
    rows = {row["method"]: row for row in standings.rows["few-shot"]}
    assert set(rows) == set(TRAINED)
    for number, method in enumerate(TRAINED):
        assert standings.rates[method] == rows[method]["learning_rate"] == 2e-3
        assert rows[method]["mean"] == pytest.approx(0.71 + 0.02 * number)
        assert rows[method]["std"] == pytest.approx(0.01)
        assert rows[method]["seeds"] == [0, 1, 2]


def test_rows_are_best_first_and_name_their_runs(store):
    rows = Standings(store, "embedded").rows["few-shot"]
    assert [row["mean"] for row in rows] == sorted((row["mean"] for row in rows), reverse=True)
    keys = {r["key"] for r in store.records("embedded", "few-shot") if r["spec"]["learning_rate"] == 2e-3}
    assert {key for row in rows for key in row["runs"]} == keys


def test_calibration_is_the_mean_over_the_same_runs_most_likely_first(store):
    rows = Standings(store, "embedded").calibration
    assert [row["method"] for row in rows] == list(TRAINED)[::-1]
    for number, row in enumerate(rows[::-1]):
        accuracy = 0.71 + 0.02 * number
        assert (row["accuracy"], row["nll"], row["ece"]) == pytest.approx((accuracy, 1 - accuracy, accuracy / 10))


def test_runs_with_other_options_or_settings_stay_out(store):
    before = Standings(store, "embedded").rows["few-shot"]
    put(store, "lora", rate=2e-3, test=0.1, validation=0.1, options={"rank": 4})
    put(store, "lora", rate=2e-3, test=0.1, validation=0.1, changes={"epochs": 1})
    assert len(store.records("embedded", "few-shot", "lora")) == 6
    assert Standings(store, "embedded").rows["few-shot"] == before


def test_without_a_search_the_methods_own_rate_counts(tmp_path):
    store = Store(tmp_path / "results")
    own = find("lora").learning_rate
    put(store, "lora", rate=own, seed=1, test=0.7, validation=0.7)
    put(store, "lora", rate=7e-4, seed=1, test=0.9, validation=0.9)
    (row,) = Standings(store, "embedded").rows["few-shot"]
    assert row["learning_rate"] == own
    assert row["mean"] == 0.7


def test_the_search_is_on_the_first_track_at_seed_0(store):
    put(store, "lora", rate=5e-4, test=0.8, validation=0.8, track="sentences")
    search = Standings(store, "embedded").search
    assert len(search) == 2 * len(TRAINED)
    assert {r["spec"]["seed"] for r in search} == {0}
    assert {r["spec"]["track"] for r in search} == {"few-shot"}


def test_an_empty_store_has_no_rows(tmp_path):
    standings = Standings(Store(tmp_path / "results"), "embedded")
    assert standings.rows == {track: [] for track in standings.profile.tracks}
    assert standings.search == []
    assert list(standings.rates) == taxonomy.methods()
    assert standings.of("lora") == {}


def test_a_method_that_is_not_better_than_the_head_says_why():
    standings = Standings(Store(ROOT / "results"), "embedded")
    for entry in taxonomy.METHODS:
        above = standings.above_head(entry.name)
        if above is not None and entry.name != "head":
            assert (above <= 0) == bool(entry.below_head), f"{entry.name} is {above:+.3f} from the head alone"


def test_default_rates_are_those_that_the_stored_search_found():
    standings = Standings(Store(ROOT / "results"), "embedded")
    for name in {r["spec"]["method"] for r in standings.search}:
        assert find(name).learning_rate == standings.rates[name], name


def test_laplace_lora_is_better_calibrated_than_lora_at_the_same_rate_and_seeds():
    """The claim of its paper, on the stored runs: no change of what is answered, but better probabilities."""
    standings = Standings(Store(ROOT / "results"), "embedded")
    rate = standings.rates["laplace_lora"]
    tests = {
        method: {
            r["spec"]["seed"]: r["metrics"]["test"]
            for r in standings.store.records("embedded", "few-shot", method)
            if r["spec"]["learning_rate"] == rate
        }
        for method in ("lora", "laplace_lora")
    }
    seeds = tests["lora"].keys() & tests["laplace_lora"].keys()
    assert len(seeds) >= 3
    for metric in ("nll", "ece"):
        plain, laplace = (mean(tests[method][seed][metric] for seed in seeds) for method in tests)
        assert laplace < plain, metric
