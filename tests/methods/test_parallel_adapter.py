"""The parallel adapter: its formula, its places, its count."""

import math

import pytest
import torch

import peftlib
from peftlib import backbones
from peftlib.errors import UnknownNameError
from peftlib.methods.base import ConfigError
from tests.methods.facts import Count, Default, Facts, Start, Trains, kaiming_uniform, zeros
from tests.methods.helpers import Spy, backbone, inputs, linear, perturb

FAMILIES = list(backbones.tiny.FAMILIES)


ACTIVATIONS = {"relu": lambda a: max(a, 0.0), "gelu": lambda a: 0.5 * a * (1 + math.erf(a / math.sqrt(2)))}


def parallel_adapter(x, y, W_down, b_down, W_up, b_up, s, activation):
    """He et al. 2022: y + s (W_up act(W_down x + b_down) + b_up), one token and one neuron at a time; x and y are a
    block's input and output (tokens, d)."""
    act, rows = ACTIVATIONS[activation], []
    for x_t, y_t in zip(x.tolist(), y.tolist()):
        inner = [act(sum(w * v for w, v in zip(row, x_t)) + b) for row, b in zip(W_down.tolist(), b_down.tolist())]
        delta = [sum(w * v for w, v in zip(row, inner)) + b for row, b in zip(W_up.tolist(), b_up.tolist())]
        rows.append([a + s * b for a, b in zip(y_t, delta)])
    return torch.tensor(rows, dtype=torch.float64)


def _check_formula(adapted, family, first, last, config):
    perturb(adapted)
    adapted.model.double()
    layers = [layer for layer in adapted.host.anatomy.layers if first in layer.sites]
    assert layers
    spy = Spy(*(layer.sites[name].module for layer in layers for name in (first, last)))
    with torch.no_grad():
        adapted.model(**inputs(family, 2))
    for layer in layers:
        a = layer.sites[last].module.parallel_adapter
        x = spy[layer.sites[first].module][0].reshape(-1, adapted.host.anatomy.d)
        inner, output = spy[layer.sites[last].module]
        own = linear(layer.sites[last], inner).reshape(-1, x.shape[-1])
        expected = parallel_adapter(
            x, own, a.down.weight, a.down.bias, a.up.weight, a.up.bias, config.scale, config.activation
        )
        torch.testing.assert_close(output.reshape(expected.shape), expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_adds_the_scaled_bottleneck_of_the_stream_to_the_sum(family):
    adapted = peftlib.attach(backbone(family), "parallel_adapter", bottleneck=5)
    perturb(adapted)
    adapted.model.double()
    layers = adapted.host.anatomy.layers
    first = {layer: layer.norms["ffn"] if layer.pre_norm else layer.sites["ffn.up"].module for layer in layers}
    spy, ends = Spy(*(m for layer in layers for m in (first[layer], layer.sites["ffn.down"].module))), {}
    for layer in layers:
        end = layer.module if layer.pre_norm else layer.norms["ffn"]
        look = lambda m, args, out, layer=layer: ends.update({layer: (args[0], out)})  # noqa: E731
        end.register_forward_hook(look)
    with torch.no_grad():
        adapted.model(**inputs(family, 2))
    for layer in layers:
        a, d = layer.sites["ffn.down"].module.parallel_adapter, adapted.host.anatomy.d
        x = spy[first[layer]][0].reshape(-1, d)
        inner, output = spy[layer.sites["ffn.down"].module]
        own = linear(layer.sites["ffn.down"], inner).reshape(-1, d)
        torch.testing.assert_close(output.reshape(-1, d), own)
        weights = (a.down.weight, a.down.bias, a.up.weight, a.up.bias)
        expected = x + parallel_adapter(x, own, *weights, adapted.config.scale, adapted.config.activation)
        before, after = ends[layer]
        total = (after if torch.is_tensor(after) else after[0]) if layer.pre_norm else before
        torch.testing.assert_close(total.reshape(-1, d), expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(
    ("family", "block"),
    [(f, "attention") for f in ("bert", "distilbert", "gpt2", "t5")] + [("t5", "cross_attention")],
)
def test_beside_the_attention(family, block):
    """Behind the block's norm, as in MBartAttention.forward of He et al.'s code."""
    model = backbone(family)
    adapted = peftlib.attach(model, "parallel_adapter", place="attention", bottleneck=3, scale=2.0, activation="gelu")
    _check_formula(adapted, family, f"{block}.query", f"{block}.output", adapted.config)


def test_starts_at_the_identity_in_every_layer():
    model, data = backbone("roberta"), inputs("roberta")
    before = model(**data).logits
    adapted = peftlib.attach(model, "parallel_adapter")
    assert torch.equal(model(**data).logits, before)
    downs = [p for n, p in adapted.trainable().items() if n.endswith("down.weight")]
    assert len(downs) == 2
    assert all(p.abs().min() > 0 for p in downs)


@pytest.mark.parametrize(("d", "layers", "name"), [(768, 12, "roberta-base"), (1024, 24, "roberta-large")])
def test_count(d, layers, name):
    adapted = peftlib.attach(backbones.shapes(name), "parallel_adapter", bottleneck=32)
    assert adapted.count().method == layers * (2 * d * 32 + 32 + d)


def test_bad_options():
    with pytest.raises(ConfigError, match="bottleneck=0"):
        peftlib.config("parallel_adapter", bottleneck=0)
    with pytest.raises(UnknownNameError, match=r"'feedforward'.*Known: ffn, attention"):
        peftlib.config("parallel_adapter", place="feedforward")
    with pytest.raises(UnknownNameError, match=r"'rleu'.*'relu'"):
        peftlib.config("parallel_adapter", activation="rleu")


CODE = "jxhe/unify-parameter-efficient-tuning"
FACTS = Facts(
    "parallel_adapter",
    Default("bottleneck", 512, f"{CODE}, exps/run_xsum.sh: FFN scaled parallel adapter, ffn_bn=512"),
    Default("scale", 4.0, f"{CODE}, exps/run_xsum.sh: ffn_adapter_scalar=4"),
    Default("place", "ffn", f"{CODE}, exps/run_xsum.sh: attn_mode=none"),
    Default("activation", "relu", f"{CODE}, petl/petl_factory.py, Adapter_Layer"),
    Default("dropout", 0.1, f"{CODE}, modeling_mbart.py: the model's dropout; run_en_ro.sh and BART: 0.1"),
    Start("*.down.weight", kaiming_uniform(), f"{CODE}, petl_factory.py, init_option lora"),
    Start("*.up.weight", zeros(), f"{CODE}, petl_factory.py, init_option lora"),
    Start("*.parallel_adapter.*.bias", zeros(), f"{CODE}, petl_factory.py, init_option lora"),
    Trains(("*.parallel_adapter.down.*", "*.parallel_adapter.up.*"), f"{CODE}: unfreeze_params=ef_, no norm"),
    Count("roberta-base", 12 * (2 * 768 * 16 + 16 + 768), f"{CODE}, exps/run_glue.sh: ffn_bn=16", {"bottleneck": 16}),
    Count("roberta-base", 9_452_544, "its formula at 512"),
    Count("t5-base", 18_905_088, "its formula at 512"),
    Count("llama-7b", 134_365_184, "its formula at 512"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
