"""Several adapters: tasks in a batch, adapters built on adapters, a bank of them on one backbone."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch

import peftlib
from peftlib.conformance.case import Case, backbone, batch, inputs, logits, train
from peftlib.errors import DataError, LoadError, UnknownNameError
from peftlib.methods import base
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


def test_what_is_read_is_what_was_taken(tmp_path):
    adapted = Case("lora", "bert").trained()
    read, taken = peftlib.read(adapted.save(tmp_path / "mine")), adapted.snapshot()
    assert read.name == "mine" and read.config == taken.config == adapted.config
    assert read.head == taken.head and read.backbone == taken.backbone
    assert read.state.keys() == taken.state.keys()
    assert all(torch.equal(read.state[n], taken.state[n]) for n in read.state)
    before = Case("lora", "bert").logits(adapted.model)
    perturb(adapted)
    again = peftlib.load(backbone("bert"), taken)
    assert torch.equal(Case("lora", "bert").logits(again.model), before)


# The bank


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


# Tasks of rows


class Watch(torch.nn.Module):
    def __init__(self, tasks):
        super().__init__()
        self.tasks, self.seen = tasks, []

    def forward(self, x, y):
        self.seen.append(self.tasks.ids(len(y), y.device).tolist())
        return y


@pytest.fixture
def watched():
    adapted = peftlib.attach(backbone("bert"), "lora")
    child = Watch(adapted.host.tasks)
    adapted.host.after(adapted.host.anatomy.sites("attention.query")[0], "watch", child)
    return adapted, child


def test_children_see_the_tasks_of_the_rows(watched):
    adapted, child = watched
    data = inputs("bert")
    ids = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    plain = logits(adapted.model, **data)
    assert torch.equal(logits(adapted.model, **data, task_ids=ids), plain), "a method that asks for no task changes"
    with adapted.task(3):
        logits(adapted.model, **data)
    logits(adapted.model, **data)
    assert child.seen == [[0] * 8, ids.tolist(), [3] * 8, [0] * 8]


def test_an_encoder_that_generate_runs_alone_is_of_the_default_task():
    adapted = peftlib.attach(backbone("t5", "seq2seq"), "lora")
    child = Watch(adapted.host.tasks)
    adapted.host.after(adapted.host.anatomy.sites("attention.query")[0], "watch", child)
    adapted.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    adapted.model.train()
    adapted.model(**batch("t5", "seq2seq"), task_ids=ids).loss.backward()
    assert child.seen == [ids.tolist()] * 2, "checkpointing repeats the layer with the batch's tasks"
    child.seen.clear()
    text = {k: v for k, v in batch("t5", "seq2seq").items() if k != "labels"}
    with adapted.task(3):
        adapted.model.eval().generate(**text, max_new_tokens=2)
    assert child.seen == [[3] * 8]


def test_a_copy_has_tasks_of_its_own(watched):
    adapted, child = watched
    other = copy.deepcopy(adapted.model)
    logits(other, **inputs("bert"), task_ids=torch.arange(8))
    logits(adapted.model, **inputs("bert"))
    twin = next(m for m in other.modules() if isinstance(m, Watch))
    assert twin.seen == [list(range(8))] and child.seen == [[0] * 8]


def test_tasks_that_cannot_be_are_named(watched):
    adapted, _ = watched
    with pytest.raises(DataError, match="the batch has 3 task_ids, which do not fit 8 rows"):
        logits(adapted.model, **inputs("bert"), task_ids=torch.arange(3))
    adapted.host.tasks.count = 2
    with pytest.raises(DataError, match="task 2 is not one of this adapter's tasks, 0 to 1"):
        logits(adapted.model, **inputs("bert"), task_ids=torch.arange(8) % 3)
    with pytest.raises(DataError, match="task -1 is not one"), adapted.task(-1):
        pass
    logits(adapted.model, **inputs("bert"), task_ids=torch.arange(8) % 2)


def test_fit_trains_on_a_mixture_and_reports_each_member(watched):
    adapted, child = watched
    tasks = peftlib.tasks.mix([peftlib.tasks.load("smoke"), peftlib.tasks.load("smoke-pair")])
    tokenizer = peftlib.backbones.load("tiny-bert").tokenizer
    result = peftlib.fit(adapted, tasks, tokenizer=tokenizer, steps=2, evaluate_on="test", progress=False)
    assert {"smoke/accuracy", "smoke-pair/accuracy"} <= result.metrics.keys()
    assert {i for ids in child.seen for i in ids} == {0, 1}


# Adapters built on adapters


@dataclass(frozen=True)
class MeanConfig(base.MethodConfig):
    method = "mean"


class Mean(base.Method):
    """A method of the kind that averages its sources' LoRA factors."""

    Config = MeanConfig
    source_methods = ("lora",)

    def attach(self, host):
        from peftlib.methods.registry import resolve

        self.part = resolve(self.sources[0].config)
        self.part.attach(host)
        if self.sources[0].state is not None:
            names = [n for n in self.sources[0].state if n not in self.sources[0].head]
            with torch.no_grad():
                for name, parameter in host.trained().items():
                    if name in names:
                        parameter.copy_(torch.stack([s.state[name] for s in self.sources]).mean(0))


