"""``transformers.Trainer`` with the callback: the same weights as the project's loop, resuming, and failing."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

import peftlib
from peftlib.conformance.case import Case, backbone, batch, logits, train
from peftlib.errors import LoadError, StateError, UnsupportedError
from peftlib.taxonomy import entry
from peftlib.training.callback import PeftCallback


def rows(family: str = "bert") -> list[dict[str, torch.Tensor]]:
    data = batch(family)
    return [{k: v[i] for k, v in data.items()} for i in range(len(data["labels"]))]


def arguments(folder, **options) -> TrainingArguments:
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "optim": "adamw_torch",
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    return TrainingArguments(output_dir=str(folder), **(defaults | options))


def trained(method: str, folder, family: str = "bert", callbacks=(), resume=None, **options) -> peftlib.Adapted:
    adapted = Case(method, family).attach()
    run = Trainer(
        adapted.model,
        arguments(folder, **options),
        train_dataset=rows(family),
        callbacks=[adapted.callback(), *callbacks],
    )
    run.train(resume_from_checkpoint=resume)
    return adapted


def by_hand(method: str, steps: int = 6, warmup: int = 0) -> peftlib.Adapted:
    """The same steps in a loop of one's own: batches of four in order, AdamW, linear decay, clipping at 1."""
    adapted = Case(method, "bert").attach()
    parameters = adapted.trainable()
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.0)
    life = adapted.lifecycle(steps)
    schedule = life.scheduler(optimizer, peftlib.Schedule("linear", warmup))
    data = rows()
    adapted.model.train()
    with life:
        for step in range(steps):
            life.step_start()
            part = data[:4] if step % 2 == 0 else data[4:]
            adapted.model(**{k: torch.stack([row[k] for row in part]) for k in part[0]}).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            life.gradients()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            life.step_end()
    adapted.model.eval()
    return adapted


def assert_close(one: peftlib.Adapted, two: peftlib.Adapted, tolerance: float = 1e-6) -> None:
    mine, yours = one.trainable(), two.trainable()
    assert mine.keys() == yours.keys()
    for name, parameter in mine.items():
        difference = float((parameter - yours[name]).detach().abs().max())
        assert difference <= tolerance, f"{name} differs by {difference:.1e}"


@pytest.mark.parametrize("method", ["lora", "adalora", "bitfit", "fish_mask"])
def test_trainer_and_a_loop_of_ones_own_give_the_same_weights(method, tmp_path):
    start = Case(method, "bert").attach()
    done = trained(method, tmp_path)
    assert_close(done, by_hand(method))
    assert any(not torch.equal(p, start.trainable()[n]) for n, p in done.trainable().items())


@pytest.fixture
def staged(monkeypatch):
    """Hadamard adapters, on the tiny models too, in two stages; IncreLoRA grows in their first."""
    tiny = {"hadamard_adapter": {"head_stage": 0.5}, "increlora": {"growth_end": 0.5}}
    for method, options in tiny.items():
        monkeypatch.setitem(entry(method).tiny, *next(iter(options.items())))


@pytest.mark.parametrize("method", ["hadamard_adapter", "increlora"])
@pytest.mark.parametrize("warmup", [0, 1])
def test_trainer_starts_the_schedule_anew_where_the_method_does(method, warmup, tmp_path, staged):
    done = trained(method, tmp_path, warmup_steps=warmup)
    assert_close(done, by_hand(method, warmup=warmup))


