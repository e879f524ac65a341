"""BitFit: which parameters train, the survey's count, families without biases."""

import pytest
import torch

import peftlib
from peftlib import backbones
from peftlib.errors import UnsupportedError
from tests.methods.facts import Count, Facts, Holds, Trains
from tests.methods.helpers import backbone, inputs, perturb

CODE = "benzakenelad/BitFit, glue_evaluator.py, _deactivate_relevant_gradients"


def _trained(**options):
    return set(peftlib.attach(backbone("bert"), "bitfit", train_head=False, **options).trainable())


def _subset():
    names = [n for n, _ in backbone("bert").named_parameters()]
    ends = ("attention.self.query.bias", "intermediate.dense.bias", "pooler.dense.bias")
    assert _trained(queries_and_inner=True) == {n for n in names if n.endswith(ends)}


def _all():
    names = [n for n, _ in backbone("bert").named_parameters()]
    assert _trained() == {n for n in names if "bias" in n and not n.startswith("classifier")}


FACTS = Facts(
    "bitfit",
    Trains(("*.bias",), f"{CODE}: every name that contains 'bias'"),
    Holds("every bias of BERT below the classifier trains", _all, CODE),
    Holds("the subset is queries and inner maps with the pooler", _subset, f"{CODE}: it adds 'pooler.dense.bias'"),
    Count("roberta-base", 102_144, "12 layers of 7 x 768 + 3,072, and the embeddings' norm, 768"),
    Count("bert-large-uncased", 272_384, "24 x (7 x 1,024 + 4,096), the embeddings' norm and the pooler, 1,024 each"),
    Count(
        "bert-large-uncased",
        24 * (1024 + 4096) + 1024,
        "README of the repository: --bias-terms query intermediate; with the pooler's bias",
        {"queries_and_inner": True},
    ),
)


@FACTS.tests
def test_published_facts(fact):
    fact()


WITHOUT = ("llama", "mistral", "t5", "mt5")
WITH = [f for f in backbones.tiny.FAMILIES if f not in WITHOUT]


@pytest.mark.parametrize("family", WITH)
def test_trains_every_bias_below_the_head_and_nothing_else(family):
    adapted = peftlib.attach(backbone(family), "bitfit", train_head=False)
    expected = {
        f"{path}.bias"
        for path, module in adapted.model.named_modules()
        if getattr(module, "bias", None) is not None and module in set(adapted.model.base_model.modules())
    }
    assert expected
    assert adapted.trainable().keys() == expected


def test_count_of_the_surveys_table():
    count = peftlib.attach(backbones.shapes("roberta-base"), "bitfit").count()
    assert (count.method, count.trained) == (102_144, 694_274)


def test_small_variant():
    adapted = peftlib.attach(backbones.shapes("roberta-base"), "bitfit", queries_and_inner=True)
    assert adapted.count().method == 12 * (768 + 3072)
    bert = peftlib.attach(backbone("bert"), "bitfit", queries_and_inner=True, train_head=False)
    assert {n.partition(".layer.")[2][2:] or n for n in bert.trainable()} == {
        "attention.self.query.bias",
        "intermediate.dense.bias",
        "bert.pooler.dense.bias",
    }
    with pytest.raises(UnsupportedError, match=r"c_attn.*queries_and_inner=False"):
        peftlib.attach(backbone("gpt2"), "bitfit", queries_and_inner=True)


@pytest.mark.parametrize("family", WITHOUT)
def test_families_without_biases_are_refused(family):
    model = backbone(family)
    with pytest.raises(UnsupportedError, match=r"has none.*ia3.*lora"):
        peftlib.attach(model, "bitfit")
    peftlib.attach(model, "ia3")


def test_merge_keeps_the_trained_biases_in_the_plain_backbone():
    model, data = backbone("roberta"), inputs("roberta")
    adapted = peftlib.attach(model, "bitfit")
    perturb(adapted)
    before = model(**data).logits
    assert torch.equal(adapted.merge()(**data).logits, before)
    assert not hasattr(model, "peftlib_adapted")
