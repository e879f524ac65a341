"""A bank: several adapters on one backbone, switched or mixed in one batch."""

from __future__ import annotations

import pytest
import torch

import peftlib
from peftlib.conformance.case import backbone, batch, inputs, logits, train
from peftlib.errors import DataError, LoadError, UnknownNameError
from tests.methods.helpers import perturb


@pytest.fixture
def adapters(tmp_path) -> dict:
    """Three adapters of two methods, two of them saved in folders."""
    made = {}
    for seed, (name, method) in enumerate({"first": "lora", "second": "parallel_adapter", "third": "lora"}.items()):
        adapted = peftlib.attach(backbone("bert"), method, seed=seed)
        perturb(adapted, seed=seed)
        made[name] = adapted.snapshot() if name == "third" else adapted.save(tmp_path / name)
    return made


def test_each_row_goes_through_its_own_adapter(adapters):
    bank = peftlib.Bank(backbone("bert"), adapters)
    data = inputs("bert")
    alone = {n: logits(peftlib.load(backbone("bert"), a).model, **data) for n, a in adapters.items()}
    names = ["third", "first", "second", "first", "third", "third", "second", "first"]
    expected = torch.stack([alone[n][i] for i, n in enumerate(names)])
    numbers = torch.tensor([bank.names.index(n) for n in names])
    for ids in (names, numbers, numbers.tolist()):
        assert torch.allclose(bank(task_ids=ids, **data).logits, expected, atol=1e-5)


def test_switching_keeps_what_was_learned_and_leaves_the_backbone(adapters):
    model = backbone("bert")
    plain = logits(model, **inputs("bert"))
    bank = peftlib.Bank(model, adapters)
    adapted = bank.use("first")
    assert bank.use("first") is adapted
    train(adapted, batch("bert"))
    learned = logits(model, **inputs("bert"))
    other = logits(bank.use("second").model, **inputs("bert"))
    assert not torch.equal(other, learned)
    assert torch.equal(logits(bank.use("first").model, **inputs("bert")), learned)
    assert torch.equal(logits(bank.put_away(), **inputs("bert")), plain)


def test_a_bank_refuses_what_does_not_fit(adapters):
    bank = peftlib.Bank(backbone("bert"), adapters)
    with pytest.raises(UnknownNameError, match=r"'fisrt'; did you mean 'first'"):
        bank.use("fisrt")
    with pytest.raises(UnknownNameError, match="adapter of the bank 7"):
        bank(task_ids=[7] * 8, **inputs("bert"))
    with pytest.raises(DataError, match="2 task ids were given for 8 rows"):
        bank(task_ids=[0, 1], **inputs("bert"))
    with pytest.raises(LoadError, match="made for a bert backbone"):
        peftlib.Bank(backbone("roberta"), adapters)
    with pytest.raises(peftlib.ConfigError, match="at least one"):
        peftlib.Bank(backbone("bert"), {})
