"""AutoPEFT: which modules stand in which layers for a structure of the space."""

import pytest
import torch

import peftlib
from peftlib import backbones
from peftlib.errors import MergeError, TargetError
from peftlib.methods.base import ConfigError
from tests.methods.helpers import backbone, inputs, perturb

MODULES = {"serial": "sequential_adapter", "parallel": "parallel_adapter", "length": "prefix"}


@pytest.mark.parametrize(
    "sizes", [{"serial": 5, "parallel": 0, "length": 0}, {"serial": 0, "parallel": 7, "length": 3}, {"serial": 5}]
)
@pytest.mark.parametrize("layers", [(1, 0), (0, 1), (1, 1)])
def test_the_layers_that_are_on_have_the_modules_of_the_structure_and_the_others_nothing(sizes, layers):
    adapted = peftlib.attach(backbone("bert"), "autopeft", layers=layers, train_head=False, **sizes)
    on = {MODULES[name] for name in MODULES if sizes.get(name, 1)}
    for layer, bit in zip(adapted.host.anatomy.layers, layers):
        names = {n.rpartition(".")[2] for n, _ in layer.module.named_modules()}
        assert names & set(MODULES.values()) == (on if bit else set())
    trained = {n for n in adapted.trainable() if not any(m in n for m in MODULES.values())}
    assert not trained, "nothing of the backbone trains"


def test_no_layers_named_are_all_layers():
    some, every = (
        peftlib.attach(backbone("bert"), "autopeft", layers=bits, train_head=False) for bits in (None, (1, 1))
    )
    assert some.count() == every.count()
    assert some.trainable().keys() == every.trainable().keys()


@pytest.mark.parametrize(
    ("options", "one"),
    [
        ({"serial": 96, "parallel": 192, "length": 1}, 2 * 768 * 288 + 288 + 2 * 768 + 2 * 768),
        ({"serial": 0, "parallel": 0, "length": 3}, 2 * 768 * 3),
    ],
)
def test_count_on_bert_base(options, one):
    layers = (0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0)
    adapted = peftlib.attach(backbones.shapes("bert-base-uncased"), "autopeft", layers=layers, **options)
    assert adapted.count().method == 6 * one


@torch.no_grad()
def test_adapters_alone_start_at_the_backbone_and_a_prefix_does_not():
    plain = backbone("bert")(**inputs("bert")).logits
    adapters = peftlib.attach(backbone("bert"), "autopeft", length=0)
    prefix = peftlib.attach(backbone("bert"), "autopeft", serial=0, parallel=0, length=3)
    assert torch.equal(adapters.model(**inputs("bert")).logits, plain)
    assert not torch.equal(prefix.model(**inputs("bert")).logits, plain)


def test_an_encoder_decoder_has_a_bit_for_each_layer_of_both_stacks(tmp_path):
    adapted = peftlib.attach(backbone("t5", "seq2seq"), "autopeft", layers=(0, 0, 1, 0), serial=4)
    assert all(n.startswith("decoder.block.0.") for n in adapted.trainable())
    perturb(adapted)
    loaded = peftlib.load(backbone("t5", "seq2seq"), adapted.save(tmp_path / "a"))
    assert loaded.config == adapted.config
    assert all(torch.equal(t, adapted.state()[n]) for n, t in loaded.state().items())


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="leave nothing to train"):
        peftlib.config("autopeft", serial=0, parallel=0, length=0)
    with pytest.raises(ConfigError, match=r"layers=\(0, 0\) are not"):
        peftlib.config("autopeft", layers=(0, 0))
    with pytest.raises(ConfigError, match=r"layers=\(1, 2\) are not"):
        peftlib.config("autopeft", layers=(1, 2))
    with pytest.raises(TargetError, match=r"layers=\(1, 0, 1\) are for 3 layers, and BertForSeq\S+ has 2"):
        peftlib.attach(backbone("bert"), "autopeft", layers=(1, 0, 1))
    with pytest.raises(MergeError, match="autopeft has no merge"):
        peftlib.attach(backbone("bert"), "autopeft").merge()
