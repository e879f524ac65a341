"""The project's loop: seeds, accumulation, precision, evaluation, rates, and the mode in which it leaves the model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from datasets import Dataset

import peftlib
from peftlib import tasks
from peftlib.conformance.case import Case, backbone, logits, tokenizer
from peftlib.conformance.checks import assert_same_structure, structure_of
from peftlib.errors import DataError, StateError, UnknownNameError, UnsupportedError
from peftlib.training import evaluate_task


def fitted(method: str = "lora", family: str = "bert", model=None, **options) -> tuple[peftlib.Adapted, object]:
    adapted = Case(method, family).start(model)
    defaults = {"steps": 6, "batch_size": 4, "log_every": 1, "progress": False, "learning_rate": 1e-2}
    return adapted, peftlib.fit(adapted, tasks.load("smoke"), tokenizer=tokenizer(family), **(defaults | options))


def equal(a: peftlib.Adapted, b: peftlib.Adapted) -> bool:
    mine, yours = a.state(), b.state()
    return mine.keys() == yours.keys() and all(torch.equal(mine[n], yours[n]) for n in mine)


def distance(a: peftlib.Adapted, b: peftlib.Adapted) -> float:
    mine, yours = a.trainable(), b.trainable()
    assert mine.keys() == yours.keys()
    return max(float((mine[n] - yours[n]).detach().abs().max()) for n in mine)


@pytest.mark.parametrize("method", peftlib.methods())
def test_the_same_seed_gives_the_same_run(method):
    (first, one), (second, two) = (fitted(method, seed=3, steps=3) for _ in range(2))
    assert equal(first, second)
    assert one.metrics == two.metrics
    assert one.history == two.history


def test_another_seed_gives_another_run():
    (first, _), (second, _) = (fitted(seed=s) for s in (0, 1))
    assert not equal(first, second)


def test_it_learns_the_task():
    adapted = peftlib.attach(backbone("bert"), "full")
    task = tasks.load("smoke")
    before = evaluate_task(adapted, task, "train", tokenizer("bert"))
    peftlib.fit(adapted, task, tokenizer=tokenizer("bert"), steps=60, batch_size=16, learning_rate=2e-3, progress=False)
    after = evaluate_task(adapted, task, "train", tokenizer("bert"))
    assert after["loss"] < 0.5 * before["loss"]
    assert after["accuracy"] > 0.9


def test_accumulated_steps_equal_steps_on_large_batches():
    (small, one), (large, two) = (
        fitted(batch_size=b, gradient_accumulation=a, learning_rate=1e-3, group_by_length=False)
        for b, a in ((4, 2), (8, 1))
    )
    assert one.steps == two.steps == 6
    assert distance(small, large) < 1e-5
    assert [h["loss"] for h in one.history if "loss" in h] == pytest.approx(
        [h["loss"] for h in two.history if "loss" in h], abs=1e-4
    )


@pytest.mark.parametrize(("family", "head"), [("llama", "causal_lm"), ("t5", "seq2seq")])
@pytest.mark.parametrize("method", ["lora", "adalora", "prompt_tuning"])
def test_accumulated_steps_weigh_the_labels_of_texts_of_unlike_lengths_alike(method, family, head):
    rows = [
        {"text": f"the movie {i}", "label": " ".join(["good", "bad", "fine"] * (1 + 3 * (i % 3)))} for i in range(8)
    ]
    task = tasks.Task("texts", head, {"train": Dataset.from_list(rows)}, "custom", ("nll",))
    ends, losses = [], []
    for size, times in ((8, 1), (2, 4), (3, 3)):
        adapted = Case(method, family, head).attach()
        options = {"evaluate_on": None, "progress": False, "group_by_length": False, "learning_rate": 1e-3}
        result = peftlib.fit(
            adapted,
            task,
            tokenizer=tokenizer(family),
            steps=2,
            batch_size=size,
            gradient_accumulation=times,
            log_every=1,
            **options,
        )
        ends.append(adapted)
        losses.append([h["loss"] for h in result.history])
    for other, loss in zip(ends[1:], losses[1:]):
        assert distance(ends[0], other) < 1e-5
        assert loss == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_bf16_trains_in_float32_parameters_and_leaves_forward_as_it_was(family):
    model = backbone(family)
    structure = structure_of(model)
    exact, _ = fitted(family=family, learning_rate=1e-3)
    rounded, result = fitted(family=family, model=model, precision="bf16", learning_rate=1e-3)
    assert {p.dtype for p in rounded.trainable().values()} == {torch.float32}
    assert 0 < distance(exact, rounded) < 0.05
    assert all(torch.isfinite(torch.tensor(list(h.values()))).all() for h in result.history)
    assert Case("lora", family).logits(model).dtype == torch.float32
    rounded.detach()
    assert_same_structure(structure_of(model), structure)


def test_each_run_has_its_own_precision():
    adapted = peftlib.attach(backbone("bert"), "lora")
    seen = []
    query = adapted.host.anatomy.sites("attention.query")[0].module
    query.register_forward_hook(lambda m, x, y: seen.append(y.dtype) if m.training else None)
    for precision in ("no", "bf16", "no", "bf16"):
        peftlib.fit(
            adapted, tasks.load("smoke"), tokenizer=tokenizer("bert"), steps=1, precision=precision, progress=False
        )
    assert seen == [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16]


def test_after_training_nothing_of_it_is_left_on_the_backbone():
    model = backbone("bert")
    before, structure = {n: t.clone() for n, t in model.state_dict().items()}, structure_of(model)
    adapted, _ = fitted(model=model)
    assert not model.training
    assert adapted.guard.running is None
    adapted.detach()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert_same_structure(structure_of(model), structure)


def test_evaluation_on_the_way_changes_nothing_and_training_goes_on_in_training_mode():
    modes = []
    adapted = peftlib.attach(backbone("bert"), "lora")
    adapted.model.bert.register_forward_hook(lambda m, *_: modes.append(m.training))
    options = {"tokenizer": tokenizer("bert"), "steps": 4, "batch_size": 8, "progress": False}
    result = peftlib.fit(adapted, tasks.load("smoke"), evaluate_every=2, **options)
    assert modes == [True, True, False, True, True, False]
    assert [h["step"] for h in result.history if "validation_loss" in h] == [2, 4]
    plain = peftlib.attach(backbone("bert"), "lora")
    peftlib.fit(plain, tasks.load("smoke"), evaluate_on=None, **options)
    assert equal(adapted, plain)


def test_metrics_are_those_of_the_model():
    adapted, result = fitted()
    task = tasks.load("smoke")
    rows = task.encode(tokenizer("bert"), "validation")
    padded = tokenizer("bert").pad({k: rows[k] for k in ("input_ids", "attention_mask")}, return_tensors="pt")
    answer = logits(adapted.model, **padded)
    labels = torch.tensor(rows["labels"])
    assert result.metrics["accuracy"] == pytest.approx(float((answer.argmax(-1) == labels).float().mean()))
    assert result.metrics["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(answer, labels)), abs=1e-5)


def test_the_head_has_a_rate_of_its_own():
    adapted = peftlib.attach(backbone("bert"), "lora")
    before = {n: p.detach().clone() for n, p in adapted.trainable().items()}
    peftlib.fit(
        adapted,
        tasks.load("smoke"),
        tokenizer=tokenizer("bert"),
        steps=2,
        learning_rate=1e-3,
        head_learning_rate=0.0,
        progress=False,
    )
    moved = {n for n, p in adapted.trainable().items() if not torch.equal(p, before[n])}
    assert moved == set(before) - set(adapted.head_names)


def test_the_methods_own_rate_is_the_default(monkeypatch):
    seen = {}
    plain = torch.optim.AdamW

    def record(groups, **options):
        seen.update(options, rates=[g["lr"] for g in groups])
        return plain(groups, **options)

    monkeypatch.setattr(torch.optim, "AdamW", record)
    fitted(learning_rate=None, steps=1)
    assert seen["rates"] == [peftlib.find("lora").learning_rate] * 2


def test_warmup_and_decay(monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def record(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    fitted(steps=10, warmup=0.2, learning_rate=1.0)
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])


def test_epochs_count_passes_over_the_rows():
    for accumulate, expected in ((1, 12), (2, 6)):
        adapted = peftlib.attach(backbone("bert"), "head")
        result = peftlib.fit(
            adapted,
            tasks.load("smoke"),
            tokenizer=tokenizer("bert"),
            epochs=2,
            batch_size=8,
            gradient_accumulation=accumulate,
            evaluate_on=None,
            progress=False,
        )
        assert result.steps == expected


@pytest.mark.parametrize(
    ("family", "head", "name"),
    [
        ("gpt2", "causal_lm", "smoke-lm"),
        ("llama", "causal_lm", "smoke-lm"),
        ("t5", "seq2seq", "smoke-seq2seq"),
        ("bart", "seq2seq", "smoke-seq2seq"),
        ("bert", "classification", "smoke-pair"),
    ],
)
def test_tasks_of_every_kind_train_and_their_metrics_agree_with_the_loss(family, head, name):
    adapted = peftlib.attach(backbone(family, head), "lora")
    task = tasks.load(name)
    before = evaluate_task(adapted, task, "validation", tokenizer(family), batch_size=5)
    peftlib.fit(adapted, task, tokenizer=tokenizer(family), steps=10, learning_rate=5e-3, progress=False)
    after = evaluate_task(adapted, task, "validation", tokenizer(family), batch_size=5)
    assert after["loss"] < before["loss"]
    assert after["nll"] == pytest.approx(after["loss"], abs=1e-4)
    whole = evaluate_task(adapted, task, "validation", tokenizer(family), batch_size=64)
    assert whole == pytest.approx(after, abs=1e-4), "the metrics depend on the batches"


def test_regression_trains():
    model = peftlib.backbones.load("tiny-bert", num_labels=1).model
    adapted = peftlib.attach(model, "lora")
    result = peftlib.fit(adapted, tasks.load("smoke-regression"), tokenizer=tokenizer("bert"), steps=3, progress=False)
    assert result.metrics["mse"] == pytest.approx(result.metrics["loss"], rel=1e-4)


def test_multiple_choice_is_evaluated_and_not_trained_on():
    rows = [{"text": f"the movie was {w}. answer:", "label": i % 2} for i, w in enumerate(("good", "bad", "fine"))]
    task = tasks.Task(
        name="choice",
        kind="multiple_choice",
        splits={"train": Dataset.from_list(rows), "test": Dataset.from_list(rows)},
        source="custom",
        metrics=("accuracy",),
        label_names=("a", "b"),
    )
    adapted = peftlib.attach(backbone("gpt2", "causal_lm"), "lora")
    metrics = evaluate_task(adapted, task, "test", tokenizer("gpt2"), batch_size=2)
    assert metrics["accuracy"] in (pytest.approx(1 / 3), pytest.approx(2 / 3), 0.0, 1.0)
    with pytest.raises(UnsupportedError, match="multiple choice"):
        peftlib.fit(adapted, task, tokenizer=tokenizer("gpt2"), progress=False)


def test_a_mixture_reports_each_task():
    mixed = tasks.mix([tasks.load("smoke"), tasks.load("smoke-pair")])
    adapted = peftlib.attach(backbone("bert"), "lora")
    result = peftlib.fit(adapted, mixed, tokenizer=tokenizer("bert"), steps=2, progress=False)
    assert {"smoke/accuracy", "smoke-pair/accuracy", "mean", "accuracy", "loss"} <= result.metrics.keys()


def test_the_schedule_takes_its_options():
    """Half a wave has the factors 1 and 1/2 in two steps; a whole one 1 and 0, so that its second step does nothing."""
    (one_step, _), (half_wave, _), (wave, _) = (
        fitted(warmup=0.0, steps=1),
        fitted(warmup=0.0, steps=2, schedule="cosine"),
        fitted(warmup=0.0, steps=2, schedule="cosine", schedule_options={"num_cycles": 1.0}),
    )
    assert equal(wave, one_step)
    assert distance(half_wave, one_step) > 0


# Bad input


def without(split: str, column: str) -> tasks.Task:
    task = tasks.load("smoke")
    splits = dict(task.splits)
    splits[split] = splits[split].remove_columns(column)
    return dataclasses.replace(task, splits=splits, _encoded={})


def refuse(error, match, task, **options):
    adapted = peftlib.attach(backbone("bert"), "lora")
    before = {n: p.detach().clone() for n, p in adapted.trainable().items()}
    with pytest.raises(error, match=match):
        peftlib.fit(adapted, task, tokenizer=tokenizer("bert"), progress=False, **({"steps": 1} | options))
    assert all(torch.equal(p, before[n]) for n, p in adapted.trainable().items())
    assert adapted.guard.running is None


def test_a_task_without_labels_says_which_split_and_what_it_has():
    refuse(DataError, r"'smoke' has no column 'label' in split 'train'.*it has: text", without("train", "label"))
    adapted = peftlib.attach(backbone("bert"), "lora")
    with pytest.raises(DataError, match="no labels in split 'test'"):
        evaluate_task(adapted, without("test", "label"), "test", tokenizer("bert"))


def test_an_empty_or_missing_split_is_named():
    task = tasks.load("smoke")
    empty = dataclasses.replace(
        task, splits=dict(task.splits) | {"train": task.splits["train"].select([])}, _encoded={}
    )
    refuse(DataError, "'smoke' has no rows in split 'train'", empty)
    refuse(UnknownNameError, "split of task 'smoke' 'validaton'.*'validation'", task, evaluate_on="validaton")


def test_a_task_for_another_head_says_how_to_load_the_backbone():
    refuse(UnsupportedError, "BertForSequenceClassification has no head.*head='causal_lm'", tasks.load("smoke-lm"))
    refuse(UnsupportedError, "needs 1 outputs.*has 2.*num_labels=1", tasks.load("smoke-regression"))
    language_model = peftlib.attach(backbone("gpt2", "causal_lm"), "lora")
    with pytest.raises(UnsupportedError, match=r"GPT2LMHeadModel has no head.*head='classification'"):
        peftlib.fit(language_model, tasks.load("smoke"), tokenizer=tokenizer("gpt2"))


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"steps": 0}, {"gradient_accumulation": 0}, {"batch_size": "8"}], ids=str
)
def test_sizes_that_cannot_be_are_named(options):
    refuse(peftlib.ConfigError, next(iter(options)), tasks.load("smoke"), **options)


def test_an_unknown_schedule_or_option_of_one_is_named():
    task = tasks.load("smoke")
    refuse(UnknownNameError, "'cosin'; did you mean 'cosine'.*Known: linear,.*inverse_sqrt", task, schedule="cosin")
    refuse(UnknownNameError, "schedule 'reduce_lr_on_plateau'", task, schedule="reduce_lr_on_plateau")
    wrong = {"schedule": "cosine", "schedule_options": {"num_cyles": 2}}
    refuse(peftlib.ConfigError, r"schedule_options=.*num_cyles.*'cosine'", task, **wrong)
    refuse(peftlib.ConfigError, "'warmup_stable_decay'.*num_decay_steps", task, schedule="warmup_stable_decay")


def test_training_after_leaving_is_an_error():
    adapted = peftlib.attach(backbone("bert"), "lora")
    adapted.detach()
    with pytest.raises(StateError, match="no longer attached"):
        peftlib.fit(adapted, tasks.load("smoke"), tokenizer=tokenizer("bert"))
