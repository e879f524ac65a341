"""QA-LoRA: group-wise integers, the pooled update, and the merge into the offsets."""

import copy

import pytest
import safetensors
import torch

import peftlib
from peftlib import backbones
from peftlib.conformance.case import batch, train
from peftlib.errors import PeftlibError
from peftlib.mechanisms.quantized import QuantizedLinear
from peftlib.methods.reparameterized.lora.quantization.qa_lora import GroupWeight
from tests.methods.facts import Count, Default, Facts, Holds, Start, Trains, glorot_uniform, tiny, zeros
from tests.methods.helpers import Spy, backbone, inputs, perturb

FAMILIES = ["bert", "t5", "llama", "gpt2"]
OPTIONS = {"rank": 4, "group": 8}


def _weight(rows=6, columns=24):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05


def group_quantized(W, bits, g):
    """Each group of a row on 2^bits levels between its smallest and its largest entry, in float64."""
    rows = []
    for row in W.double():
        groups = []
        for w in row.split(g):
            beta = w.min()
            s = (w.max() - beta) / (2**bits - 1)
            groups.append(s * torch.round((w - beta) / s) + beta)
        rows.append(torch.cat(groups))
    return torch.stack(rows)


# The weight


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("shape", [(6, 24), (3, 8), (1, 24)], ids=str)
def test_dequantized_weight_is_the_papers(bits, shape):
    weight = _weight(*shape)
    found = GroupWeight(weight, bits, group=8)(torch.float32)
    torch.testing.assert_close(found.double(), group_quantized(weight, bits, g=8), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 4])
def test_no_entry_is_farther_than_half_a_step_and_the_ends_are_met(bits):
    weight = _weight(16, 64)
    mine = GroupWeight(weight, bits, group=16)
    groups, found = (t.view(16, 4, 16) for t in (weight, mine(torch.float32)))
    step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
    assert ((groups - found).abs() <= step[..., None] / 2 + 1e-7).all()
    torch.testing.assert_close(found.amax(-1), groups.amax(-1))
    torch.testing.assert_close(found.amin(-1), groups.amin(-1))


def test_a_group_of_equal_entries_is_kept_exactly():
    weight = torch.full((2, 16), 0.3)
    assert torch.equal(GroupWeight(weight, group=8)(torch.float32), weight)
    assert not GroupWeight(torch.zeros(2, 16), group=8)(torch.float32).any()


def test_memory_is_6_bits_an_entry_and_dtypes_leave_it_alone():
    mine = GroupWeight(_weight(64, 128))
    assert mine.nbytes * 8 / (64 * 128) == 4 + 2 * 32 / 32
    assert sum(t.numel() * t.element_size() for t in mine.state_dict().values()) == mine.nbytes
    before = mine(torch.float32)
    assert torch.equal(mine.to(torch.bfloat16).to(torch.float64)(torch.float32), before)


# The method


