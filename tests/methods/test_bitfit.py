"""BitFit: which parameters train, the survey's count, families without biases."""

import pytest
import torch

import peftlib
from peftlib import backbones
from peftlib.errors import UnsupportedError
from tests.methods.helpers import backbone, inputs, perturb

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