@pytest.fixture
def mean(monkeypatch):
    """Registered as a method for the time of a test."""
    from peftlib import adapted, saved
    from peftlib.methods.registry import config as known_config
    from peftlib.methods.registry import resolve as known_resolve

    def resolve(method, **options):
        return Mean(MeanConfig()) if method in ("mean", MeanConfig()) else known_resolve(method, **options)

    def config(method, **options):
        return MeanConfig() if method == "mean" else known_config(method, **options)

    monkeypatch.setattr(adapted, "resolve", resolve)
    monkeypatch.setattr(saved, "method_config", config)


def lora(seed: int, **options):
    adapted = peftlib.attach(backbone("bert"), "lora", seed=seed, **options)
    perturb(adapted, seed=seed)
    return adapted


def test_a_method_builds_on_saved_adapters_and_is_loaded_without_them(mean, tmp_path):
    sources = [lora(1).save(tmp_path / "one"), lora(2).snapshot()]
    adapted = peftlib.attach(backbone("bert"), "mean", sources=sources)
    states = [peftlib.read(sources[0]).state, sources[1].state]
    for name, parameter in adapted.trainable().items():
        if name not in adapted.head_names:
            assert torch.equal(parameter, (states[0][name] + states[1][name]) / 2)
    folder = adapted.save(tmp_path / "mean")
    for file in sources[0].iterdir():
        file.unlink()
    loaded = peftlib.load(backbone("bert"), folder)
    assert [s.name for s in loaded.method.sources] == ["one", "lora"]
    assert [s.config for s in loaded.method.sources] == [peftlib.config("lora")] * 2
    assert torch.equal(logits(loaded.model, **inputs("bert")), logits(adapted.model, **inputs("bert")))
    assert peftlib.read(loaded.save(tmp_path / "again")).state.keys() == peftlib.read(folder).state.keys()


def test_sources_that_do_not_fit_are_named(mean, tmp_path):
    model = backbone("bert")
    with pytest.raises(peftlib.ConfigError, match="lora takes no sources, and 1 were given"):
        peftlib.attach(model, "lora", sources=[lora(1).snapshot()])
    with pytest.raises(peftlib.ConfigError, match="mean builds on at least 2 saved adapters of lora, and 1 were given"):
        peftlib.attach(model, "mean", sources=[lora(1).snapshot()])
    wrong = peftlib.attach(backbone("bert"), "bitfit").snapshot()
    with pytest.raises(peftlib.ConfigError, match="'bitfit' is an adapter of bitfit; mean builds on lora"):
        peftlib.attach(model, "mean", sources=[lora(1).snapshot(), wrong])
    other = peftlib.attach(backbone("roberta"), "lora").snapshot()
    with pytest.raises(LoadError, match="made for a roberta backbone"):
        peftlib.attach(model, "mean", sources=[lora(1).snapshot(), other])
    with pytest.raises(LoadError, match=r"has no config\.json"):
        peftlib.attach(model, "mean", sources=[tmp_path, lora(1).snapshot()])
    assert not hasattr(model, "peftlib_adapted")
