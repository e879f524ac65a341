"""The sequential adapter: its formula at both places, its start, the norms it trains."""

import pytest
import torch

import peftlib
from peftlib import backbones
from tests.methods.facts import Count, Default, Facts, Start, Trains, normal, truncated_normal, zeros
from tests.methods.helpers import Spy, backbone, inputs, linear, perturb


def sequential_adapter(y, W_down, b_down, W_up, b_up, activation="gelu"):
    """Houlsby et al. 2019: h + W_up act(W_down h + b_down) + b_up for a block's output h (tokens, d), in float64."""
    act = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "swish": torch.nn.functional.silu}[activation]
    h, down, up = y.double(), W_down.double(), W_up.double()
    return (h + act(h @ down.T + b_down.double()) @ up.T + b_up.double()).to(y.dtype)


@pytest.mark.parametrize("family", list(backbones.tiny.FAMILIES))
@pytest.mark.parametrize("activation", ["gelu", "swish"])
def test_adds_its_bottleneck_to_the_output_of_both_blocks(family, activation):
    model = backbone(family)
    adapted = peftlib.attach(model, "sequential_adapter", bottleneck=4, activation=activation)
    perturb(adapted)
    model.double()
    sites = adapted.host.anatomy.sites(("attention.output", "ffn.down"))
    assert len(sites) == 2 * adapted.host.anatomy.num_layers
    spy = Spy(*(site.module for site in sites))
    with torch.no_grad():
        model(**inputs(family, 2))
    for site in sites:
        a = site.module.sequential_adapter
        x, output = spy[site.module]
        own = linear(site, x).reshape(-1, adapted.host.anatomy.d)
        parts = [t.detach() for t in (a.down.weight, a.down.bias, a.up.weight, a.up.bias)]
        expected = sequential_adapter(own, *parts, activation=activation)
        torch.testing.assert_close(output.reshape(expected.shape), expected, atol=1e-12, rtol=1e-10)


def test_start_is_truncated_normal_or_the_identity():
    model, data = backbone("bert"), inputs("bert")
    before = model(**data).logits
    adapted = peftlib.attach(model, "sequential_adapter", bottleneck=64)
    new = {n: p.detach() for n, p in adapted.trainable().items() if "sequential_adapter" in n}
    weights = torch.cat([p.flatten() for n, p in new.items() if n.endswith("weight")])
    assert float(weights.abs().max()) <= 0.02
    # A normal distribution cut off at two standard deviations has 0.88 of the standard deviation.
    assert float(weights.std()) == pytest.approx(0.0088, rel=0.03)
    assert all(not p.any() for n, p in new.items() if n.endswith("bias"))
    distance = float((model(**data).logits - before).norm() / before.norm())
    assert 0 < distance < 0.05
    adapted.detach()
    peftlib.attach(model, "sequential_adapter", zero_up=True)
    assert torch.equal(model(**data).logits, before)


def test_trains_the_norms_of_its_blocks():
    adapted = peftlib.attach(backbone("bert"), "sequential_adapter")
    norms = [n for n in adapted.trainable() if "LayerNorm" in n]
    assert len(norms) == 8
    assert all(".layer." in n for n in norms)
    off = peftlib.attach(backbone("bert"), "sequential_adapter", train_norms=False)
    assert not [n for n in off.trainable() if "LayerNorm" in n]


@pytest.mark.parametrize("train_norms", [True, False])
def test_count(train_norms):
    adapted = peftlib.attach(backbones.shapes("bert-base-uncased"), "sequential_adapter", train_norms=train_norms)
    assert adapted.count().method == 12 * (2 * (2 * 768 * 64 + 64 + 768) + (4 * 768 if train_norms else 0))


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_cross_attention_is_an_option(family):
    plain = peftlib.attach(backbone(family), "sequential_adapter", bottleneck=4)
    more = peftlib.attach(backbone(family), "sequential_adapter", bottleneck=4, cross_attention=True)
    extra = more.trainable().keys() - plain.trainable().keys()
    name = {"t5": "EncDecAttention.o.sequential_adapter", "bart": "encoder_attn.out_proj.sequential_adapter"}[family]
    adapters = [n for n in extra if name in n]
    norms = [n for n in extra if "norm" in n]
    assert len(adapters) == 2 * 4
    assert len(norms) == {"t5": 2, "bart": 4}[family]
    assert len(extra) == len(adapters) + len(norms)


CODE = "google-research/adapter-bert, modeling.py, feedforward_adapter"
FACTS = Facts(
    "sequential_adapter",
    Default("bottleneck", 64, f"{CODE}: hidden_size=64"),
    Default("activation", "gelu", CODE),
    Default("dropout", 0.0, f"{CODE}: none"),
    Default("train_norms", True, "the paper's figure 2: the layer norms of a layer train; optimization.py"),
    Default("cross_attention", False, "rabeehk/compacter, third_party/models/t5/modeling_t5.py: none there"),
    Start(
        "*.down.weight", truncated_normal(0.01), "section 3.6: N(0, 0.01^2) cut at two deviations; the code has 0.001"
    ),
    Start("*.up.weight", truncated_normal(0.01), "section 3.6, as above"),
    Start("*.sequential_adapter.*.bias", zeros(), CODE),
    Start(
        "*.down.weight",
        normal(0.02),
        "AdapterHub, adapters/modeling.py, init_bert_weights",
        {"variant": "pfeiffer", "init_std": 0.02},
    ),
    Trains(
        ("*.sequential_adapter.*", "*.attention.output.LayerNorm.*", "*.layer.*.output.LayerNorm.*"),
        "figure 2; the embeddings' norm, which the code trains too, stays frozen here",
    ),
    Count(
        "bert-large-uncased", 24 * (2 * (2 * 1024 * 64 + 64 + 1024) + 4 * 1024), "figure 2 and section 2.1 with m = 64"
    ),
    Count("roberta-base", 2_416_128, "the same formula, 2 (2 d m + d + m) and the norms a layer"),
    Count("t5-base", 4_795_392, "the same formula; two adapters a layer as in rabeehk/compacter"),
    Count("llama-7b", 34_082_816, "the same formula"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
