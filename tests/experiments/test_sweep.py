"""Sweeps: real runs on the smoke profile, killed for real, and going on."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from peftlib import experiments, sources
from peftlib.errors import UnknownNameError
from peftlib.experiments.sweep import EXECUTORS
from peftlib.mechanisms import importance
from tests.methods.helpers import interrupt, slow_clock

METHODS, SEEDS = ("lora", "head"), (0, 1, 2)

SWEEP = f"""
import sys
from peftlib import experiments
if __name__ == "__main__":
    specs = [experiments.run_spec("smoke", "smoke", m, seed=s) for m in {METHODS} for s in {SEEDS}]
    print(dict(experiments.sweep(specs, experiments.Store(sys.argv[1]), progress=False)))
"""


def specs():
    return [experiments.run_spec("smoke", "smoke", m, seed=s) for m in METHODS for s in SEEDS]


def test_one_run_records_what_ran_what_came_out_and_where(tmp_path):
    store = experiments.Store(tmp_path)
    spec = specs()[0]
    assert experiments.run(spec, store) == "done"
    assert experiments.run(spec, store) == "there"
    (record,) = store.records("smoke")
    assert record["key"] == spec.key and record["spec"]["method"] == "lora"
    for split in ("validation", "test"):
        assert 0 <= record["metrics"][split][record["metric"]] <= 1
    assert record["history"] and record["bytes_on_disk"] > record["count"]["stored_bytes"] > 0
    assert record["count"]["trained"] > record["count"]["head"] > 0
    assert record["provenance"]["versions"]["torch"] and record["provenance"]["date"]


def test_the_same_specification_gives_the_same_result():
    spec = specs()[0]
    first, second = experiments.execute(spec), experiments.execute(spec)
    assert first["metrics"] == second["metrics"] and first["history"] == second["history"]


def test_a_run_that_was_cut_off_in_its_calibration_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "cache_root", lambda: tmp_path)
    slow_clock(monkeypatch)
    spec = experiments.run_spec("smoke", "smoke", "s3delta", options={"budget": 0.03, "steps": 6})
    whole = experiments.execute(spec)
    calls = interrupt(monkeypatch, importance, "loss", at=28)
    with pytest.raises(KeyboardInterrupt):
        experiments.execute(spec)
    (state,) = (tmp_path / "calibrations").iterdir()
    assert spec.key in state.name
    again = experiments.execute(spec)
    assert len(calls) == 28 + 5, "the five steps that were done are not done again"
    assert again["metrics"] == whole["metrics"] and again["history"] == whole["history"]
    assert not state.exists()


def test_a_failing_run_is_recorded_apart_and_does_not_stop_the_sweep(tmp_path):
    store = experiments.Store(tmp_path)
    bad = experiments.run_spec("smoke", "smoke", "lora", options={"targets": ["nowhere"]})
    good = specs()[0]
    outcomes = experiments.sweep([bad, good], store, progress=False)
    assert outcomes["failed"] == 1 and outcomes["done"] == 1
    (failure,) = (tmp_path / "failed").rglob("*.json")
    assert "nowhere" in json.loads(failure.read_text())["error"]
    assert store.has(good) and not store.has(bad)


def test_ray_does_the_same_runs(tmp_path):
    pytest.importorskip("ray", reason="ray is an extra: pip install peftlib[ray]")
    store = experiments.Store(tmp_path)
    bad = experiments.run_spec("smoke", "smoke", "lora", options={"targets": ["nowhere"]})
    spec = specs()[0]
    assert experiments.sweep([bad, spec], store, executor="ray", workers=2, progress=False) == {
        "there": 0,
        "done": 1,
        "failed": 1,
    }
    (record,) = store.records("smoke")
    assert record["metrics"] == experiments.execute(spec)["metrics"]
    assert experiments.sweep([spec], store, executor="ray", progress=False)["there"] == 1


def test_unknown_executor_is_named(tmp_path):
    with pytest.raises(UnknownNameError, match="slurm"):
        experiments.sweep([], experiments.Store(tmp_path), executor="slurm")


def _runs(folder):
    return sorted(p for p in folder.glob("smoke/smoke/*.json"))


def test_a_killed_sweep_goes_on_without_loss_or_double_runs(tmp_path):
    script = tmp_path / "sweep.py"
    script.write_text(SWEEP)
    results = tmp_path / "results"
    command = [sys.executable, str(script), str(results)]
    first = subprocess.Popen(command, start_new_session=True)
    deadline = time.time() + 120
    while len(_runs(results)) < 2 and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    survived = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in _runs(results)}
    assert 2 <= len(survived) < len(specs()), "the kill must fall into the middle of the sweep"
    for _, content in survived.values():
        json.loads(content)

    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == {
        "there": len(survived),
        "done": len(specs()) - len(survived),
    }
    assert len(_runs(results)) == len(specs())
    for path in _runs(results):
        if path.name in survived:
            assert (path.stat().st_mtime_ns, path.read_bytes()) == survived[path.name]


def test_a_search_goes_on_past_an_end_until_the_best_rate_is_inside(tmp_path, monkeypatch):
    store, losses = experiments.Store(tmp_path), {"lora": 2e-5, "head": 5e-4, "prompt_tuning": 0.2}
    names = list(losses)

    def learned(specs, store, workers=1):
        for spec in specs:
            value = abs(math.log(spec.learning_rate / losses[spec.method]))
            if spec.method == "prompt_tuning" and spec.learning_rate < 0.2:
                value = 10 + 1e-4 * spec.learning_rate  # it learns nothing, and the lowest rate is best by chance
            metrics = {split: {"accuracy": -value, "loss": value} for split in ("validation", "test")}
            store.write(spec, {"spec": vars(spec), "metrics": metrics, "metric": "accuracy"})
            yield spec, "done"

    monkeypatch.setitem(EXECUTORS, "local", learned)
    outcomes = experiments.search_rates("smoke", names, store, progress=False)
    tried = {m: sorted(r["spec"]["learning_rate"] for r in store.searched("smoke", "smoke", m)) for m in names}
    assert tried["head"] == sorted(experiments.SEARCH_RATES)
    assert tried["lora"] == sorted([4e-6, 2e-5, *experiments.SEARCH_RATES])
    assert tried["prompt_tuning"] == sorted([*experiments.SEARCH_RATES, 0.05, 0.2, 1.0])
    assert outcomes["done"] == 17
    assert store.best_rate("smoke", "smoke", "lora", "accuracy") == 2e-5
    again = experiments.search_rates("smoke", names, store, progress=False)
    assert again["done"] == 0 and again["there"] == 12
