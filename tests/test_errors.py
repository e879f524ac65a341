"""Bad input through the public API: one error that names the value and the way out, and nothing changed.

Damaged and foreign files are in ``test_files.py``, unusable tasks in ``test_loop.py``.
"""

from __future__ import annotations

import pytest
import torch

import peftlib
from peftlib import experiments, tasks
from peftlib.conformance.case import Case, backbone
from peftlib.conformance.checks import assert_same_structure, structure_of
from peftlib.errors import (
    MergeError,
    PeftlibError,
    SourceError,
    StateError,
    TargetError,
    UnknownNameError,
    UnsupportedError,
)


def refused(error: type[PeftlibError], match: str, method, family: str = "bert", **options) -> None:
    model = backbone(family)
    structure, flags = structure_of(model), [p.requires_grad for p in model.parameters()]
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(error, match=match):
        peftlib.attach(model, method, **options)
    assert_same_structure(structure_of(model), structure)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))


def test_an_unknown_method_names_near_ones():
    refused(UnknownNameError, r"unknown method 'lorra'; did you mean 'lora'.*Known: ", "lorra")
    refused(UnknownNameError, r"unknown method 'prefixtuning'; did you mean 'prefix_tuning'", "prefixtuning")
    with pytest.raises(UnknownNameError, match="did you mean 'bitfit'"):
        peftlib.card("bitfitt")


def test_an_unknown_option_names_near_ones():
    refused(UnknownNameError, r"unknown option of lora 'rnak'; did you mean 'rank'", "lora", rnak=4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank=0 is too small; it must be at least 1"),
        ({"rank": -3}, "rank=-3 is too small"),
        ({"rank": "8"}, "rank='8' is not a number"),
        ({"rank": None}, "rank=None is not a number"),
        ({"rank": float("nan")}, "rank=nan"),
    ],
)
def test_a_value_that_cannot_be_is_named(options, match):
    refused(peftlib.ConfigError, match, "lora", **options)


def test_a_rank_larger_than_the_matrix_says_which_ranks_fit():
    refused(TargetError, r"rank 33 does not fit bert\S+query \(32 x 32\); choose a rank from 1 to 32", "lora", rank=33)
    assert peftlib.attach(backbone("bert"), "lora", rank=32)


def test_a_target_that_matches_nothing_names_near_ones():
    refused(TargetError, "'q_proj' matches nothing in BertForSequenceClassification", "lora", targets=("q_proj",))
    match = "'attention.qury' matches nothing.*did you mean 'attention.query'"
    refused(TargetError, match, "lora", targets="attention.qury")
    refused(TargetError, "targets is empty", "lora", targets=())


@pytest.mark.parametrize("family", ["llama", "mistral", "t5", "mt5"])
def test_a_method_that_a_family_cannot_host_names_others(family):
    refused(UnsupportedError, r"bitfit trains biases, and \w+ .*has none.*ia3, lora", "bitfit", family)


def test_too_many_layers_are_named():
    refused(TargetError, "last_layers=3 does not fit.*its 2 layers", "full", last_layers=3)


def test_something_that_is_no_model():
    with pytest.raises(UnsupportedError, match=r"Linear is no model.*Known: bert"):
        peftlib.attach(torch.nn.Linear(2, 2), "lora")


def test_attaching_twice():
    model = backbone("bert")
    peftlib.attach(model, "bitfit")
    with pytest.raises(StateError, match=r"bitfit is already attached.*detach\(\) it first"):
        peftlib.attach(model, "lora")


def test_a_merge_where_there_is_none():
    with pytest.raises(MergeError, match=r"prefix_tuning has no merge: .*Keep it attached"):
        Case("prefix_tuning", "bert").attach().merge()


def test_unknown_names_of_tasks_backbones_heads_sources_and_profiles():
    with pytest.raises(UnknownNameError, match=r"'smokee'.*did you mean 'smoke'"):
        tasks.load("smokee")
    with pytest.raises(UnknownNameError, match=r"'tiny-brt'.*did you mean 'tiny-bert'"):
        peftlib.backbones.load("tiny-brt", source="tiny")
    with pytest.raises(UnknownNameError, match="unknown head 'classifier'"):
        peftlib.backbones.load("tiny-bert", head="classifier")
    with pytest.raises(UnknownNameError, match=r"'hubb'; did you mean 'hub'"):
        peftlib.backbones.load("tiny-bert", source="hubb")
    with pytest.raises(UnknownNameError, match="unknown profile 'smok'; did you mean 'smoke'"):
        experiments.profile("smok")


def test_a_hub_name_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(SourceError, match="some-org/some-model"):
        peftlib.backbones.load("some-org/some-model")
    with pytest.raises(SourceError, match=r"glue.*rte|rte.*glue"):
        tasks.load("glue/rte", source="hub")


def test_every_error_is_of_one_family():
    for error in (MergeError, SourceError, StateError, TargetError, UnknownNameError, UnsupportedError):
        assert issubclass(error, PeftlibError)
    assert issubclass(peftlib.ConfigError, PeftlibError)