@torch.no_grad()
def test_equation_on_one_site():
    """y = W x + (alpha / r) B A pool(x)."""
    model = backbone("bert").double()
    adapted = peftlib.attach(model, "qa_lora", alpha=6.0, **OPTIONS)
    perturb(adapted)
    model.double()
    site = adapted.host.anatomy.layers[1].sites["ffn.up"]
    spy = Spy(site.module)
    model(**inputs("bert"))
    x, y = spy[site.module]
    W, A, B = site.module.weight, site.module.lora.A, site.module.lora.B
    pool = torch.stack([group.mean(-1) for group in x.split(8, dim=-1)], dim=-1)
    expected = x @ W.T + site.bias + 6.0 / 4 * pool @ A.T @ B.T
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_starts_as_the_quantized_backbone(family):
    plain = backbone(family)
    adapted = peftlib.attach(backbone(family), "qa_lora", **OPTIONS)
    for path, module in adapted.method.quantized.items():
        weight = plain.get_submodule(path).weight
        weight.copy_(module.weight.T if type(plain.get_submodule(path)).__name__ == "Conv1D" else module.weight)
    data = inputs(family)
    torch.testing.assert_close(adapted.model(**data).logits, plain(**data).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_merged_into_the_offsets_codes_and_scales_stay(family):
    """The low-bit maps that a merge can leave compute what LoRA and they computed together."""
    model = backbone(family)
    adapted = peftlib.attach(model, "qa_lora", keep_quantized=True, **OPTIONS)
    perturb(adapted)
    before = model(**inputs(family)).logits
    held = {path: copy.deepcopy(module.quantized) for path, module in adapted.method.quantized.items()}
    assert adapted.merge() is model
    after = model(**inputs(family)).logits
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5
    assert not torch.allclose(after, backbone(family)(**inputs(family)).logits, atol=1e-2)
    left = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert left.keys() == held.keys()
    for path, module in left.items():
        assert not any("lora" in name for name, _ in module.named_modules())
        assert torch.equal(module.quantized.codes, held[path].codes)
        assert torch.equal(module.quantized.scales, held[path].scales)
        assert not torch.equal(module.quantized.offsets, held[path].offsets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@torch.no_grad()
def test_the_plain_merge_is_the_low_bit_one(dtype):
    plain, low = (
        peftlib.attach(backbone("gpt2").to(dtype), "qa_lora", keep_quantized=keep, **OPTIONS) for keep in (False, True)
    )
    for adapted in (plain, low):
        perturb(adapted)
        adapted.merge()
    for layer, other in zip(plain.model.transformer.h, low.model.transformer.h):
        assert type(layer.attn.c_attn).__name__ == "Conv1D"
        assert layer.attn.c_attn.weight.dtype == dtype
        torch.testing.assert_close(layer.attn.c_attn.weight.T, other.attn.c_attn.weight, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_merging_quantized_again_would_give_the_same_codes():
    """What the paper is about: the merged weight lies on a 4-bit grid, which LoRA's product would leave."""
    adapted = peftlib.attach(backbone("bert"), "qa_lora", **OPTIONS)
    perturb(adapted)
    path, module = next(iter(adapted.method.quantized.items()))
    codes = module.quantized.codes.clone()
    merged = adapted.merge().get_submodule(path).weight
    again = GroupWeight(merged, group=8)
    assert torch.equal(again.codes, codes)
    torch.testing.assert_close(again(torch.float32), merged, atol=1e-6, rtol=1e-5)


def test_files_hold_the_factors_alone_and_the_backbone_is_quantized_again(tmp_path):
    adapted = peftlib.attach(backbone("llama"), "qa_lora", **OPTIONS)
    train(adapted, batch("llama"), steps=3)
    before = adapted.model(**inputs("llama")).logits
    folder = adapted.save(tmp_path / "adapter")
    with safetensors.safe_open(folder / "adapter.safetensors", "pt") as file:
        names = set(file.keys())
    assert all(n.endswith((".lora.A", ".lora.B")) for n in names - set(adapted.head_names))
    loaded = peftlib.load(backbone("llama"), folder)
    assert torch.equal(loaded.model(**inputs("llama")).logits, before)


def test_detach_gives_the_original_modules_back():
    model = backbone("gpt2")
    modules = dict(model.named_modules())
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapted = peftlib.attach(model, "qa_lora", **OPTIONS)
    train(adapted, batch("gpt2"), steps=2)
    adapted.detach()
    assert all(m is modules[n] for n, m in model.named_modules())
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_counts():
    """4096 inputs are 128 groups, 11008 are 344: 64 (4 (128 + 4096) + 2 (128 + 11008) + 344 + 4096) a layer."""
    adapted = peftlib.attach(backbones.shapes("llama-7b", head="causal_lm"), "qa_lora")
    assert adapted.count().trained == 32 * 64 * (4 * (128 + 4096) + 2 * (128 + 11008) + (344 + 4096))


def test_a_fused_projection_can_be_adapted_in_part():
    model = backbone("gpt2")
    adapted = peftlib.attach(model, "qa_lora", targets=("attention.value",), keep_quantized=True, **OPTIONS)
    perturb(adapted)
    module = model.transformer.h[0].attn.c_attn
    before = module.weight
    with torch.no_grad():
        expected = model(**inputs("gpt2")).logits
        torch.testing.assert_close(adapted.merge()(**inputs("gpt2")).logits, expected, atol=1e-5, rtol=1e-5)
    changed = (module.weight != before).any(dim=1)
    assert changed.tolist() == [False] * 64 + [True] * 32


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"group": 12}, {"group": 0}, {"bits": 3}, {"compute": "int8"}], ids=str
)
def test_bad_values(options):
    with pytest.raises(PeftlibError, match=str(next(iter(options.values())))):
        peftlib.attach(backbone("bert"), "qa_lora", **(OPTIONS | options))


# What is published

LAYER = "yuhuixu1993/qa-lora, peft_utils.py, GPTQLoraLinear"


def check_dropout_after_the_pool():
    """``lora_dropout(qa_pool(x))``: what is dropped are whole groups' means."""
    adapted = tiny("qa_lora", dropout=0.5)
    site, update = next(iter(adapted.method.updates.items()))
    update.train()
    seen = []
    update.dropout.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[-1]))
    update(torch.randn(2, 3, site.in_features), torch.zeros(2, 3, site.out_features))
    assert seen == [site.in_features // adapted.config.group]


def check_ranks_above_the_groups():
    """``LoraLayer`` has no check: rank 64 stands on 12 pooled inputs, whose product has rank 12 at most."""
    update = next(iter(peftlib.attach(backbones.shapes("minilm-l6"), "qa_lora").method.updates.values()))
    assert update.A.shape == (64, 384 // 32)


FACTS = Facts(
    "qa_lora",
    Default("rank", 64, "yuhuixu1993/qa-lora, qalora.py, TrainingArguments"),
    Default("alpha", 16.0, "yuhuixu1993/qa-lora, qalora.py, TrainingArguments"),
    Default("dropout", 0.0, "yuhuixu1993/qa-lora, qalora.py, TrainingArguments"),
    Default("group", 32, "yuhuixu1993/qa-lora, peft_utils.py: group_size"),
    Default("bits", 4, "chosen here: the paper has 4, 3 and 2 bits, the code takes the model's"),
    Default("targets", "all-linear", "yuhuixu1993/qa-lora, qalora.py, find_all_linear_names"),
    Start("*.lora.A", glorot_uniform(), f"{LAYER}.reset_lora_parameters"),
    Start("*.lora.B", zeros(), f"{LAYER}.reset_lora_parameters"),
    Trains(("*.lora.A", "*.lora.B"), LAYER),
    Holds("dropout comes after the pool", check_dropout_after_the_pool, f"{LAYER}.forward"),
    Holds("a rank may be above the number of groups", check_ranks_above_the_groups, f"{LAYER}.__init__"),
    Count("llama-7b", 89_309_184, "r (in / g + out) a map"),
    Count("roberta-base", 5_474_304, "r (in / g + out) a map"),
    Count("t5-base", 13_381_632, "r (in / g + out) a map"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
