"""The tiny-attention adapter: beside the authors' code, its formula at both places, what it sees, averaged heads, its
place in the cache."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import RobertaConfig, RobertaModel

import peftlib
from peftlib import backbones
from peftlib.efficiency.speed import count_flops
from peftlib.errors import LoadError, UnknownNameError, UnsupportedError
from peftlib.methods.base import ConfigError
from tests.methods.facts import Count, Default, Facts, Holds, Start, Trains, constant, ones, uniform, zeros
from tests.methods.helpers import backbone, inputs, perturb

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "tiny_attention.safetensors")


def golden_model():
    """The RoBERTa of the golden file, with both layers."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = RobertaConfig(vocab_size=30, max_position_embeddings=20, pad_token_id=1, **sizes)
    model = RobertaModel(config, add_pooling_layer=False).eval()
    weights = {n.removeprefix("base."): t for n, t in GOLDEN.items() if n.startswith("base.")}
    model.load_state_dict(weights, strict=False)
    return model


def take_over(adapted, form):
    """Write the original's weights of a form into our heads."""
    names = {"linear1": "project", "linear2": "output"}
    with torch.no_grad():
        for i, adapter in enumerate(adapted.method.adapters):
            for j, head in enumerate(adapter.heads):
                there = f"{form}.layer.{i}.tiny_attn." + (f"{j}." if form == "ada" else "")
                given = {n.removeprefix(there): t for n, t in GOLDEN.items() if n.startswith(there)}
                for old, new in names.items():
                    given = {n.replace(old, new): t for n, t in given.items()}
                head.load_state_dict(given)


@pytest.mark.parametrize(
    ("form", "options"),
    [("m0", {}), ("s0", {"place": "parallel"}), ("wide", {"head_dim": 3}), ("ada", {"heads": 4})],
)
@torch.no_grad()
def test_gives_what_the_authors_code_gives(form, options):
    adapted = peftlib.attach(golden_model(), "tiny_attention_adapter", train_head=False, **options)
    take_over(adapted, form)
    real = GOLDEN["mask"].bool()
    out = adapted.model.eval()(GOLDEN["ids"], attention_mask=GOLDEN["mask"]).last_hidden_state
    torch.testing.assert_close(out[real], GOLDEN[f"{form}.out"][real], atol=2e-5, rtol=1e-5)
    assert (out[real] - GOLDEN["plain.out"][real]).abs().max() > 0.1
    if form == "ada":
        adapted.method.average_heads()
        out = adapted.model(GOLDEN["ids"], attention_mask=GOLDEN["mask"]).last_hidden_state
        torch.testing.assert_close(out[real], GOLDEN["average.out"][real], atol=2e-5, rtol=1e-5)


def tiny_attention(z, visible, head):
    """What a head adds at each position of one sample's z (n, d), one position at a time. ``visible[t]`` are the
    positions that t attends to."""
    p, a = head.attention.embed_dim, head.attention
    rows = F.layer_norm(z, z.shape[-1:], head.norm.weight, head.norm.bias) @ head.project.weight.T + head.project.bias
    Q, K, V = (
        rows[:, i * p : (i + 1) * p] @ a.in_proj_weight[i * p : (i + 1) * p].T + a.in_proj_bias[i * p : (i + 1) * p]
        for i in range(3)
    )
    added = []
    for t in range(len(z)):
        weights = [math.exp(float(Q[t] @ K[s]) / math.sqrt(p)) for s in visible[t]]
        mixed = sum(weight / sum(weights) * V[s] for weight, s in zip(weights, visible[t]))
        added.append(head.output.weight @ (a.out_proj.weight @ mixed + a.out_proj.bias) + head.output.bias)
    return torch.stack(added)


def attached(family, head="classification", **options):
    adapted = peftlib.attach(backbone(family, head), "tiny_attention_adapter", **options)
    perturb(adapted)
    return adapted


