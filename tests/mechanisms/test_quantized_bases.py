"""Backbones that a quantization library keeps packed: every method beside them computes, counts, trains, saves, loads
and merges as on the plain backbone that the codes stand for, or is refused when it is attached."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

import peftlib
from peftlib import anatomy
from peftlib.anatomy import weights
from peftlib.conformance.case import Case, backbone, logits, train
from peftlib.errors import MergeError, UnsupportedError
from peftlib.mechanisms import tasks
from peftlib.taxonomy import entry
from tests.mechanisms.packing import packed, plain
from tests.methods.helpers import perturb

CHANGING = {
    "child_tuning_d",
    "child_tuning_f",
    "delta_lora",
    "diff_pruning",
    "fish_mask",
    "full",
    "intrinsic_said",
    "ladder_side_tuning",  # reads the weights' gradients
    "loftq",
    "lora_prune",
    "lt_sft",
    "pissa",
    "qa_lora",
    "qlora",
    "sam",
    "threshold_mask",
}
"""The methods that change the weights of the backbone's maps: these have no place on codes."""
KINDS = {"4bit": 1e-5, "8bit": 0.1}
"""How far logits may be from the plain backbone's, of the largest: LLM.int8() rounds what goes into a map too."""


@pytest.fixture(autouse=True)
def rows_are_of_task_zero():
    with tasks.unnamed_rows(0):
        yield


