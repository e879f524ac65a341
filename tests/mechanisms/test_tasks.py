"""The tasks of a batch's rows, as children of multi-task methods see them."""

from __future__ import annotations

import copy

import pytest
import torch

import peftlib
from peftlib.conformance.case import backbone, batch, inputs, logits
from peftlib.errors import DataError


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
