"""What trains on a half-precision backbone is float32, and the backbone computes with it as before."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch

import peftlib
from peftlib.conformance.case import Case, logits
from peftlib.mechanisms import precision
from tests.methods.helpers import perturb

HALF = [torch.bfloat16, torch.float16]
OWN = ["full", "bitfit", "sequential_adapter", "head"]
"""Methods that train the backbone's weights, its biases, its norms, its head."""


@pytest.fixture(params=HALF, ids=str)
def dtype(request):
    return request.param


@pytest.mark.parametrize("method", OWN)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_small_steps_are_not_lost_and_the_backbone_computes_in_its_dtype(method, family, dtype):
    """With autocast and without; merging rounds once, detaching restores bit for bit."""
    if (method, family) in {("bitfit", "llama"), ("bitfit", "t5")}:
        family = "bert"  # these have no biases
    case = Case(method, family, dtype=dtype)
    model = case.backbone()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    start = case.logits(model)
    adapted = case.attach(model)
    assert {p.dtype for p in adapted.trainable().values()} == {torch.float32}
    own = [p for n, p in adapted.trainable().items() if n in before]
    with torch.no_grad():
        for _ in range(10):
            for parameter in own:
                parameter.add_(1e-5)
    for name, parameter in adapted.trainable().items():
        if name in before:
            torch.testing.assert_close(parameter.detach(), before[name].float() + 1e-4, atol=2e-6, rtol=0)
    for steps in (torch.autocast("cpu", dtype), torch.autocast("cpu", enabled=False)):
        model.zero_grad()
        with adapted.guard.open(), steps:
            model.train()(**case.batch()).loss.backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in adapted.trainable().values())
        assert sum(float(p.grad.abs().sum()) for p in own if p.grad is not None) > 0
    assert case.logits(model).dtype == start.dtype
    merged = adapted.merge() if method != "sequential_adapter" else adapted.detach()
    assert all(t.dtype == before[n].dtype for n, t in merged.state_dict().items())
    if method == "sequential_adapter":
        assert all(torch.equal(t, before[n]) for n, t in merged.state_dict().items())
    else:
        after = {n: (before[n].float() + 1e-4).to(before[n].dtype) for n in adapted.head_names}
        assert all(torch.equal(merged.state_dict()[n], t) for n, t in after.items())


@pytest.mark.parametrize("method", ["lora", *OWN])
def test_grad_scaler_works_and_a_skipped_step_does_no_harm(method, dtype):
    case = Case(method, "bert", dtype=dtype)
    adapted = case.attach()
    optimizer = torch.optim.AdamW(adapted.parameter_groups(1e-3))
    scaler, moved = torch.amp.GradScaler("cpu", init_scale=8.0), []
    adapted.model.train()
    with adapted.lifecycle(3) as life:
        for step in range(3):
            before = [p.detach().clone() for p in adapted.trainable().values()]
            life.step_start()
            with torch.autocast("cpu", dtype):
                loss = adapted.model(**case.batch()).loss
            scaler.scale(loss * (float("inf") if step == 1 else 1)).backward()
            scaler.unscale_(optimizer)
            life.gradients()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            life.step_end()
            moved.append(any(not torch.equal(p, b) for p, b in zip(adapted.trainable().values(), before)))
    assert moved == [True, False, True] and scaler.get_scale() == 4.0
    assert case.logits(adapted.model).isfinite().all()


@pytest.mark.parametrize("method", ["lora", "bitfit", "sequential_adapter", "prefix_tuning", "threshold_mask"])
def test_half_precision_is_kept_where_that_is_asked_for(method, dtype, tmp_path):
    case = Case(method, "bert", dtype=dtype)
    adapted = case.attach(keep_half=True)
    assert {p.dtype for p in adapted.trainable().values()} == {dtype}
    perturb(adapted, std=0.05)
    adapted.save(tmp_path)
    kept = peftlib.load(case.backbone(), tmp_path, keep_half=True)
    assert torch.equal(case.logits(kept.model), case.logits(adapted.model))
    wide = peftlib.load(case.backbone(), tmp_path)
    assert {p.dtype for p in wide.trainable().values()} == {torch.float32}


def test_a_file_says_which_dtype(tmp_path):
    for dtype, kept in ((torch.float16, False), (torch.float16, True), (torch.float32, False)):
        Case("lora", "bert", dtype=dtype).attach(keep_half=kept).save(tmp_path)
        document = json.loads((tmp_path / "config.json").read_text())
        assert document["dtype"] == ("float16" if kept else "float32")
        assert document["backbone"]["dtype"] == str(dtype).removeprefix("torch.")


def test_copies_pickles_other_dtypes_and_compilation(dtype):
    """The module's class is one that was made for it."""
    case = Case("bitfit", "bert", dtype=dtype)
    adapted = case.attach()
    perturb(adapted, std=0.05)
    model, want = adapted.model, case.logits(adapted.model)
    assert torch.equal(logits(copy.deepcopy(model), **case.inputs()), want)
    for module in (model.classifier, model.bert.encoder.layer[0].attention.self.query):
        again = pickle.loads(pickle.dumps(module))
        x = torch.randn(2, module.in_features).to(dtype)
        torch.testing.assert_close(again.weight, module.weight)
        assert type(again) is type(module) and again.bias.dtype == torch.float32 and again.bias is not module.bias
        assert torch.equal(again(x), module(x))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, **case.inputs()), want, atol=2e-2, rtol=2e-2)
    model.float()
    assert case.logits(model).dtype == torch.float32


def test_it_is_taken_back_in_parts():
    linear = torch.nn.Sequential(torch.nn.Linear(3, 3).to(torch.bfloat16))
    kind, weight, bias = type(linear[0]), linear[0].weight, linear[0].bias
    first = precision.to_float32(linear, [bias])
    with precision.in_float32(linear, [weight]):
        assert weight.dtype == bias.dtype == torch.float32
        assert linear(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert (weight.dtype, bias.dtype) == (torch.bfloat16, torch.float32)
    assert linear(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    for step in reversed(first):
        step()
    assert type(linear[0]) is kind and bias.dtype == torch.bfloat16 and not list(linear.buffers())
    assert linear[0].bias is bias
