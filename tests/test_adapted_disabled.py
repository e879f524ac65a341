"""The backbone's own answer while a method is attached."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import peftlib
from peftlib.conformance.case import Case, backbone, logits
from peftlib.conformance.checks import assert_same_structure, structure_of
from peftlib.errors import StateError
from peftlib.mechanisms import tasks
from tests.conformance import matrix
from tests.methods.helpers import perturb

LORA = Case("lora", "bert")


@pytest.fixture(autouse=True)
def rows_are_of_task_zero():
    with tasks.unnamed_rows(0):
        yield


def attached(method: str, family: str) -> tuple[Case, torch.Tensor, peftlib.Adapted]:
    """The case, the logits without the method, and the method with every trained parameter moved."""
    case = Case(method, family)
    model = case.backbone()
    bare = case.logits(model)
    adapted = case.attach(model)
    perturb(adapted)
    return case, bare, adapted


SEEN = json.loads(matrix.COMMITTED.read_text())
HOSTED = [
    pytest.param(method, family, id=f"{method}-{family}")
    for method in peftlib.methods()
    for family in ("bert", "llama", "t5")
    if matrix.cell(SEEN, method, "start", family) == "yes"
]


@pytest.mark.parametrize(("method", "family"), HOSTED)
def test_the_backbone_answers_and_nothing_is_lost(method, family):
    case, bare, adapted = attached(method, family)
    tuned, state = case.logits(adapted.model), {n: t.clone() for n, t in adapted.state().items()}
    trained, structure = adapted.trainable(), structure_of(adapted.model)
    with adapted.disabled() as model:
        assert model is adapted.model
        assert torch.equal(case.logits(model), bare)
        with adapted.disabled():
            assert torch.equal(case.logits(model), bare)
        assert torch.equal(case.logits(model), bare)
    assert torch.equal(case.logits(model), tuned)
    assert not torch.equal(tuned, bare)
    assert_same_structure(structure_of(model), structure)
    assert all(parameter is trained[name] for name, parameter in adapted.trainable().items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapted.state().items())
    assert torch.equal(case.logits(adapted.detach()), bare)


@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "full", "pissa", "fish_mask", "qlora"])
def test_an_exception_inside_takes_the_method_up_again(method):
    case, _, adapted = attached(method, "bert")
    tuned = case.logits(adapted.model)
    with pytest.raises(KeyboardInterrupt), adapted.disabled():
        raise KeyboardInterrupt
    assert torch.equal(case.logits(adapted.model), tuned)


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "bitfit", "full", "diff_pruning", "fish_mask"])
def test_a_reference_between_forward_and_backward_leaves_the_gradients_alone(method):
    case, _, adapted = attached(method, "bert")
    adapted.model.train()

    def gradients(reference: bool) -> list[torch.Tensor]:
        with adapted.lifecycle(1) as life:
            life.step_start()
            torch.manual_seed(0)
            loss = adapted.model(**case.batch()).loss
            if reference:
                with torch.no_grad(), adapted.disabled() as model:
                    model(**case.batch())
            loss.backward()
        found = [p.grad.clone() for p in adapted.trainable().values() if p.grad is not None]
        adapted.model.zero_grad()
        return found

    want = gradients(reference=False)
    assert want
    assert all(map(torch.equal, gradients(reference=True), want))


def test_inside_the_model_trains_without_the_lifecycle_and_takes_task_ids():
    case, bare, adapted = attached("adalora", "bert")
    with adapted.disabled() as model:
        model.train()
        assert torch.equal(model(**case.inputs(), task_ids=torch.zeros(8, dtype=torch.long)).logits, bare)


def test_what_was_compiled_is_disabled_too():
    case, bare, adapted = attached("lora", "bert")
    adapted.model.compile(backend="eager")
    tuned = case.logits(adapted.model)
    with adapted.disabled() as model:
        assert torch.equal(case.logits(model), bare)
    assert torch.equal(case.logits(adapted.model), tuned)


def test_a_deep_copy_is_disabled_alone():
    case, bare, adapted = attached("krona", "bert")
    twin = copy.deepcopy(adapted.model)
    tuned = case.logits(twin)
    with twin.peftlib_adapted.disabled():
        assert torch.equal(case.logits(twin), bare)
        assert torch.equal(case.logits(adapted.model), tuned)


def test_generation():
    model = backbone("llama", "causal_lm")
    ids = torch.tensor([[5, 6, 7]])
    bare = model.generate(ids, max_new_tokens=8, do_sample=False)
    adapted = peftlib.attach(model, "loreft", rank=2)
    perturb(adapted, 3.0)
    tuned = model.generate(ids, max_new_tokens=8, do_sample=False)
    with adapted.disabled():
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), bare)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), tuned)
    assert not torch.equal(tuned, bare)


def test_meanwhile_the_method_is_out_of_reach():
    adapted = peftlib.attach(backbone("bert"), "lora")
    with adapted.disabled():
        assert "disabled" in repr(adapted)
        for use in (adapted.save, adapted.merge, adapted.detach, adapted.count, adapted.trainable):
            with pytest.raises(StateError, match="lora is disabled; leave"):
                use(*(("folder",) if use == adapted.save else ()))
    assert adapted.count().trained


def test_without_originals_it_is_refused():
    adapted = peftlib.attach(backbone("bert"), "full", keep_original=False)
    with pytest.raises(StateError, match="kept no copy"), adapted.disabled():
        pass


def test_attention_that_is_not_sdpa_comes_back():
    model = backbone("bert")
    model.set_attn_implementation("eager")
    bare = logits(model, **LORA.inputs())
    adapted = peftlib.attach(model, "prefix_tuning", length=3)
    perturb(adapted)
    with adapted.disabled():
        assert model.config._attn_implementation == "eager"
        assert torch.equal(logits(model, **LORA.inputs()), bare)
    assert model.config._attn_implementation != "eager"