class Rates(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append(optimizer.param_groups[0]["lr"])


def test_trainer_s_rate_in_stages(tmp_path, staged):
    rates = Rates()
    trained("hadamard_adapter", tmp_path, callbacks=[rates], max_steps=8)
    assert rates.seen == pytest.approx([0.01, 0.0075, 0.005, 0.0025] * 2)


@pytest.mark.parametrize("method", ["hadamard_adapter", "increlora"])
@pytest.mark.parametrize("step", [2, 3, 4, 5])
def test_a_run_in_stages_resumes_in_any_of_them(method, step, tmp_path, staged):
    """Interrupted after a step and resumed from the checkpoint of the one before: before, at and after the border."""
    whole = trained(method, tmp_path / "whole")
    options = {"save_strategy": "steps", "save_steps": step - 1}
    with pytest.raises(KeyboardInterrupt):
        trained(method, tmp_path / "run", callbacks=[Stop(step)], **options)
    rates = Rates()
    resumed = trained(method, tmp_path / "run", callbacks=[rates], resume=True, **options)
    assert_close(whole, resumed)
    assert len(rates.seen) == 7 - step


@pytest.mark.parametrize("method", ["hadamard_adapter", "increlora"])
def test_a_schedule_of_ones_own_cannot_be_started_anew(method, tmp_path, staged):
    adapted = Case(method, "bert").attach()
    optimizer = torch.optim.AdamW(adapted.trainable().values(), lr=1e-2)
    own = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    run = Trainer(
        adapted.model,
        arguments(tmp_path),
        train_dataset=rows(),
        callbacks=[adapted.callback()],
        optimizers=(optimizer, own),
    )
    with pytest.raises(UnsupportedError, match=r"starts the learning-rate schedule anew.*lr_scheduler_type"):
        run.train()


def test_the_projects_loop_and_trainer_give_the_same_weights(tmp_path):
    """One batch of all rows, so that the order of the rows makes no difference."""
    from datasets import Dataset

    from peftlib import tasks
    from peftlib.conformance.case import LABELS, texts, tokenizer

    data = Dataset.from_dict({"text": texts(), "label": list(LABELS)})
    task = tasks.Task(
        name="eight",
        kind="classification",
        splits={"train": data},
        source="custom",
        metrics=("accuracy",),
        label_names=("a", "b"),
    )
    fitted = Case("lora", "bert").attach()
    peftlib.fit(
        fitted,
        task,
        tokenizer=tokenizer("bert"),
        steps=6,
        batch_size=8,
        learning_rate=1e-2,
        warmup=0.0,
        evaluate_on=None,
        progress=False,
    )
    done = trained("lora", tmp_path, per_device_train_batch_size=8)
    assert_close(fitted, done, 1e-5)


def test_accumulated_steps_run_the_moments_once_a_step(tmp_path):
    adapted = Case("lora", "bert").attach()
    calls = []
    adapted.method.on_step_start = lambda training: calls.append(("start", training.step, training.total))
    adapted.method.on_gradients = lambda training: calls.append(("gradients", training.step, training.total))
    adapted.method.on_step_end = lambda training: calls.append(("end", training.step, training.total))
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 3}
    Trainer(adapted.model, arguments(tmp_path, **options), train_dataset=rows(), callbacks=[adapted.callback()]).train()
    assert calls == [(name, step, 3) for step in range(3) for name in ("start", "gradients", "end")]


