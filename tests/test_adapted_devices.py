"""Where what a method adds stands, and models whose weights are elsewhere: on two devices, offloaded, on none yet."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model

import peftlib
from peftlib import anatomy
from peftlib.conformance.case import Case, backbone, batch, logits
from peftlib.errors import MergeError, StateError, UnsupportedError
from peftlib.mechanisms import tasks
from tests.methods.helpers import perturb


@pytest.fixture(autouse=True)
def rows_are_of_task_zero():
    with tasks.unnamed_rows(0):
        yield


def offloaded(where: str, folder) -> torch.nn.Module:
    """BERT whose second layer waits on the disk, or whose weights all wait in memory."""
    model = backbone("bert")
    if where == "memory":
        return cpu_offload(model, torch.device("cpu"))
    places = {"bert.embeddings": "cpu", "bert.encoder.layer.0": "cpu", "bert.pooler": "cpu", "classifier": "cpu"}
    return dispatch_model(model, places | {"bert.encoder.layer.1": "disk"}, main_device="cpu", offload_dir=str(folder))


READING = (
    "lora",
    "dora",
    "ia3",
    "krona",
    "oft",
    "vera",
    "adalora",
    "parallel_adapter",
    "prefix_tuning",
    "prompt_tuning",
)
CHANGING = (
    "full",
    "bitfit",
    "pissa",
    "delta_lora",
    "qlora",
    "lora_prune",
    "fish_mask",
    "threshold_mask",
    "ladder_side_tuning",
)


@pytest.mark.parametrize("where", ["disk", "memory"])
@pytest.mark.parametrize("method", READING)
def test_beside_offloaded_weights(method, where, tmp_path):
    """As beside those that stay: the start, the gradients, the file; nothing is merged into what is not there."""
    case = Case(method, "bert")
    model, twin = offloaded(where, tmp_path), case.attach(train_head=where == "disk")
    adapted = case.attach(model, train_head=where == "disk")
    assert not any(p.is_meta for p in adapted.trainable().values())
    for one in (twin, adapted):
        perturb(one)
    torch.testing.assert_close(case.logits(model), case.logits(twin.model), atol=1e-5, rtol=1e-4)
    for one in (twin, adapted):
        with one.guard.open():
            one.model(**case.batch()).loss.backward()
    for name, parameter in twin.trainable().items():
        torch.testing.assert_close(adapted.trainable()[name].grad, parameter.grad, atol=1e-5, rtol=1e-3)
    loaded = peftlib.load(backbone("bert"), adapted.snapshot())
    torch.testing.assert_close(case.logits(loaded.model), case.logits(model), atol=1e-5, rtol=1e-4)
    with pytest.raises(MergeError):
        adapted.merge()
    torch.testing.assert_close(case.logits(model), case.logits(loaded.model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", CHANGING)
def test_offloaded_weights_cannot_be_changed(method, tmp_path):
    with pytest.raises(UnsupportedError, match="offloaded"):
        Case(method, "bert").start(offloaded("disk", tmp_path))


SHARING = {
    "autopeft",
    "compacter",
    "hyperformer_pp",
    "mam_adapter",
    "moelora",
    "prefix_tuning",
    "propetl",
    "unipelt",
}
"""Methods whose layers share parameters."""


@pytest.mark.parametrize("method", peftlib.methods())
def test_what_is_added_stands_where_the_module_does_and_moves_with_it(method):
    """Two devices in one model, and ``model.to()`` after attach; the meta device refuses tensors of another one."""
    options = {"init": "random"} if method == "ladder_side_tuning" else {}  # others would read what is not there
    case, parts = Case(method, "bert", options=options), backbone("bert")
    parts.bert.encoder.layer[1].to("meta")
    if method in SHARING:
        with pytest.raises(UnsupportedError, match="share parameters"):
            case.start(parts)
    else:
        adapted = case.start(parts)
        inside = [n for n, p in adapted.trainable().items() if p.is_meta]
        assert all("layer.1." in name for name in inside)
        assert not [n for n, p in adapted.trainable().items() if ".layer.1." in n and not p.is_meta]
    if method in ("warp", "p_tuning"):
        return  # what they compute depends on the ids, which the meta device does not have
    moved = case.attach()
    moved.model.to("meta").train()
    given = {k: v.to("meta") for k, v in batch("bert").items() if k != "attention_mask"}
    with moved.guard.open():
        moved.model(**given)


def test_a_part_on_another_device_takes_its_input_there():
    """accelerate brings inputs to a module after torch's hooks before its forward have seen them."""
    adapted = peftlib.attach(backbone("bert"), "lora", targets=("attention.query",))
    site = anatomy.of(adapted.model).sites(("attention.query",))[0]
    site.module.to("meta")
    site.module.register_forward_pre_hook(lambda module, args: (args[0].to("meta"),))
    assert site.module(torch.ones(1, 2, site.in_features)).is_meta


# Attached before there are weights


def test_a_start_that_was_never_drawn_is_refused():
    case = Case("lora", "bert")
    full = case.attach()
    perturb(full)
    state, want = copy.deepcopy(full.model.state_dict()), case.logits(full.model)
    adapted = case.attach(backbone("bert").to("meta"))
    model = adapted.model.to_empty(device="cpu")
    model.load_state_dict(backbone("bert").state_dict(), strict=False)
    with pytest.raises(StateError, match="meta device"):
        model(**case.inputs())
    with pytest.raises(StateError, match="meta device"):
        adapted.merge()
    model.load_state_dict(state, strict=False)
    for name, buffer in backbone("bert").named_buffers():
        model.get_buffer(name).copy_(buffer)
    torch.testing.assert_close(case.logits(model), want)
    torch.testing.assert_close(logits(adapted.merge(), **case.inputs()), want, atol=1e-5, rtol=1e-4)


def test_what_was_on_no_device_cannot_be_given_back():
    adapted = peftlib.attach(backbone("bert").to("meta"), "lora")
    adapted.model.to_empty(device="cpu")
    with pytest.raises(StateError, match="meta device"):
        adapted.detach()
