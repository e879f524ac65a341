"""The residual adapter: its formula at the end of every layer, its norm, its start."""

import math

import pytest
import torch

import peftlib
from peftlib import backbones
from peftlib.errors import UnknownNameError
from peftlib.methods.base import ConfigError
from tests.methods.facts import Count, Default, Facts, Start, Trains, normal, ones, zeros
from tests.methods.helpers import backbone, inputs, perturb


def residual_adapter(h, gain, shift, W_down, b_down, W_up, b_up, eps=1e-5):
    """Lin et al. 2020: h + W_up ReLU(W_down LN(h) + b_down) + b_up, one token and one neuron at a time, for a layer's
    output h (tokens, d)."""
    rows = []
    for h_t in h.tolist():
        mean = sum(h_t) / len(h_t)
        spread = math.sqrt(sum((v - mean) ** 2 for v in h_t) / len(h_t) + eps)
        z = [g * (v - mean) / spread + b for v, g, b in zip(h_t, gain.tolist(), shift.tolist())]
        inner = [max(sum(w * v for w, v in zip(r, z)) + b, 0) for r, b in zip(W_down.tolist(), b_down.tolist())]
        delta = [sum(w * v for w, v in zip(r, inner)) + b for r, b in zip(W_up.tolist(), b_up.tolist())]
        rows.append([a + b for a, b in zip(h_t, delta)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("family", list(backbones.tiny.FAMILIES))
def test_adds_its_bottleneck_of_the_normed_output_of_every_layer(family):
    model = backbone(family)
    layers = [layer.module for layer in peftlib.anatomy.of(model).layers]
    before, after = {}, {}

    def see(where):
        def hook(module, args, output):
            where[module] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    # Hooks run in order of registration: this one sees the output that the adapter gets.
    for layer in layers:
        layer.register_forward_hook(see(before))
    adapted = peftlib.attach(model, "residual_adapter", bottleneck=4)
    perturb(adapted)
    model.double()
    for layer in layers:
        layer.register_forward_hook(see(after))
    with torch.no_grad():
        model(**inputs(family, 2))
    assert len(before) == len(layers)
    for layer in layers:
        a = layer.residual_adapter
        parts = (a.norm.weight, a.norm.bias, a.down.weight, a.down.bias, a.up.weight, a.up.bias)
        h = before[layer].reshape(-1, adapted.host.anatomy.d)
        expected = residual_adapter(h, *parts)
        torch.testing.assert_close(after[layer].reshape(expected.shape), expected, atol=1e-12, rtol=1e-10)


def test_start_is_normal_or_the_identity():
    model, data = backbone("gpt2"), inputs("gpt2")
    before = model(**data).logits
    adapted = peftlib.attach(model, "residual_adapter")
    new = {n: p.detach() for n, p in adapted.trainable().items() if "residual_adapter" in n}
    for part in ("down.weight", "up.weight"):
        weights = torch.cat([p.flatten() for n, p in new.items() if n.endswith(part)])
        assert float(weights.std()) == pytest.approx(0.02, rel=0.05)
        assert float(weights.abs().max()) > 0.05  # not cut off
    assert all(torch.equal(p, torch.ones_like(p)) for n, p in new.items() if n.endswith("norm.weight"))
    assert all(not p.any() for n, p in new.items() if n.endswith("bias"))
    assert not torch.equal(model(**data).logits, before)
    adapted.detach()
    peftlib.attach(model, "residual_adapter", zero_up=True)
    assert torch.equal(model(**data).logits, before)


def test_its_norm_makes_it_blind_to_the_scale_of_the_state():
    adapter = peftlib.attach(backbone("gpt2"), "residual_adapter").host.anatomy.layers[0].module.residual_adapter
    h = torch.randn(5, adapter.down.in_features)
    torch.testing.assert_close(adapter.delta(100 * h), adapter.delta(h), atol=1e-5, rtol=1e-3)


def test_count():
    adapted = peftlib.attach(backbones.shapes("gpt2"), "residual_adapter", bottleneck=300)
    assert adapted.count().method == 12 * (2 * 768 * 300 + 300 + 768 + 2 * 768)


def test_bad_options():
    with pytest.raises(ConfigError, match="bottleneck=0"):
        peftlib.config("residual_adapter", bottleneck=0)
    with pytest.raises(ConfigError, match="init_std=-1"):
        peftlib.config("residual_adapter", init_std=-1)
    with pytest.raises(UnknownNameError, match=r"'rleu'.*'relu'"):
        peftlib.config("residual_adapter", activation="rleu")


CODE = "zlinao/VGLM, pytorch_transformers/modeling_vlm.py"
FACTS = Facts(
    "residual_adapter",
    Default("bottleneck", 64, "chosen here: run.sh has 10, 100 or 300 by task"),
    Default("activation", "relu", f"{CODE}, Adapter"),
    Default("dropout", 0.0, f"{CODE}, Adapter: none"),
    Start("*.down.weight", normal(0.02), f"{CODE}, _init_weights"),
    Start("*.up.weight", normal(0.02), f"{CODE}, _init_weights"),
    Start("*.residual_adapter.*.bias", zeros(), f"{CODE}, _init_weights"),
    Start("*.norm.weight", ones(), f"{CODE}, Adapter: a norm of its own"),
    Trains(("*.residual_adapter.norm.*", "*.residual_adapter.down.*", "*.residual_adapter.up.*"), f"{CODE}, Adapter"),
    Count("gpt2", 12 * (2 * 768 * 300 + 300 + 3 * 768), f"{CODE}: 300 for translation", {"bottleneck": 300}),
    Count("roberta-base", 1_208_064, "its formula at 64; the paper is on GPT-2"),
    Count("t5-base", 2_416_128, "its formula at 64; both stacks chosen here"),
    Count("llama-7b", 17_172_480, "its formula at 64"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
