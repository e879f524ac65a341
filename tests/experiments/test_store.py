"""The store: records whole or absent, failures apart, one worker a run."""

import json
import multiprocessing
import os
import signal

import pytest

from peftlib import experiments
from peftlib.errors import DataError
from peftlib.methods.registry import find


def record(spec, value=0.5, loss=1.0):
    metrics = {split: {"accuracy": value, "loss": loss} for split in ("validation", "test")}
    return {
        "spec": {**vars(spec)},
        "key": spec.key,
        "metrics": metrics,
        "count": {"trained": 10, "head": 2, "percent": 1.0, "stored_bytes": 40},
        "seconds_per_step": 0.1,
        "peak_memory": 5,
    }


@pytest.fixture
def store(tmp_path):
    return experiments.Store(tmp_path)


def spec(**more):
    return experiments.run_spec("smoke", "smoke", "lora", **more)


def test_written_records_come_back(store):
    path = store.write(spec(), record(spec()))
    assert store.has(spec()) and not store.has(spec(seed=1))
    assert store.records("smoke") == [json.loads(path.read_text())]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_interrupted_write_leaves_the_old_record(store, monkeypatch):
    path = store.write(spec(), record(spec()))
    before = path.read_bytes()

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        store.write(spec(), record(spec(), value=0.9))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_run_from_before_an_option_is_the_run_at_its_default(store):
    old = record(spec())
    del old["spec"]["options"]["dropout"]
    path = store.write(spec(), old)
    path.rename(path.with_name("lora-0-0123456789ab.json"))
    assert store.has(spec())
    other = experiments.run_spec("smoke", "smoke", "lora", options={"dropout": 0.1})
    assert not store.has(other)
    assert not store.has(spec(seed=1))


def test_failures_stand_apart(store):
    done = store.write(spec(), record(spec()))
    failed = store.write(spec(), {"spec": {}, "metrics": {}, "error": "boom"}, failed=True)
    assert failed != done and json.loads(done.read_text())["metrics"]["test"]["accuracy"] == 0.5
    assert len(store.records("smoke")) == 1


def test_a_damaged_record_is_named(store):
    path = store.write(spec(), record(spec()))
    path.write_text(path.read_text()[:50])
    with pytest.raises(DataError, match=path.name):
        store.records("smoke")


def test_best_rate_is_chosen_on_validation_data(store):
    for rate, validation, loss, test in (
        (1e-4, 0.6, 0.5, 0.9),
        (5e-4, 0.78, 1.0, 0.1),
        (2e-3, 0.78, 1.0, 0.1),
        (1e-2, 0.8, 2.0, 0.1),
        (3e-3, 0.9, 0.1, 0.1),
    ):
        s = spec(learning_rate=rate)
        r = record(s, test)
        r["metrics"]["validation"] = {"accuracy": validation, "loss": loss}
        store.write(s, r)
    other = spec(learning_rate=2e-3, options={"rank": 2})
    store.write(other, record(other, 1.0, 0.0))
    assert store.best_rate("smoke", "smoke", "lora", "accuracy") == 5e-4  # 3e-3 is no rate of the search
    assert store.best_rate("smoke", "smoke", "head", "accuracy") is None


def test_where_no_rate_learned_the_method_keeps_its_own(store):
    own = find("lora").learning_rate
    for rate, validation in ((1e-4, 0.55), (own, 0.5), (1e-2, 0.52)):
        s = spec(learning_rate=rate)
        store.write(s, record(s, validation))
    assert store.best_rate("smoke", "smoke", "lora", "accuracy") == own


def test_summary_has_spread_over_seeds_and_names_its_runs(store):
    values = {0: 0.5, 1: 0.7, 2: 0.9}
    for seed, value in values.items():
        store.write(spec(seed=seed), record(spec(seed=seed), value))
    (row,) = experiments.summarize(store.records("smoke"), "accuracy")
    assert row["mean"] == pytest.approx(0.7) and row["std"] == pytest.approx(0.2)
    assert row["seeds"] == [0, 1, 2] and row["runs"] == sorted(spec(seed=s).key for s in values)


def _hold(root, ready, release):
    with experiments.Store(root).claim(spec()) as mine:
        ready.put(mine)
        release.wait(60)


def test_a_claim_excludes_others_and_dies_with_its_process(store):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Queue(), context.Event()
    process = context.Process(target=_hold, args=(store.root, ready, release))
    process.start()
    assert ready.get(timeout=60) is True
    with store.claim(spec()) as mine:
        assert mine is False
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with store.claim(spec()) as mine:
        assert mine is True


def test_no_claim_on_what_is_done(store):
    store.write(spec(), record(spec()))
    with store.claim(spec()) as mine:
        assert mine is False
