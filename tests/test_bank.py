"""A bank: several adapters on one backbone, switched or mixed in one batch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import peftlib
from peftlib.conformance.case import Case, backbone, batch, inputs, logits, train
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


# One of each way in which something trains; the walk over all methods takes two minutes.
TRAINED = ["lora", "adalora", "bitfit", "fish_mask", "p_tuning", "prefix_tuning", "intrinsic_said", "compacter"]
TRAINED += ["hyperformer_pp", "propetl", "adamix", "mpt", "s4", "oft"]


@pytest.mark.parametrize("method", TRAINED)
def test_an_optimizer_that_was_made_once_trains_what_is_in_use(method):
    case = Case(method, "bert")
    bank = peftlib.Bank(case.backbone(), {name: case.attach(seed=seed).snapshot() for seed, name in enumerate("ab")})
    held = bank.use("a").trainable()
    optimizer = torch.optim.SGD(held.values(), lr=0.1)
    bank.use("b")
    adapted = bank.use("a")
    assert {n: id(p) for n, p in adapted.trainable().items()} == {n: id(p) for n, p in held.items()}
    before = {n: p.detach().clone() for n, p in held.items()}
    adapted.model.train()
    with adapted.task(0), adapted.lifecycle(100, 50) as life:
        life.step_start()
        adapted.model(**case.batch()).loss.backward()
        life.gradients()
        optimizer.step()
        optimizer.zero_grad()
        life.step_end()
        moved = {n for n, p in held.items() if not torch.equal(p, before[n])}
        assert moved - set(adapted.head_names)
        life.abandon()
    learned = logits(adapted.model, **case.inputs())
    bank.put_away()
    torch.testing.assert_close(logits(bank.use("a").model, **case.inputs()), learned)


def test_adapters_come_and_go(adapters):
    bank = peftlib.Bank(backbone("bert"), {"first": adapters["first"]})
    data = inputs("bert")
    alone = bank(task_ids=["first"] * 8, **data).logits
    bank.add("second", adapters["second"])
    mixed = bank(task_ids=[0, 1] * 4, **data, return_dict=True).logits
    torch.testing.assert_close(mixed[::2], alone[::2])
    with pytest.raises(peftlib.ConfigError, match=r"'second' already; remove\('second'\)"):
        bank.add("second", adapters["third"])
    train(bank.use("second"), batch("bert"))
    learned = logits(bank.model, **data)
    taken = bank.remove("second")
    assert bank.names == ("first",) and bank.name is None
    assert torch.equal(logits(peftlib.load(backbone("bert"), taken).model, **data), learned)
    with pytest.raises(UnknownNameError, match="'second'"):
        bank(task_ids=["second"] * 8, **data)
    torch.testing.assert_close(bank(task_ids=["first"] * 8, **data).logits, alone)


def test_threads_take_turns(adapters):
    bank, data = peftlib.Bank(backbone("bert"), adapters), inputs("bert")
    expected = {name: bank(task_ids=[name] * 8, **data).logits for name in adapters}
    with ThreadPoolExecutor(3) as pool:
        asked = [name for name in adapters for _ in range(4)]
        answers = pool.map(lambda name: bank(task_ids=[name] * 8, **data).logits, asked)
        for name, answer in zip(asked, answers):
            torch.testing.assert_close(answer, expected[name])
