"""The recorded behaviour of every method, and how a run that is out of date is found."""

from __future__ import annotations

import json
import shutil

import pytest

import peftlib
from peftlib import experiments
from peftlib.cli import main
from peftlib.conformance import fingerprint
from peftlib.errors import DataError
from tests.conformance.matrix import ROOT

RESULTS = ROOT / "results"


@pytest.mark.parametrize("method", peftlib.methods())
def test_a_method_does_what_is_recorded(method):
    recorded = fingerprint.read(RESULTS).methods
    assert method in recorded, f"record it: peftlib fingerprint --record {method}"
    found = fingerprint.differences(recorded[method], fingerprint.take(method))
    assert not found, f"{found[:3]}; if that is meant: peftlib fingerprint --record {method}"


def test_only_registered_methods_are_recorded():
    assert fingerprint.read(RESULTS).methods.keys() == set(peftlib.methods())


def test_another_behaviour_is_another_fingerprint(monkeypatch):
    recorded = fingerprint.read(RESULTS).methods["lora"]
    config = peftlib.find("lora").Config
    scale = config.scale_at
    monkeypatch.setattr(config, "scale_at", lambda config, site: scale(config, site) * (1 + 1e-5))
    found = fingerprint.differences(recorded, fingerprint.take("lora"))
    assert any("losses" in line for line in found)
    assert any("file" in line for line in found)
    assert any("merged" in line for line in found)


def test_differences_name_the_place():
    one = {"bert": {"losses": [0.5, 0.25], "file": {"x.A": ["float64", 1.0, 4, 32]}}}
    other = {"bert": {"losses": [0.5, 0.25 + 1e-7], "file": {"x.A": ["float64", 1.0, 8, 32]}}}
    assert fingerprint.differences(one, one) == []
    assert fingerprint.differences(one, other) == ["/bert/file/x.A[2]: 4 is now 8"]
    assert len(fingerprint.differences(one, other, tolerance=1e-9)) == 2
    assert fingerprint.differences(one, {"bert": "not supported: no biases"})


@pytest.fixture
def results(tmp_path):
    """A folder with the recorded fingerprints and one run."""
    shutil.copy(RESULTS / fingerprint.FILE, tmp_path)
    spec = experiments.run_spec("smoke", None, "bitfit")
    assert experiments.run(spec, experiments.Store(tmp_path)) == "done"
    return tmp_path


def test_a_run_is_stale_once_its_method_does_something_else(results, capsys):
    recorded = fingerprint.read(results)
    (run,) = experiments.Store(results).records("smoke")
    assert run["fingerprint"] == recorded.digest("bitfit")
    assert experiments.stale(results) == []
    assert main(["stale", "--results", str(results)]) == 0

    other = json.loads(json.dumps(recorded.methods["bitfit"]))
    other["bert"]["losses"][0] += 0.1
    recorded.record("bitfit", other)
    fingerprint.write(results, recorded)
    (found,) = experiments.stale(results)
    assert (found.method, found.then, found.now) == ("bitfit", run["fingerprint"], recorded.digest("bitfit"))
    assert main(["stale", "--results", str(results)]) == 1
    assert "bitfit-0-" in capsys.readouterr().out


def test_a_run_without_a_fingerprint_is_held_to_the_first_one(results):
    (path,) = results.glob("smoke/*/*.json")
    run = json.loads(path.read_text())
    del run["fingerprint"]
    path.write_text(json.dumps(run))
    assert experiments.stale(results) == []
    recorded = fingerprint.read(results)
    recorded.record("bitfit", {"bert": "not supported: tried"})
    fingerprint.write(results, recorded)
    assert [found.path for found in experiments.stale(results)] == [path]


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / fingerprint.FILE).write_text("[1")
    with pytest.raises(DataError, match=fingerprint.FILE):
        fingerprint.read(tmp_path)
    assert fingerprint.read(tmp_path / "none").methods == {}


def test_the_command_says_what_changed_and_records_it_when_asked(tmp_path, capsys):
    call = ["fingerprint", "head", "--results", str(tmp_path)]
    assert main(call) == 1
    assert "head: " in capsys.readouterr().out
    assert not (tmp_path / fingerprint.FILE).exists()
    assert main([*call, "--record"]) == 0
    assert main([*call, "--tolerance", "1e-9"]) == 0
