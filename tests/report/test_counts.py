"""Counts on published shapes: the survey's numbers, honest refusals, and a cache that knows when it is stale."""

from __future__ import annotations

import json

import pytest

from peftlib import taxonomy
from peftlib.report import counts


def test_lora_comes_out_as_the_survey_prints_it():
    assert counts.count("lora", "roberta-base")["trained"] == 887_042
    assert counts.count("lora", "t5-base")["trained"] == 884_736
    large = counts.count("lora", "llama-7b", rank=64, targets="all-linear")
    assert (large["trained"], large["total"]) == (159_907_840, 6_738_415_616)


def test_a_family_that_cannot_host_a_method_says_why():
    found = counts.count("bitfit", "llama-7b")
    assert set(found) == {"unsupported"}
    assert "bias" in found["unsupported"]


def test_one_model_serves_method_after_method():
    """Attached one after the other to the same model, each counts what it counts alone."""
    names = ["lora", "sequential_adapter", "full", "lora", "bitfit", "lora"]
    together = counts._counts([(name, {}) for name in names], "roberta-base")
    assert together == {name: counts.count(name, "roberta-base") for name in names}


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(taxonomy, "methods", lambda: ["lora", "ia3"])
    monkeypatch.setattr(counts, "BACKBONES", {"minilm-l6": ("MiniLM", "classification")})


def test_counts_are_kept_until_the_code_changes(tmp_path, monkeypatch, few):
    first = counts.counts(tmp_path)
    assert list(first) == ["lora", "ia3"]
    cache = tmp_path / counts.CACHE
    kept = json.loads(cache.read_text())
    assert kept["counts"] == first
    kept["counts"]["lora"]["minilm-l6"]["trained"] = -1
    cache.write_text(json.dumps(kept))
    assert counts.counts(tmp_path)["lora"]["minilm-l6"]["trained"] == -1

    monkeypatch.setattr(counts, "_fingerprint", lambda: "another")
    assert counts.counts(tmp_path) == first


def test_a_broken_cache_is_made_again(tmp_path, few):
    first = counts.counts(tmp_path)
    (tmp_path / counts.CACHE).write_text('{"code": ')
    assert counts.counts(tmp_path) == first
