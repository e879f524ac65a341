"""Parameter counts of published models, from their shapes alone. The expected numbers are the publishers'."""

import pytest
import torch

from peftlib import backbones
from peftlib.backbones.shapes import TABLE
from peftlib.errors import UnknownNameError, UnsupportedError


def _count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "head", "expected"),
    [
        ("roberta-base", "classification", 124_647_170),
        ("roberta-base", "base", 124_645_632),
        ("roberta-large", "classification", 355_361_794),
        ("bert-base-uncased", "base", 109_482_240),
        ("distilbert-base-uncased", "base", 66_362_880),
        ("t5-small", "seq2seq", 60_506_624),
        ("t5-base", "seq2seq", 222_903_552),
        ("t5-large", "seq2seq", 737_668_096),
        ("bart-base", "base", 139_420_416),
        ("gpt2", "causal_lm", 124_439_808),
        ("opt-125m", "causal_lm", 125_239_296),
        ("llama-7b", "causal_lm", 6_738_415_616),
        ("llama-13b", "causal_lm", 13_015_864_320),
        ("llama-2-7b", "causal_lm", 6_738_415_616),
        ("mistral-7b", "causal_lm", 7_241_732_096),
        ("smollm2-135m", "causal_lm", 134_515_008),
        ("minilm-l6", "base", 22_713_216),
    ],
)
def test_parameter_counts(name, head, expected):
    model = backbones.shapes(name, head=head)
    assert _count(model) == expected
    assert all(p.is_meta for p in model.parameters())


def test_head_of_roberta_base_has_592130_parameters():
    model = backbones.shapes("roberta-base")
    assert _count(model.classifier) == 592_130
    assert _count(backbones.shapes("roberta-base", num_labels=3)) - _count(model) == 769


def test_falcon_180b():
    assert 178e9 < _count(backbones.shapes("falcon-180b", head="causal_lm")) < 181e9


@pytest.mark.parametrize("name", ["minilm-l6", "tiny-bert", "tiny-t5", "tiny-llama"])
def test_shapes_are_those_of_the_loaded_model(name):
    real = backbones.load(name, num_labels=3).model
    meta = backbones.shapes(name, num_labels=3)
    assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}


def test_folder_has_shapes(tmp_path):
    backbones.load("tiny-gpt2").model.config.save_pretrained(tmp_path)
    assert _count(backbones.shapes(tmp_path)) == _count(backbones.load("tiny-gpt2").model)


@pytest.mark.parametrize("name", list(TABLE))
def test_every_row_builds_without_memory(name):
    with torch.device("cpu"):
        model = backbones.shapes(name, head="base")
    assert all(t.is_meta for t in model.parameters())


def test_errors():
    with pytest.raises(UnknownNameError, match="roberta-base"):
        backbones.shapes("roberta base")
    with pytest.raises(UnsupportedError, match="'masked_lm'"):
        backbones.shapes("llama-7b", head="masked_lm")
