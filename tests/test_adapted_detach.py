"""Detaching after the model was changed by other hands."""

from __future__ import annotations

import pytest
import torch

from peftlib.conformance.case import Case
from tests.methods.helpers import perturb

METHODS = [
    "lora",
    "full",
    "bitfit",
    "pissa",
    "krona",
    "fish_mask",
    "qlora",
    "lora_prune",
    "p_tuning",
    "oft",
]


@pytest.mark.parametrize("method", METHODS)
def test_after_another_dtype_the_backbone_is_that_of_the_dtype(method):
    case = Case(method, "bert")
    adapted = case.attach()
    perturb(adapted)
    adapted.model.to(torch.bfloat16)
    want = case.backbone().to(torch.bfloat16).state_dict()
    got = adapted.detach().state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())


@pytest.mark.parametrize("method", METHODS)
def test_after_a_loaded_state_what_the_method_changed_is_restored(method):
    case = Case(method, "bert")
    adapted = case.attach()
    perturb(adapted)
    state = {n: t.clone() for n, t in adapted.model.state_dict().items()}
    perturb(adapted, seed=2)
    adapted.model.load_state_dict(state)
    want, got = case.backbone().state_dict(), adapted.detach().state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())


@pytest.mark.parametrize("method", ["qlora", "loftq", "qa_lora"])
def test_the_mode_of_the_model_is_that_of_now(method):
    adapted = Case(method, "bert").attach()
    adapted.model.train()
    assert all(module.training for module in adapted.detach().modules())
