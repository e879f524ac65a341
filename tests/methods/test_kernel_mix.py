"""Kernel-mix: its three maps head by head, what is shared, its merge through the key's weight."""

import pytest
import torch

import peftlib
from peftlib import backbones
from peftlib.conformance.case import batch, train
from peftlib.errors import PeftlibError
from tests.methods.facts import Count, Default, Facts, Start, Trains, truncated_normal
from tests.methods.helpers import Spy, backbone, inputs, linear, perturb

RANKS = {"rank_query": 2, "rank_value": 3, "shared_rank_query": 1, "shared_rank_value": 2}


def heads(x, y, A, B, bias, split_in, split_out):
    """y (n, out) with each head's own low-rank update of x (n, in), head by head: A (H, r, in_h), B (H, out_h, r)."""
    y = y + bias
    for h, (A_h, B_h) in enumerate(zip(A, B)):
        out_h, in_h = len(B_h), A_h.shape[1]
        x_h = x[:, h * in_h : (h + 1) * in_h] if split_in else x
        y_h = y[:, h * out_h : (h + 1) * out_h] if split_out else y
        y_h += x_h @ A_h.T @ B_h.T
    return y


@torch.no_grad()
def test_the_three_maps_head_by_head():
    model = backbone("bert")
    adapted = peftlib.attach(model, "kernel_mix", **RANKS)
    perturb(adapted)
    model.double()
    sites = adapted.host.anatomy.layers[1].sites
    query, key, value, output = (sites[f"attention.{n}"].module for n in ("query", "key", "value", "output"))
    spy = Spy(query, key, value, output)
    model(**inputs("bert"))

    def expected(site, source, split_in, split_out):
        x, update = spy[site.module][0][1, :5], site.module.kernel
        y = linear(site, x) + x @ site.module.shared.A.T @ site.module.shared.B.T
        return heads(source, y, update.A, update.B, update.bias, split_in, split_out)

    x, k = spy[query][0][1, :5], spy[key][1][1, :5]
    torch.testing.assert_close(k, linear(sites["attention.key"], x), atol=1e-12, rtol=1e-10)
    o = spy[output][0][1, :5]
    for site, source, split in (
        (sites["attention.query"], x, (False, True)),
        (sites["attention.value"], k, (True, True)),
        (sites["attention.output"], o, (True, False)),
    ):
        wanted = expected(site, source, *split)
        torch.testing.assert_close(spy[site.module][1][1, :5], wanted, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart"])
@torch.no_grad()
def test_the_value_gets_the_heads_key_in_other_families(family):
    """In a fused projection (GPT-2), with fewer key heads than query heads (LLaMA), in cross-attention (BART)."""
    model = backbone(family)
    adapted = peftlib.attach(model, "kernel_mix", maps=("value",), shared_rank_value=0)
    perturb(adapted)
    model.double()
    found = 0
    for site, key, update in adapted.method.heads:
        spy = Spy(site.module) if site.module is key.module else Spy(site.module, key.module)
        model(**inputs(family))
        x, y = spy[site.module]
        k = spy[key.module][1]
        if site.part:
            y, k = y.chunk(3, dim=-1)[2], k.chunk(3, dim=-1)[1]
        bias = torch.zeros(site.out_features) if update.bias is None else update.bias
        wanted = heads(k[0, :3], linear(site, x[0, :3]), update.A, update.B, bias, True, True)
        torch.testing.assert_close(y[0, :3], wanted, atol=1e-12, rtol=1e-10)
        assert len(update.A) == (adapted.host.anatomy.kv_heads)
        found += 1
    assert found == (6 if family == "bart" else 2)


@torch.no_grad()
def test_merged_weights_are_the_stated_ones():
    model = backbone("bert")
    adapted = peftlib.attach(model, "kernel_mix", **RANKS)
    perturb(adapted)
    plain = backbone("bert").bert.encoder.layer[0].attention.self
    value = model.bert.encoder.layer[0].attention.self.value
    own = torch.block_diag(*(b @ a for a, b in zip(value.kernel.A, value.kernel.B)))
    weight = plain.value.weight + own @ plain.key.weight + value.shared.B @ value.shared.A
    bias = plain.value.bias + own @ plain.key.bias + value.kernel.bias
    adapted.merge()
    torch.testing.assert_close(value.weight, weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(value.bias, bias, atol=1e-6, rtol=1e-5)


def test_starts_as_the_code_does_or_at_the_identity():
    model = backbone("bert")
    adapted = peftlib.attach(model, "kernel_mix")
    new = torch.cat([p.detach().flatten() for n, p in adapted.trainable().items() if n not in adapted.head_names])
    assert float(new.abs().max()) <= 0.02
    assert float(new.std()) == pytest.approx(0.0088, rel=0.05)  # a standard normal, cut off at two, has 0.88
    adapted.detach()
    with torch.no_grad():
        before = model(**inputs("bert")).logits
        adapted = peftlib.attach(model, "kernel_mix", init="zero")
        assert torch.equal(model(**inputs("bert")).logits, before)
    train(adapted, batch("bert"), steps=3)
    assert all(update.A.any() for _, _, update in adapted.method.heads)


def test_no_bias_where_the_map_has_none():
    adapted = peftlib.attach(backbone("llama"), "kernel_mix")
    assert all(update.bias is None for _, _, update in adapted.method.heads)
    assert not any(name.endswith("bias") for name in adapted.trainable())


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, 12 * 768 * (12 * 3 + 1 + 6 + 4 + 16 + 3)),
        ({"maps": ("query", "value")}, 12 * 768 * (13 + 1 + 4 + 4 + 1 + 8)),
        ({"rank_query": 0, "rank_value": 0}, 12 * 768 * (4 + 16)),
    ],
    ids=str,
)
def test_counts_on_roberta_base(options, numbers):
    adapted = peftlib.attach(backbones.shapes("roberta-base"), "kernel_mix", train_head=False, **options)
    assert adapted.count().method == numbers
    assert peftlib.card("kernel_mix").trained(L=12, d=768, H=12, **vars(adapted.config)) == numbers


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"maps": ("key",)}, "unknown map 'key'"),
        ({"maps": ()}, r"maps=\(\) with these ranks has nothing to train"),
        ({"rank_query": -1}, "rank_query=-1"),
        ({"init": "ones"}, "unknown init 'ones'"),
        ({"rank_query": 99}, r"rank 99 does not fit the heads of bert\S+query, of size 8; choose one from 0 to 8"),
        ({"shared_rank_value": 40}, "rank 40 does not fit"),
    ],
    ids=str,
)
def test_values_that_cannot_be(options, match):
    with pytest.raises(PeftlibError, match=match):
        peftlib.attach(backbone("bert"), "kernel_mix", **options)