class Stop(TrainerCallback):
    """Stops training as Ctrl-C would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_a_run_resumes_from_a_checkpoint(method, tmp_path):
    """Interrupted after the fourth of six steps and resumed from the checkpoint of the third, it ends as it would."""
    whole = trained(method, tmp_path / "whole")
    options = {"save_strategy": "steps", "save_steps": 3}
    with pytest.raises(KeyboardInterrupt):
        trained(method, tmp_path / "run", callbacks=[Stop(4)], **options)
    resumed = trained(method, tmp_path / "run", resume=True, **options)
    assert_close(whole, resumed)


def test_after_an_interruption_the_same_trainer_starts_again(tmp_path):
    adapted = Case("adalora", "bert").attach()
    run = Trainer(adapted.model, arguments(tmp_path), train_dataset=rows(), callbacks=[adapted.callback(), Stop(2)])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.remove_callback(Stop)
    run.train()
    assert adapted.guard.running is None


def test_without_the_callback_a_method_with_moments_does_not_train(tmp_path):
    adapted = Case("adalora", "bert").attach()
    run = Trainer(adapted.model, arguments(tmp_path), train_dataset=rows())
    with pytest.raises(StateError, match=r"adalora acts during training.*callbacks=\[adapted\.callback\(\)\]"):
        run.train()


def test_two_loops_at_once_are_an_error():
    adapted = Case("lora", "bert").attach()
    with (
        adapted.lifecycle(2),
        pytest.raises(StateError, match="already being trained by another loop"),
        adapted.lifecycle(2),
    ):
        pass
    train(adapted, batch("bert"), steps=1)


def test_trainer_evaluates_in_the_middle(tmp_path):
    adapted = Case("lora", "bert").attach()
    run = Trainer(
        adapted.model,
        arguments(tmp_path, eval_strategy="steps", eval_steps=2),
        train_dataset=rows(),
        eval_dataset=rows(),
        callbacks=[adapted.callback()],
    )
    run.train()
    assert [e["step"] for e in run.state.log_history if "eval_loss" in e] == [2, 4, 6]
    assert_close(adapted, trained("lora", tmp_path))


def test_the_backbone_comes_back_after_trainer(tmp_path):
    model = backbone("bert")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    adapted = Case("lora", "bert").attach(model)
    Trainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=[adapted.callback()]).train()
    adapted.detach()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_gaussian_is_fitted_at_the_end_of_a_classification(tmp_path):
    adapted = trained("laplace_lora", tmp_path)
    found = adapted.method.predict(batch("bert"))
    data = rows()
    adapted.method.fit([{k: torch.stack([row[k] for row in half]) for k in half[0]} for half in (data[:4], data[4:])])
    torch.testing.assert_close(adapted.method.predict(batch("bert")), found)
    # No class to choose: one output is a regression, and a label a class is another loss.
    for problem, outputs in (("regression", 1), ("multi_label_classification", 2), (None, 1)):
        other = Case("laplace_lora", "bert").attach()
        other.model.config.problem_type, other.model.config.num_labels = problem, outputs
        callback = other.callback()
        callback.life = other.lifecycle(1).__enter__()
        callback.on_train_end(None, None, None, train_dataloader=[batch("bert")])
        assert not other.method.fitted and other.guard.running is None


# Resuming, repeating, searching


def checkpointed(folder, method: str = "lora", **options) -> None:
    adapted = Case(method, "bert", options=options).attach()
    made = arguments(folder, max_steps=3, save_strategy="steps", save_steps=2)
    Trainer(adapted.model, made, train_dataset=rows(), callbacks=[adapted.callback()]).train()


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("lora", {"alpha": 32.0}, r"alpha=\S+ there and 32\.0 here"),
        ("lora", {"rank": 3}, r"other options: .* has shape"),
        ("lora", {"targets": ("attention.query",)}, r"other options: it has \d+ tensors that this model has not"),
        ("bitfit", {}, r"another method than the one attached"),
        ("sequential_adapter", {}, r"another method than the one attached"),
    ],
)
def test_another_method_or_other_options_do_not_resume(method, options, said, tmp_path):
    checkpointed(tmp_path)
    adapted = Case(method, "bert", options=options).attach()
    run = Trainer(adapted.model, arguments(tmp_path), train_dataset=rows(), callbacks=[adapted.callback()])
    with pytest.raises(LoadError, match=said):
        run.train(resume_from_checkpoint=True)
    assert adapted.guard.running is None


def test_a_run_resumes_in_another_folder_where_its_state_is_named(tmp_path):
    whole = trained("adalora", tmp_path / "whole", save_strategy="steps", save_steps=2)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    with pytest.raises(LoadError, match=r"peftlib\.safetensors of the checkpoint.*resume_from_checkpoint="):
        trained("adalora", tmp_path / "other", resume=checkpoint)
    trained("adalora", tmp_path / "other", save_strategy="steps", save_steps=2, learning_rate=0.05)  # another run's
    resumed = trained("adalora", tmp_path / "other", resume=checkpoint, resume_from_checkpoint=checkpoint)
    assert_close(whole, resumed)


@pytest.mark.parametrize("method", ["lora", "adalora", "p_tuning"])
def test_a_checkpoint_is_an_adapter(method, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    adapted = Case(method, "bert").attach()
    made = arguments(tmp_path, load_best_model_at_end=True, **options)
    run = Trainer(adapted.model, made, train_dataset=rows(), eval_dataset=rows(), callbacks=[adapted.callback()])
    run.train()
    best = run.state.best_model_checkpoint
    loaded = peftlib.load(backbone("bert"), best)
    data = {k: v for k, v in batch("bert").items() if k != "labels"}
    torch.testing.assert_close(logits(loaded.model, **data), logits(adapted.model, **data))


@pytest.mark.parametrize(
    ("method", "again"), [("lora", True), ("adalora", True), ("p_tuning", False), ("adamix", False)]
)
def test_a_second_training_goes_on_or_says_why_not(method, again, tmp_path):
    adapted = Case(method, "bert").attach()
    run = Trainer(adapted.model, arguments(tmp_path), train_dataset=rows(), callbacks=[adapted.callback()])
    run.train()
    before = {n: p.detach().clone() for n, p in adapted.trainable().items()}
    if again:
        run.train()
        assert not [n for n, p in adapted.trainable().items() if torch.equal(p, before[n])]
        return
    with pytest.raises(StateError, match=f"{method} has put new parameters.*build a new Trainer"):
        run.train()
    Trainer(adapted.model, arguments(tmp_path), train_dataset=rows(), callbacks=[adapted.callback()]).train()
    assert not [n for n, p in adapted.trainable().items() if torch.equal(p, before[n])]


def test_each_model_that_the_trainer_makes_has_its_own_hooks(tmp_path):
    made = []

    def model_init():
        made.append(Case("adalora", "bert").attach())
        return made[-1].model

    run = Trainer(None, arguments(tmp_path), train_dataset=rows(), callbacks=[PeftCallback()], model_init=model_init)
    run.train()
    run.train()
    assert_close(made[-1], trained("adalora", tmp_path / "alone"))
    assert_close(made[-1], made[-2])
    plain = Trainer(backbone("bert"), arguments(tmp_path), train_dataset=rows(), callbacks=[PeftCallback()])
    with pytest.raises(StateError, match="nothing is attached to the Trainer's BertForSequenceClassification"):
        plain.train()


def test_a_trial_of_a_search_has_a_folder_of_its_own(tmp_path):
    adapted = Case("adalora", "bert").trained()
    for trial in (0, 1):
        folder = tmp_path / f"run-{trial}" / "checkpoint-2"
        folder.mkdir(parents=True)
        os.utime(folder, (2e9 + trial, 2e9 + trial))  # the newest
        state = TrainerState(global_step=2, is_hyper_param_search=True)
        callback = adapted.callback()
        callback.on_save(arguments(tmp_path), state, None, model=adapted.model)
        assert peftlib.read(folder).config == adapted.config


def test_a_lifecycle_is_a_part_of_accelerate_s_state(tmp_path):
    from accelerate import Accelerator

    def steps(adapted, life, optimizer, number):
        adapted.model.train()
        for _ in range(number):
            life.step_start()
            adapted.model(**batch("bert")).loss.backward()
            life.gradients()
            optimizer.step()
            optimizer.zero_grad()
            life.step_end()

    def begin(method="adalora", **options):
        adapted = Case(method, "bert", options=options).attach()
        accelerator, life = Accelerator(cpu=True), adapted.lifecycle(6)
        optimizer = torch.optim.AdamW(adapted.trainable().values(), lr=1e-2)
        _, optimizer = accelerator.prepare(adapted.model, optimizer)
        accelerator.register_for_checkpointing(life)
        return adapted, accelerator, life, optimizer

    adapted, accelerator, life, optimizer = begin()
    with life:
        steps(adapted, life, optimizer, 3)
        accelerator.save_state(str(tmp_path))
        steps(adapted, life, optimizer, 2)
    other, accelerator, life, optimizer = begin()
    accelerator.load_state(str(tmp_path))
    assert life.step == 3
    with life:
        steps(other, life, optimizer, 2)
    assert_close(adapted, other)
    _, accelerator, _, _ = begin(alpha=3.0)
    with pytest.raises(LoadError, match=r"alpha=\S+ there and 3\.0 here"):
        accelerator.load_state(str(tmp_path))