def logits(model, data):
    with torch.no_grad():
        return model.eval()(**data).logits


@pytest.mark.parametrize("place", ["sequential", "parallel"])
@pytest.mark.parametrize("family", list(backbones.tiny.FAMILIES))
@torch.no_grad()
def test_adds_to_the_stream_behind_the_attention(family, place):
    """roberta_bl.py's m0 and s0 where norms stand behind the sums; where they stand before the blocks, gpt_gen.py's
    GPT2BlockBL, sequential and not: the residual sum h behind the attention becomes h + a(h), or h + a(x) for the
    layer's input x."""
    adapted = attached(family, heads=2, head_dim=1 if place == "parallel" else 2, place=place)
    adapted.model.double().eval()
    data = inputs(family, 3)
    for layer in adapted.host.anatomy.layers:
        seen = {}
        layer.module.register_forward_pre_hook(lambda m, args, seen=seen: seen.update(x=args[0]))
        behind = "cross_attention" if "cross_attention" in layer.norms else "ffn"
        if layer.pre_norm:
            layer.sites["attention.output"].module.register_forward_hook(
                lambda m, args, out, seen=seen: seen.update(own=out)
            )
            layer.norms[behind].register_forward_hook(lambda m, args, out, seen=seen: seen.update(sum=args[0]))
            layer.norms["ffn"].register_forward_hook(lambda m, args, out, seen=seen: seen.update(before=args[0]))
            layer.sites["ffn.down"].module.register_forward_hook(lambda m, a, out, seen=seen: seen.update(ffn=out))
            layer.module.register_forward_hook(
                lambda m, args, out, seen=seen: seen.update(end=out if torch.is_tensor(out) else out[0])
            )
        else:
            norm = layer.norms["attention"]
            norm.register_forward_hook(
                lambda m, args, out, seen=seen: seen.update(
                    own=F.layer_norm(args[0], m.normalized_shape, m.weight, m.bias, m.eps), sum=out
                )
            )
        layer.module.seen = seen
    adapted.model(**data)
    for layer in adapted.host.anatomy.layers:
        seen = layer.module.seen
        adapter = (layer.module if layer.pre_norm else layer.norms["attention"]).tiny_attention_adapter
        x = seen["x"]
        h = (x + seen["own"].view_as(x)) if layer.pre_norm else seen["own"]
        for row in range(len(x)):
            real = [s for s in range(x.shape[1]) if layer.stack == "decoder" or data["attention_mask"][row, s]]
            visible = [[s for s in real if layer.stack == "encoder" or s <= t] for t in range(x.shape[1])]
            expected = h[row]
            for head in adapter.heads:
                reads = x[row] if place == "parallel" else expected
                expected = expected + tiny_attention(reads, visible, head) / 2
            # A decoder of one stack masks padding too, which only padding itself can tell: it comes last.
            shown = data["attention_mask"][row].bool() if len(adapted.host.anatomy.stacks) == 1 else slice(None)
            total = seen["sum"].view_as(x)[row]
            torch.testing.assert_close(total[shown], expected[shown], atol=1e-12, rtol=1e-10)
        if layer.pre_norm:
            end = seen["before"].view_as(x) + seen["ffn"].view_as(x)
            torch.testing.assert_close(seen["end"], end, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_what_stands_in_the_padding_does_not_matter(family):
    adapted = attached(family)
    data = inputs(family)
    other = data | {"input_ids": data["input_ids"].masked_fill(data["attention_mask"] == 0, 7)}
    assert not torch.equal(data["input_ids"], other["input_ids"])
    hidden = [adapted.model.eval().base_model(**d)[0][data["attention_mask"].bool()] for d in (data, other)]
    torch.testing.assert_close(*hidden)


def test_the_context_matters():
    """The attention of the layer cut off, a token's state still depends on the other tokens."""
    adapted = attached("bert").method.adapters[0].eval()
    y = torch.randn(1, 5, 32)
    changed = y.clone()
    changed[0, 4] += 1 + torch.arange(32)
    difference = (adapted.delta(y, changed) - adapted.delta(y, y))[0, :4].abs().amax(-1)
    assert (difference > 1e-4).all()


def test_attention_weights_drop_out_in_training_and_the_frozen_layers_do_not():
    for own, theirs in ((False, False), (True, False), (False, True)):
        model = backbones.load("tiny-bert", head="classification", dropout=0.3).model
        options = {"dropout": 0.5 if own else 0.0, "backbone_dropout": theirs, "train_head": False}
        adapted = peftlib.attach(model, "tiny_attention_adapter", **options)
        perturb(adapted)
        data = inputs("bert")
        with torch.no_grad():
            states = [adapted.model.train().base_model(**data)[0] for _ in range(2)]
        assert torch.equal(*states) == (not own and not theirs)
        adapted.detach()
        rates = {m.p for m in model.modules() if isinstance(m, nn.Dropout)}
        assert rates == {0.3}


def test_the_mean_of_the_heads_serves_and_all_of_them_train():
    data = inputs("bert")
    adapted = attached("bert", heads=4)
    before = logits(adapted.model, data)
    adapted.method.average_heads()
    averaged = logits(adapted.model, data)
    assert not torch.allclose(averaged, before, atol=1e-3)
    one = peftlib.attach(backbone("bert"), "tiny_attention_adapter")
    with torch.no_grad():
        for single, several in zip(one.method.adapters, adapted.method.adapters):
            for name, parameter in single.heads[0].named_parameters():
                parameter.copy_(sum(dict(h.named_parameters())[name] for h in several.heads) / 4)
        for name, parameter in one.host.anatomy.head.items():
            parameter.copy_(adapted.host.anatomy.head[name])
    torch.testing.assert_close(logits(one.model, data), averaged, atol=1e-5, rtol=1e-5)
    adapted.method.average_heads(False)
    assert torch.equal(logits(adapted.model, data), before)
    adapted.method.average_heads()
    costs = [count_flops(lambda a=a: logits(a.model, data)) for a in (adapted, one)]
    assert costs[0] == costs[1]
    adapted.model.train()
    adapted.model(**data, labels=torch.tensor([0, 1, 0])).loss.backward()
    gradients = [head.project.weight.grad for head in adapted.method.adapters[0].heads]
    assert len({round(float(g.norm()), 8) for g in gradients}) == 4


def test_several_heads_start_from_one_that_is_trained():
    one = attached("bert")
    several = peftlib.attach(backbone("bert"), "tiny_attention_adapter", heads=4)
    several.method.start_heads(one.state())
    for trained, heads in zip(one.method.adapters, several.method.adapters):
        given = dict(trained.heads[0].named_parameters())
        for head in heads.heads:
            for name, parameter in head.named_parameters():
                distance = (parameter - given[name]).abs().max()
                assert 0 < distance < 1e-5 if name.startswith("project.") else distance == 0
    with pytest.raises(LoadError, match=r"no \S+heads.0.norm.weight of shape \(32,\)"):
        several.method.start_heads({})


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
def test_beams_are_reordered_with_their_tiny_keys_and_values(family):
    adapted = attached(family, "seq2seq" if family in ("t5", "bart") else "causal_lm", heads=2)
    data = inputs(family)
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "output_scores": True}
    options |= {"return_dict_in_generate": True, "min_new_tokens": 6}
    for averaged in (False, True):
        adapted.method.average_heads(averaged)
        cached, fresh = (adapted.model.eval().generate(**data, use_cache=u, **options) for u in (True, False))
        assert torch.equal(cached.sequences, fresh.sequences)
        torch.testing.assert_close(cached.sequences_scores, fresh.sequences_scores, atol=1e-4, rtol=1e-4)