# What is published

SCRIPT = "ychen-stat-ml/kernel-adapters, nlu/scripts/run_glue.sh, Kernel-mix"
LAYER = "ychen-stat-ml/kernel-adapters, nlu/petl/petl_factory.py, LoRALinear.reset_parameters, Houlsby"

FACTS = Facts(
    "kernel_mix",
    Default("rank_query", 1, SCRIPT),
    Default("rank_value", 2, SCRIPT),
    Default("shared_rank_query", 2, SCRIPT),
    Default("shared_rank_value", 4, SCRIPT),
    Default("maps", ("query", "value", "output"), f"{SCRIPT}: attn_option QVO"),
    Default("init", "normal", f"{SCRIPT}: lora_init Houlsby"),
    Default("dropout", 0.1, SCRIPT),
    Start("*.kernel.A", truncated_normal(0.01), LAYER),
    Start("*.kernel.B", truncated_normal(0.01), LAYER),
    Start("*.kernel.bias", truncated_normal(0.01), LAYER),
    Start("*.shared.A", truncated_normal(0.01), LAYER),
    Start("*.shared.B", truncated_normal(0.01), LAYER),
    Trains(("*.kernel.A", "*.kernel.B", "*.kernel.bias", "*.shared.A", "*.shared.B"), LAYER),
    Count("roberta-base", 12 * 768 * (12 * (1 + 2) + 1 + 3 * 2 + 3 + 2 * 2 + 4 * 4), "the formula in the docstring"),
    Count("t5-base", 1_741_824, "the same without biases, on three attentions"),
    Count("llama-7b", 16_121_856, "the same without biases, on 32 heads"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
