"""The tiny-attention adapter: its formula at both places, what it sees, averaged heads, its place in the cache."""

import math

import pytest
import torch

import peftlib
from peftlib import backbones
from peftlib.efficiency.speed import count_flops
from peftlib.errors import UnknownNameError, UnsupportedError
from peftlib.methods.base import ConfigError
from tests.methods.helpers import Spy, backbone, inputs, linear, perturb


def tiny_attention(z, visible, maps, W_O, b_O, p):
    """What is added at each position of one sample's z (n, d): one position, one head at a time. ``visible[t]`` are the
    positions that t attends to; ``maps`` are weight and bias of query, key and value, whose rows belong to one head of
    size p after the other."""
    rows = [[W @ h + b for h in z] for W, b in maps]
    added = []
    for t in range(len(z)):
        total = b_O.clone()
        for head in range(len(maps[0][1]) // p):
            part = slice(head * p, (head + 1) * p)
            q, k, v = ([row[part] for row in one] for one in rows)
            weights = [math.exp(float(q[t] @ k[s]) / math.sqrt(p)) for s in visible[t]]
            total += W_O[:, part] @ sum(weight / sum(weights) * v[s] for weight, s in zip(weights, visible[t]))
        added.append(total)
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
def test_adds_its_heads_over_all_that_the_block_attends_to(family, place):
    adapted = attached(family, heads=2, head_dim=1 if place == "parallel" else 2, place=place)
    adapted.model.double()
    layers, data = adapted.host.anatomy.layers, inputs(family, 3)
    spy = Spy(*(layer.sites[f"attention.{part}"].module for layer in layers for part in ("query", "output")))
    logits(adapted.model, data)
    for layer in layers:
        site = layer.sites["attention.output"]
        a = site.module.tiny_attention_adapter
        x = spy[layer.sites["attention.query"].module][0]
        inner, output = spy[site.module]
        own = linear(site, inner)
        maps = [(m.weight.detach(), m.bias.detach()) for m in (a.query, a.key, a.value)]
        for row in range(len(x)):
            real = [s for s in range(x.shape[1]) if layer.stack == "decoder" or data["attention_mask"][row, s]]
            visible = [[s for s in real if layer.stack == "encoder" or s <= t] for t in range(x.shape[1])]
            z = x[row] if place == "parallel" else own[row]
            parts = a.output.weight.detach(), a.output.bias.detach()
            expected = own[row] + tiny_attention(z, visible, maps, *parts, a.head_dim)
            # A decoder of one stack masks padding too, which only padding itself can tell: it comes last.
            seen = data["attention_mask"][row].bool() if len(adapted.host.anatomy.stacks) == 1 else slice(None)
            torch.testing.assert_close(output[row][seen], expected[seen], atol=1e-12, rtol=1e-10)


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
    adapted = attached("bert")
    layer = adapted.host.anatomy.layers[0]
    tiny = layer.sites["attention.output"].module.tiny_attention_adapter
    y = torch.randn(1, 5, adapted.host.anatomy.d)
    changed = y.clone()
    changed[0, 4] += 1
    difference = (tiny.delta(changed) - tiny.delta(y))[0, :4].abs().amax(-1)
    assert (difference > 1e-4).all()


def test_averaged_heads_give_the_same_output_when_they_are_equal_and_another_when_not():
    data = inputs("bert")
    adapted = attached("bert", heads=4)
    before = logits(adapted.model, data)
    adapted.method.average_heads()
    assert not torch.allclose(logits(adapted.model, data), before, atol=1e-3)
    adapted.method.average_heads(False)
    assert torch.equal(logits(adapted.model, data), before)
    with torch.no_grad():
        for tiny in adapted.method.adapters:
            for each in (tiny.query, tiny.key, tiny.value):
                each.weight.copy_(each.weight[:1].expand_as(each.weight).clone())
                each.bias.copy_(each.bias[:1].expand_as(each.bias).clone())
    equal = logits(adapted.model, data)
    assert not torch.allclose(equal, before, atol=1e-3)
    adapted.method.average_heads()
    torch.testing.assert_close(logits(adapted.model, data), equal, atol=1e-5, rtol=1e-5)


def test_averaged_heads_cost_what_one_head_costs_and_train_as_all():
    data = inputs("bert") | {"labels": torch.tensor([0, 1, 0])}
    four, one = attached("bert", heads=4), attached("bert", heads=1)
    costs = [count_flops(lambda a=a: logits(a.model, data)) for a in (four, one)]
    assert costs[0] > costs[1]
    four.method.average_heads()
    assert count_flops(lambda: logits(four.model, data)) == costs[1]
    four.model.train()
    four.model(**data).loss.backward()
    gradient = four.method.adapters[0].query.weight.grad
    assert len({round(float(row.norm()), 8) for row in gradient}) == 4


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
def test_beams_are_reordered_with_their_tiny_keys_and_values(family):
    adapted = attached(family, "seq2seq" if family in ("t5", "bart") else "causal_lm")
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


@pytest.mark.parametrize(("heads", "percent"), [(1, 0.035), (2, 0.062)])
def test_count(heads, percent):
    adapted = peftlib.attach(backbones.shapes("roberta-large"), "tiny_attention_adapter", heads=heads)
    assert adapted.count().method == 24 * (4 * 1024 * heads + 3 * heads + 1024)
    assert 100 * adapted.count().method / adapted.count().total == pytest.approx(percent, abs=6e-4)


def test_bad_options():
    with pytest.raises(ConfigError, match="heads=0"):
        peftlib.config("tiny_attention_adapter", heads=0)
    with pytest.raises(ConfigError, match="head_dim=0"):
        peftlib.config("tiny_attention_adapter", head_dim=0)
    with pytest.raises(UnknownNameError, match=r"'beside'.*Known: sequential, parallel"):
        peftlib.config("tiny_attention_adapter", place="beside")
