"""QLoRA: LoRA on the quantized backbone, its memory, counts, files, merge and way back."""

import copy

import pytest
import safetensors
import torch

import peftlib
from peftlib import backbones
from peftlib.conformance.case import batch, train
from peftlib.errors import PeftlibError, StateError
from peftlib.mechanisms.quantized import QuantizedLinear
from tests.methods.facts import Count, Default, Facts, Start, Trains, kaiming_uniform, zeros
from tests.methods.helpers import Spy, backbone, inputs, perturb


def lora(x, weight, bias, a, b, alpha, rank):
    """Hu et al. 2022: h = W x + (alpha / r) B A x for x (tokens, in), in float64."""
    x, W, A, B = (tensor.double() for tensor in (x, weight, a, b))
    return (x @ W.T + bias.double() + alpha / rank * x @ A.T @ B.T).float()


FAMILIES = ["bert", "t5", "llama", "gpt2"]


def _quantized(model):
    return [m for m in model.modules() if isinstance(m, QuantizedLinear)]


@torch.no_grad()
def test_equation_on_one_site():
    model = backbone("bert")
    adapted = peftlib.attach(model, "qlora", rank=4, alpha=6.0)
    perturb(adapted)
    site = adapted.host.anatomy.layers[1].sites["ffn.up"]
    spy = Spy(site.module)
    model(**inputs("bert"))
    x, y = spy[site.module]
    update = site.module.lora
    expected = lora(x[1, :4], site.module.weight, site.bias, update.A, update.B, alpha=6.0, rank=4)
    torch.testing.assert_close(y[1, :4], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_starts_as_the_backbone_with_dequantized_weights(family):
    model = backbone(family)
    plain = copy.deepcopy(model)
    adapted = peftlib.attach(model, "qlora", rank=4)
    assert {site.path for site in adapted.host.anatomy.sites()} == set(adapted.method.quantized)
    for path, module in adapted.method.quantized.items():
        original = plain.get_submodule(path)
        weight = module.weight.T if type(original).__name__ == "Conv1D" else module.weight
        original.weight.copy_(weight)
    data = inputs(family)
    torch.testing.assert_close(model(**data).logits, plain(**data).logits, atol=1e-5, rtol=1e-5)


def test_frozen_weights_take_4_127_bits():
    """MiniLM: the layers' linear maps shrink to 4.127/32 of their bytes; nothing else of the backbone changes."""
    model = backbones.load("minilm-l6").model
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    adapted = peftlib.attach(model, "qlora", keep_original=False, train_head=False)
    linear = sum(m.in_features * m.out_features for m in _quantized(model))
    assert linear == 6 * (4 * 384**2 + 2 * 384 * 1536)
    held = sum(m.quantized.nbytes for m in _quantized(model))
    assert 8 * held / linear == pytest.approx(4.127, abs=0.002)
    new = sum(p.numel() * p.element_size() for p in adapted.trainable().values())
    after = sum(p.numel() * p.element_size() for p in model.parameters()) - new + held
    assert before - after == 4 * linear - held


def test_counts():
    adapted = peftlib.attach(backbones.shapes("llama-7b", head="causal_lm"), "qlora")
    assert adapted.count().trained == 159_907_840
    assert adapted.count().total == 6_738_415_616


def test_targets_and_quantized_maps_are_chosen_apart():
    model = backbone("bert")
    options = {"targets": ("attention.query", "ffn.down"), "quantize": ("attention.*", "ffn.up"), "rank": 4}
    adapted = peftlib.attach(model, "qlora", **options)
    assert len(_quantized(model)) == 2 * 5
    assert len(adapted.method.updates) == 2 * 2
    perturb(adapted)
    with torch.no_grad():
        before = model(**inputs("bert")).logits
        torch.testing.assert_close(adapted.merge()(**inputs("bert")).logits, before, atol=1e-5, rtol=1e-5)


def test_files_hold_lora_alone_and_the_backbone_is_quantized_again(tmp_path):
    adapted = peftlib.attach(backbone("llama"), "qlora", rank=4)
    train(adapted, batch("llama"), steps=3)
    before = adapted.model(**inputs("llama")).logits
    folder = adapted.save(tmp_path / "adapter")
    with safetensors.safe_open(folder / "adapter.safetensors", "pt") as file:
        names = set(file.keys())
    assert all(".lora.A" in n or ".lora.B" in n for n in names - set(adapted.head_names))
    loaded = peftlib.load(backbone("llama"), folder)
    assert torch.equal(loaded.model(**inputs("llama")).logits, before)
    for mine, other in zip(_quantized(adapted.model), _quantized(loaded.model)):
        assert all(torch.equal(a, b) for a, b in zip(mine.buffers(), other.buffers()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep_original", [True, False])
@torch.no_grad()
def test_merge_gives_plain_modules_with_equal_outputs(family, keep_original):
    model = backbone(family)
    kinds = {n: type(m) for n, m in model.named_modules()}
    adapted = peftlib.attach(model, "qlora", rank=4, keep_original=keep_original)
    perturb(adapted)
    before = model(**inputs(family)).logits
    merged = adapted.merge()
    assert {n: type(m) for n, m in merged.named_modules()} == kinds
    after = merged(**inputs(family)).logits
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5
    assert not torch.allclose(after, backbone(family)(**inputs(family)).logits, atol=1e-3)


def test_detach_gives_the_original_modules_back():
    model = backbone("gpt2")
    modules = dict(model.named_modules())
    weights = {n: (p, p.detach().clone()) for n, p in model.named_parameters()}
    adapted = peftlib.attach(model, "qlora", rank=4)
    train(adapted, batch("gpt2"), steps=2)
    adapted.detach()
    assert all(m is modules[n] for n, m in model.named_modules())
    assert all(p is weights[n][0] and torch.equal(p, weights[n][1]) for n, p in model.named_parameters())


def test_without_the_originals_there_is_no_way_back():
    adapted = peftlib.attach(backbone("bert"), "qlora", rank=4, keep_original=False)
    with pytest.raises(StateError, match="keep_original"):
        adapted.detach()


def test_trains_on_a_checkpointed_bf16_backbone():
    model = backbone("llama").to(torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted = peftlib.attach(model, "qlora", rank=4)
    assert {p.dtype for n, p in adapted.trainable().items() if n not in adapted.head_names} == {torch.float32}
    losses = train(adapted, batch("llama"), steps=8)
    assert losses[-1] < losses[0]


def test_the_compute_dtype():
    data = inputs("bert")
    with torch.no_grad():
        as_input = peftlib.attach(backbone("bert"), "qlora", rank=4).model(**data).logits
        half = peftlib.attach(backbone("bert"), "qlora", rank=4, compute="bfloat16").model(**data).logits
    assert half.dtype == as_input.dtype == torch.float32
    distance = float((half - as_input).norm() / as_input.norm())
    assert 1e-5 < distance < 0.1


@pytest.mark.parametrize("options", [{"rank": 0}, {"compute": "int8"}, {"rank": 48}], ids=str)
def test_bad_values(options):
    with pytest.raises(PeftlibError, match=str(next(iter(options.values())))):
        peftlib.attach(backbone("bert"), "qlora", **options)


# What is published

SCRIPT = "artidoro/qlora, scripts/finetune_guanaco_7b.sh"

FACTS = Facts(
    "qlora",
    Default("rank", 64, SCRIPT),
    Default("alpha", 16.0, SCRIPT),
    Default("dropout", 0.1, f"{SCRIPT}; 0.05 in those of 13B parameters and more"),
    Default("targets", "all-linear", f"{SCRIPT}: lora_modules all"),
    Default("quantize", "all-linear", "artidoro/qlora, qlora.py, get_accelerate_model: load_in_4bit"),
    Start("*.lora.A", kaiming_uniform(), "HF peft's LoraConfig, in artidoro/qlora, qlora.py, get_accelerate_model"),
    Start("*.lora.B", zeros(), "HF peft's LoraConfig, in artidoro/qlora, qlora.py, get_accelerate_model"),
    Trains(("*.lora.A", "*.lora.B"), "artidoro/qlora, qlora.py, get_accelerate_model"),
    Count("llama-7b", 159_907_840, "r (in + out) a map, all seven kinds"),
    Count("roberta-base", 10_616_832, "r (in + out) a map, all six kinds"),
    Count("t5-base", 25_952_256, "r (in + out) a map, those of cross-attention too"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