def far(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.filterwarnings("ignore:.*other weights")
@pytest.mark.parametrize("method", peftlib.methods())
def test_every_method_is_right_or_refused(method):
    place = peftlib.methods().index(method)
    kind = ("4bit", "8bit")[place % 2]
    family = next(f for f in [("bert", "gpt2", "llama", "t5")[place // 2 % 4], "bert", "gpt2"] if hosts(method, f))
    case, model = Case(method, family), packed(backbone(family), kind)
    if method in CHANGING:
        flags, names = [p.requires_grad for p in model.parameters()], list(model.state_dict())
        with pytest.raises(UnsupportedError, match=r"quantized|already"):
            case.start(model)
        assert [p.requires_grad for p in model.parameters()] == flags and list(model.state_dict()) == names
        return
    twin, adapted = case.start(plain(model)), case.start(model)
    assert adapted.count() == twin.count()
    assert adapted.count().total == sum(p.numel() for p in backbone(family).parameters())
    for one in (twin, adapted):
        one.calibrate([case.batch()])
    assert far(case.logits(model), case.logits(twin.model)) <= KINDS[kind]
    train(adapted, case.batch(), 1)
    trained = case.logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = peftlib.load(backbone(family), adapted.snapshot())
        again = peftlib.load(packed(backbone(family), kind), full.snapshot())
    assert torch.equal(case.logits(again.model), trained)
    try:
        twin.merge()
    except MergeError:
        with pytest.raises(MergeError):
            again.merge()
        return
    assert far(logits(again.merge(), **case.inputs()), trained) <= KINDS[kind]


def hosts(method: str, family: str) -> bool:
    try:
        Case(method, family).start()
    except UnsupportedError:
        return False
    return True


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_what_trains_gets_the_plain_backbones_gradients_also_after_an_evaluation(family):
    """bitsandbytes' CPU kernel for evaluations has no backward."""
    case, model = Case("lora", family), packed(backbone(family), "4bit")
    twin, adapted = case.attach(plain(model)), case.attach(model)
    for one in (twin, adapted):
        perturb(one)
        case.logits(one.model)
        one.model.train()
        one.model(**case.batch()).loss.backward()
    for name, parameter in twin.trainable().items():
        torch.testing.assert_close(adapted.trainable()[name].grad, parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_merged_maps_are_those_of_the_unquantized_backbone(family, kind):
    """Their classes, orientation, biases, names and order; maps without an update stay packed."""
    model = packed(backbone(family), kind)
    adapted = Case("lora", family).attach(model)
    perturb(adapted)
    sites = {site.path for site in adapted.method.updates}
    adapted.merge()
    for path, old in backbone(family).named_modules():
        new = model.get_submodule(path)
        if path in sites:
            assert type(new) is type(old) and list(new.state_dict()) == list(old.state_dict())
            assert {n for n in vars(new) if n[0] != "_"} == {n for n in vars(old) if n[0] != "_"}
            assert all(new.state_dict()[n].shape == t.shape for n, t in old.state_dict().items())
        elif isinstance(old, nn.Linear | Conv1D) and hasattr(new, "source_cls"):
            assert weights.packed(new)


def test_a_merge_that_fails_leaves_the_codes():
    model = packed(backbone("bert"), "4bit")
    adapted = Case("lora", "bert").attach(model)
    perturb(adapted)
    before = logits(model, **Case("lora", "bert").inputs())
    *_, last = adapted.method.updates.values()
    last.delta = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        adapted.merge()
    assert sum(weights.packed(m) is not None for m in model.modules()) == 12
    assert torch.equal(logits(model, **Case("lora", "bert").inputs()), before)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["qlora", "loftq", "qa_lora"])
@pytest.mark.parametrize("other", ["ia3", "krona", "bitfit", "oft"])
def test_our_own_codes_in_a_combination(kind, other, first):
    """Whatever the order in which they are named, both act, and both are merged."""
    named = (kind, other) if first else (other, kind)
    case = Case("lora", "bert")
    config = peftlib.combine(*(peftlib.config(n, **entry(n).tiny) for n in named))
    adapted = peftlib.attach(backbone("bert"), config)
    start = case.logits(adapted.model)
    for part in adapted.method.parts:
        with torch.no_grad():
            for parameter in part.host.trained().values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        assert far(case.logits(adapted.model), start) > 1e-3
        start = case.logits(adapted.model)
    assert far(logits(adapted.merge(), **case.inputs()), start) < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_a_merged_model_is_saved_as_what_it_is(bits, tmp_path):
    """Its config names the maps that are plain now."""
    case = Case("lora", "llama", head="causal_lm")
    case.backbone().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    )
    adapted = case.attach(model)
    perturb(adapted)
    adapted.merge().save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for module in again.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # its kernel wants larger maps
    assert far(case.logits(again), case.logits(model)) < 1e-3
    assert sum(weights.packed(m) is not None for m in again.modules()) == sum(
        weights.packed(m) is not None for m in model.modules()
    )


def test_other_weights_on_the_same_shapes_are_said():
    """Codes of other weights too; the same weights in another precision are not other weights."""
    case = Case("lora", "bert")
    saved = case.attach(packed(backbone("bert"), "4bit")).snapshot()
    other = backbone("bert")
    for site in anatomy.of(other).sites():
        with torch.no_grad():
            site.weight.neg_()
    with pytest.warns(UserWarning, match="other weights"):
        peftlib.load(packed(other, "4bit"), saved)


class Elsewhere(nn.Module):
    """A map of a library that keeps its weight in other tensors, as GPTQ, AWQ and HQQ do."""

    def __init__(self, old: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = old.in_features, old.out_features
        self.register_buffer("qweight", old.weight.detach().view(torch.int32).clone())
        self.register_buffer("bias", old.bias.detach())

    def numbers(self) -> torch.Tensor:
        return self.qweight.view(torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.numbers(), self.bias)


class Readable(Elsewhere):
    def dequantize(self) -> torch.Tensor:
        return self.numbers()


@pytest.mark.parametrize("kind", [Elsewhere, Readable])
def test_maps_of_other_libraries(kind):
    """They are known by the weight that they lack; what they do not give is refused."""
    case, model = Case("lora", "bert"), backbone("bert")
    for site in anatomy.of(model).sites():
        model.set_submodule(site.path, kind(site.module))
    twin, adapted = case.attach(), case.attach(model)
    assert (adapted.count().total, adapted.count().trained) == (twin.count().total, twin.count().trained)
    perturb(twin), perturb(adapted)
    want = case.logits(twin.model)
    assert far(case.logits(model), want) < 1e-6
    peftlib.load(backbone("bert"), adapted.snapshot())
    if kind is Readable:
        assert far(logits(adapted.merge(), **case.inputs()), want) < 1e-5
        return
    with pytest.raises(UnsupportedError, match="Elsewhere, which peftlib cannot read"):
        adapted.merge()
    assert far(case.logits(model), want) < 1e-6
