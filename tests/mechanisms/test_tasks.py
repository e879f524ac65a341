"""The tasks of a batch's rows, as children of multi-task methods see them."""

from __future__ import annotations

import copy

import pytest
import torch

import peftlib
from peftlib.conformance.case import Case, backbone, batch, inputs, lm_head, logits
from peftlib.errors import DataError
from peftlib.taxonomy import entry


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


SEVERAL = {
    "moelora": {"tasks": 2, "experts": 2, "rank": 4},
    "hyperformer_pp": {"tasks": 2, **entry("hyperformer_pp").tiny},
    "propetl": {"tasks": 2, **entry("propetl").tiny},
    "mpt": {"tasks": 2, **entry("mpt").tiny},
    "attempt": {"tasks": 2, **entry("attempt").tiny},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", SEVERAL)
def test_rows_of_no_task_are_refused_where_there_are_several(method, training):
    adapted = Case(method, "bert", options=SEVERAL[method]).attach()
    adapted.host.tasks.default = None
    adapted.model.train(training)
    with adapted.lifecycle(1):
        with pytest.raises(DataError, match=r"serves 2 tasks.*task_ids.*remove_unused_columns=False.*adapted\.task"):
            adapted.model(**batch("bert"))
        adapted.model(**batch("bert"), task_ids=torch.arange(8) % 2)
        with adapted.task(1):
            adapted.model(**batch("bert"))
        with pytest.raises(DataError, match="serves 2 tasks"):
            adapted.model(**batch("bert"))


@pytest.mark.parametrize(("family", "method"), [("llama", "moelora"), ("t5", "hyperformer_pp"), ("t5", "mpt")])
def test_text_is_generated_for_a_task_that_is_said(family, method):
    case = Case(method, family, lm_head(family), options=SEVERAL[method])
    adapted = case.attach()
    adapted.host.tasks.default = None
    text = {k: v for k, v in case.batch().items() if k != "labels"}
    with pytest.raises(DataError, match="serves 2 tasks"):
        adapted.model.generate(**text, max_new_tokens=2)
    with adapted.task(1):
        adapted.model.generate(**text, max_new_tokens=2)


def test_fit_trains_on_a_mixture_and_reports_each_member(watched):
    adapted, child = watched
    tasks = peftlib.tasks.mix([peftlib.tasks.load("smoke"), peftlib.tasks.load("smoke-pair")])
    tokenizer = peftlib.backbones.load("tiny-bert").tokenizer
    result = peftlib.fit(adapted, tasks, tokenizer=tokenizer, steps=2, evaluate_on="test", progress=False)
    assert {"smoke/accuracy", "smoke-pair/accuracy"} <= result.metrics.keys()
    assert {i for ids in child.seen for i in ids} == {0, 1}
