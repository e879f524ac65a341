"""Attention fusion: its equation token by token, and a backbone that keeps nothing for a backward pass."""

import math

import pytest
import torch

import peftlib
from peftlib import anatomy, backbones
from peftlib.conformance.case import batch, train
from peftlib.efficiency.bench import _kept
from tests.methods.facts import Count, Default, Facts, Start, Trains, zeros
from tests.methods.helpers import backbone, inputs, perturb

FAMILIES = list(backbones.tiny.FAMILIES)


def fused(states, query):
    """The mix of the layers' states (L of (B, n, d)) in plain numbers."""
    result = torch.zeros_like(states[0])
    for row in range(result.shape[0]):
        for token in range(result.shape[1]):
            scores = [sum(float(q) * float(x) for q, x in zip(query, h[row, token])) for h in states]
            weights = [math.exp(s - max(scores)) for s in scores]
            for weight, h in zip(weights, states):
                result[row, token] += weight / sum(weights) * h[row, token]
    return result


def layer_outputs(model, data):
    """What the layers of the last stack give, behind the norm that follows the last of them."""
    parts = anatomy.of(model)
    found = []
    layers = [layer.module for layer in parts.layers if layer.stack == parts.stacks[-1]]
    handles = [
        layer.register_forward_hook(lambda m, args, out: found.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    model(**data)
    for handle in handles:
        handle.remove()
    norm = parts.final_norm(parts.stacks[-1])
    return found if norm is None else [norm(state) for state in found]


def last_state(model, data):
    """What the last stack gives as a whole."""
    parts = anatomy.of(model)
    found = []
    module = parts.final_norm(parts.stacks[-1]) or parts.holder(parts.stacks[-1])
    handle = module.register_forward_hook(lambda m, args, out: found.append(out))
    model(**data)
    handle.remove()
    return found[0] if isinstance(found[0], torch.Tensor) else found[0][0]


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama", "t5", "bart"])
@torch.no_grad()
def test_the_equation_token_by_token(family):
    model, data = backbone(family).double(), inputs(family, 2)
    states = layer_outputs(model, data)
    adapted = peftlib.attach(model, "attention_fusion")
    adapted.model.double()
    mean = sum(states) / len(states)
    torch.testing.assert_close(last_state(model, data), mean, atol=1e-12, rtol=1e-12)
    perturb(adapted)
    query = adapted.host.paths().popitem()[1].query
    torch.testing.assert_close(last_state(model, data), fused(states, query), atol=1e-12, rtol=1e-10)


@torch.no_grad()
def test_the_head_gets_the_fused_state_through_the_frozen_pooler():
    plain, model, data = backbone("bert"), backbone("bert"), inputs("bert")
    adapted = peftlib.attach(model, "attention_fusion", train_head=False)
    perturb(adapted)
    states = fused(layer_outputs(plain, data), model.bert.encoder.attention_fusion.query)
    torch.testing.assert_close(model(**data).logits, plain.classifier(plain.bert.pooler(states)), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_embeddings_can_be_a_layer():
    model, data = backbone("bert"), inputs("bert")
    states = [model.bert.embeddings(data["input_ids"], data["token_type_ids"]), *layer_outputs(model, data)]
    peftlib.attach(model, "attention_fusion", with_embeddings=True)
    torch.testing.assert_close(last_state(model, data), sum(states) / 3, atol=1e-5, rtol=1e-4)


# No backward pass through the backbone


@pytest.mark.parametrize("family", FAMILIES)
def test_no_graph_in_the_backbone(family):
    """Also where something makes the embeddings require gradients, as Trainers do for checkpointing."""
    model = backbone(family)
    adapted = peftlib.attach(model, "attention_fusion")
    model.enable_input_require_grads()
    seen = []
    for layer in adapted.host.anatomy.layers:
        layer.module.register_forward_hook(
            lambda m, args, out: seen.extend(
                t.requires_grad for t in (args[0], out[0] if isinstance(out, tuple) else out)
            )
        )
    model.train()
    loss = model(**inputs(family), labels=torch.tensor([0, 1, 0])).loss
    assert len(seen) == 2 * adapted.host.anatomy.num_layers
    assert not any(seen)
    assert loss.requires_grad
    assert not adapted.host.paths().popitem()[1].run.value


def test_a_step_keeps_the_layers_outputs_and_next_to_nothing_else():
    model, data = backbone("bert").train(), batch("bert")
    outputs = 2 * data["input_ids"].numel() * 32 * 4
    peftlib.attach(model, "attention_fusion")
    kept = _kept(model, data)
    assert outputs <= kept < 1.5 * outputs


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_query_and_head_together_overfit_eight_texts(family):
    adapted = peftlib.attach(backbone(family), "attention_fusion")
    data = batch(family)
    train(adapted, data, steps=150, rate=0.02)
    assert torch.equal(adapted.model(**data).logits.argmax(-1), data["labels"])


def test_one_vector_is_the_papers_share_of_the_backbone():
    adapted = peftlib.attach(backbones.shapes("bert-base-uncased"), "attention_fusion")
    layers = sum(p.numel() for layer in adapted.host.anatomy.layers for p in layer.module.parameters())
    assert adapted.count().method == 768
    assert round(100 * 768 / layers, 4) == 0.0009


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart"])
def test_generation_with_beams_does_not_depend_on_the_cache(family):
    model = backbone(family, "seq2seq" if family == "bart" else "causal_lm")
    perturb(peftlib.attach(model, "attention_fusion"))
    data = {k: v for k, v in inputs(family, 1).items() if k != "token_type_ids"}
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    first, second = (model.generate(**data, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(first, second)


# The published facts

FACTS = Facts(
    "attention_fusion",
    Default("with_embeddings", False, "chosen here"),
    Start("*.attention_fusion.query", zeros(), "chosen here: the mean of the layers"),
    Trains(("*.attention_fusion.query",), "the abstract: decoupled from the frozen backbone"),
    # The abstract's 0.0009 % are 768 of the 85 million below the embeddings.
    Count("roberta-base", 768, "the abstract's 0.0009 %"),
    Count("t5-base", 768, "one vector"),
    Count("llama-7b", 4096, "one vector"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