def test_a_cache_of_fixed_size_is_refused():
    adapted = attached("gpt2", "causal_lm")
    with pytest.raises(UnsupportedError, match=r'StaticCache.*cache_implementation="dynamic"'):
        adapted.model.generate(**inputs("gpt2"), max_new_tokens=2, cache_implementation="static")


def test_bad_options():
    with pytest.raises(ConfigError, match="heads=0"):
        peftlib.config("tiny_attention_adapter", heads=0)
    with pytest.raises(ConfigError, match="head_dim=0"):
        peftlib.config("tiny_attention_adapter", head_dim=0)
    with pytest.raises(ConfigError, match=r"dropout=1\.0 is no rate"):
        peftlib.config("tiny_attention_adapter", dropout=1.0)
    with pytest.raises(UnknownNameError, match=r"'beside'.*Known: sequential, parallel"):
        peftlib.config("tiny_attention_adapter", place="beside")


def _a_hundredth():
    """fan_in is p = 1 for torch's default start of W_2 and its bias: uniform below 1, then times 0.01."""
    adapted = peftlib.attach(backbone("bert"), "tiny_attention_adapter", seed=1)
    for adapter in adapted.method.adapters:
        for parameter in adapter.heads[0].output.parameters():
            assert 0.002 < parameter.abs().max() <= 0.01


