"""LoRA-FA: a frozen first factor, LoRA's gradient for the second, and no inputs kept for the backward pass."""

import warnings

import peft
import pytest
import torch

import peftlib
from peftlib.conformance.case import batch, train
from peftlib.efficiency.bench import _kept
from tests.methods.facts import Count, Default, Facts, Start, Trains, kaiming_uniform, zeros
from tests.methods.helpers import backbone, inputs, perturb


def test_a_stays_bit_identical_under_weight_decay():
    adapted = peftlib.attach(backbone("bert"), "lora_fa")
    before = {site: (u.A.clone(), u.B.clone()) for site, u in adapted.method.updates.items()}
    train(adapted, batch("bert"), steps=5, weight_decay=0.1)
    for site, update in adapted.method.updates.items():
        assert torch.equal(update.A, before[site][0])
        assert not torch.equal(update.B, before[site][1])
    assert not any(name.endswith("lora.A") for name in adapted.trainable())


@pytest.mark.parametrize("rank_stabilized", [False, True], ids=["lora", "rslora"])
def test_parity_with_hf_pefts_lora_whose_a_is_frozen(rank_stabilized):
    options = {"rank": 4, "alpha": 12.0, "rank_stabilized": rank_stabilized}
    adapted = peftlib.attach(backbone("bert"), "lora_fa", train_head=False, **options)
    perturb(adapted)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["query", "value"], use_rslora=rank_stabilized)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = peft.get_peft_model(backbone("bert"), config).eval()
    theirs = {}
    for site, update in adapted.method.updates.items():
        layer = oracle.get_submodule(f"base_model.model.{site.path}")
        with torch.no_grad():
            layer.lora_A.default.weight.copy_(update.A)
            layer.lora_B.default.weight.copy_(update.B)
        layer.lora_A.default.weight.requires_grad_(False)
        theirs[site] = layer.lora_B.default.weight
    data = inputs("bert")
    ours, reference = adapted.model(**data).logits, oracle(**data).logits
    torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
    ours.square().sum().backward()
    reference.square().sum().backward()
    for site, update in adapted.method.updates.items():
        assert update.A.grad is None
        torch.testing.assert_close(update.B.grad, theirs[site].grad, atol=1e-4, rtol=1e-4)


def test_kept_for_the_backward_pass_is_less_by_the_adapted_inputs():
    """On all linear maps of BERT, LoRA keeps three inputs a layer that nothing else needs: of the attention's
    projections and of both feed-forward maps. (Attention keeps its own output, which is the fourth.)"""
    data = batch("bert")
    kept = {}
    for name in ("lora", "lora_fa"):
        model = backbone("bert").train()
        peftlib.attach(model, name, targets="all-linear")
        kept[name] = _kept(model, data)
    tokens, config = data["input_ids"].numel(), backbone("bert").config
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    assert kept["lora"] - kept["lora_fa"] == 4 * tokens * layers * (2 * hidden + inner)


# What is published

PAPER = "arXiv:2308.03303v1, abstract: A is frozen, B trains"
CHOSEN = "chosen here, as LoRA's: no code of the first version could be had, and what describes it says random"

FACTS = Facts(
    "lora_fa",
    Default("rank", 8, CHOSEN),
    Default("alpha", 16.0, CHOSEN),
    Default("targets", ("*attention.query", "*attention.value"), CHOSEN),
    Start("*.lora.A", kaiming_uniform(), CHOSEN),
    Start("*.lora.B", zeros(), PAPER),
    Trains(("*.lora.B",), PAPER),
    Count("roberta-base", 147_456, "half of LoRA's"),
    Count("t5-base", 442_368, "half of LoRA's"),
    Count("llama-7b", 2_097_152, "half of LoRA's"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
