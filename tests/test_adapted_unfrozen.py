"""What trains beside method and head: unfrozen by hand, or by ``train_also``."""

from __future__ import annotations

import pytest
import torch

import peftlib
from peftlib.conformance.case import Case, backbone, train
from peftlib.errors import LoadError, StateError, TargetError

METHODS = ["lora", "bitfit", "prefix_tuning", "adalora", "mam_adapter", "p_tuning", "propetl"]
MORE = "bert.embeddings.word_embeddings.weight"


@pytest.mark.parametrize("method", METHODS)
def test_what_trains_also_is_saved_loaded_and_restored(method, tmp_path):
    case = Case(method, "bert")
    model = case.backbone()
    plain, adapted = case.logits(model), case.attach(model)
    before = adapted.count()
    assert adapted.train_also("*word_embeddings*") == (MORE,)
    assert adapted.count().trained == before.trained + model.get_parameter(MORE).numel()
    train(adapted, case.batch())
    learned, folder = case.logits(model), adapted.save(tmp_path / "adapter")
    assert peftlib.read(folder).also == (MORE,)
    loaded = peftlib.load(case.backbone(), folder)
    assert torch.equal(case.logits(loaded.model), learned)
    assert MORE in loaded.trainable()
    loaded.save(tmp_path / "again")
    for one in (adapted, loaded):
        assert torch.equal(case.logits(one.detach()), plain)


@pytest.mark.parametrize("names", ["word_embeddings", "LayerNorm", "layer.1.output.dense"])
def test_what_was_unfrozen_by_hand_counts_too(names, tmp_path):
    case = Case("lora", "bert")
    adapted = case.attach()
    own = {id(p) for p in adapted.trainable().values()}
    more = {n: p for n, p in adapted.model.named_parameters() if names in n and "lora" not in n}
    for parameter in more.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD([p for p in adapted.model.parameters() if p.requires_grad], lr=1.0)
    adapted.model(**case.batch()).loss.backward()
    optimizer.step()
    learned = case.logits(adapted.model)
    with pytest.warns(UserWarning, match=r"unfrozen after attach .*saved with the adapter.*train_also"):
        folder = adapted.save(tmp_path / "adapter")
    assert {n for n, p in adapted.trainable().items() if id(p) not in own} == set(more)
    assert torch.equal(case.logits(peftlib.load(case.backbone(), folder).model), learned)


def test_fit_trains_what_was_unfrozen():
    adapted = Case("lora", "bert").attach()
    adapted.model.get_parameter(MORE).requires_grad_(True)
    before = adapted.model.get_parameter(MORE).detach().clone()
    options = {"tokenizer": peftlib.backbones.load("tiny-bert").tokenizer, "steps": 2, "evaluate_on": None}
    with pytest.warns(UserWarning, match="unfrozen after attach"):
        peftlib.fit(adapted, peftlib.tasks.load("smoke"), progress=False, learning_rate=1e-2, **options)
    assert not torch.equal(adapted.model.get_parameter(MORE), before)
    adapted.detach()
    assert torch.equal(adapted.model.get_parameter(MORE), before)


def test_what_cannot_train_also_is_named(tmp_path):
    adapted = Case("lora", "bert").attach()
    with pytest.raises(TargetError, match=r"no parameter .* is named 'norm'"):
        adapted.train_also("norm")
    with pytest.raises(StateError, match="computed or written by intrinsic_said"):
        Case("intrinsic_said", "bert").attach().train_also("*query*original")
    with pytest.raises(StateError, match="computed or written by fish_mask"):
        Case("fish_mask", "bert").attach().train_also("*word_embeddings*")
    adapted.model.extra = torch.nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="extra"):
        folder = adapted.save(tmp_path / "adapter")
    with pytest.raises(LoadError, match=r"trained extra\.bias too, which this Bert"):
        peftlib.load(backbone("bert"), folder)