CODE = "cindermond/tiny-attn, rewriter"
FACTS = Facts(
    "tiny_attention_adapter",
    Default("heads", 1, f"{CODE}/run/train_rewriter.py: one TinyAttention a layer"),
    Default("head_dim", 1, f"{CODE}/run/train_rewriter.py: attention_emd = 1"),
    Default("place", "sequential", f"{CODE}/run/train_rewriter.py and run_examples.sh: structure m0"),
    Default("dropout", 0.1, f"{CODE}/model/tiny_attn.py: attention_dropout = 0.1"),
    Default("backbone_dropout", False, f"{CODE}/run/train_rewriter.py: embeddings.eval(), encoder.layer.eval()"),
    Start("*.heads.0.norm.weight", ones(), f"{CODE}/model/tiny_attn.py: nn.LayerNorm"),
    Start("*.heads.0.norm.bias", zeros(), f"{CODE}/model/tiny_attn.py: nn.LayerNorm"),
    Start("*.heads.0.project.weight", uniform(lambda fan_in: fan_in**-0.5), f"{CODE}/model/tiny_attn.py: nn.Linear"),
    Start(
        "*.heads.0.attention.in_proj_weight",
        uniform(lambda fan_in, fan_out: (6 / (fan_in + fan_out)) ** 0.5),
        "torch's MultiheadAttention: Glorot",
        {"head_dim": 8},
    ),
    Start("*.heads.0.attention.in_proj_bias", constant(0.0), "torch's MultiheadAttention"),
    Start(
        "*.heads.0.output.weight",
        uniform(lambda fan_in: 0.01 * fan_in**-0.5),
        f"{CODE}/model/tiny_attn.py: linear2 *= 0.01",
        {"head_dim": 4},
    ),
    Trains(
        ("*.norm.*", "*.project.*", "*.attention.in_proj_*", "*.attention.out_proj.*", "*.output.*"),
        f"{CODE}/run/train_rewriter.py: tiny_attn and the classifier",
    ),
    Count("roberta-large", 172_296, "abstract: 0.05 %; 7,179 in each of 24 layers of the code", percent="0.05"),
    Count("roberta-large", 689_184, f"{CODE}/model/roberta_ada.py: four modules a layer", {"heads": 4}),
    Count("roberta-base", 12 * 5387, "4d + 3d + 11 with d = 768, from the code's modules"),
    Count("t5-base", 24 * 5387, "the same; placement on T5 chosen here"),
    Count("llama-7b", 32 * (7 * 4096 + 11), "the same; placement as in model/gpt_gen.py"),
    Holds("the output map starts at a hundredth", _a_hundredth, f"{CODE}/model/tiny_attn.py"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
