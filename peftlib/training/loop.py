"""The project's loop: accelerate underneath, the method's moments in place, one dictionary a log line."""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, set_seed
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch.utils.data import DataLoader

from peftlib.errors import DataError, StateError, UnknownNameError, UnsupportedError
from peftlib.methods.base import ConfigError, at_least

if TYPE_CHECKING:
    from peftlib.adapted import Adapted


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Precision = Literal["no", "bf16", "fp16"]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class FitResult:
    """What a training run gave. ``history`` has one entry an evaluation and one a logged step; ``metrics`` are the last
    ones on ``evaluate_on``; ``seconds`` are those of training, of what the method fits after it and of evaluations,
    ``calibration_seconds`` those of :meth:`Adapted.calibrate` before it. There are 0 ``steps`` where that found all
    that there is to find."""

    steps: int
    metrics: dict[str, float]
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    seconds_per_step: float = 0.0
    calibration_seconds: float = 0.0


def fit(
    adapted: Adapted,
    task,
    *,
    tokenizer,
    epochs: float = 3.0,
    steps: int | None = None,
    batch_size: int = 16,
    learning_rate: float | None = None,
    head_learning_rate: float | None = None,
    weight_decay: float = 0.0,
    warmup: float = 0.06,
    schedule: str = "linear",
    schedule_options: dict | None = None,
    max_grad_norm: float = 1.0,
    gradient_accumulation: int = 1,
    precision: Precision = "no",
    max_length: int | None = None,
    group_by_length: bool = True,
    evaluate_on: str | None = "validation",
    evaluate_every: int | None = None,
    log_every: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> FitResult:
    """Train an adapted model on a task with AdamW, and evaluate it.

    Args:
        adapted: what :func:`peftlib.attach` gave; trained in place.
        task: a task of :mod:`peftlib.tasks`.
        tokenizer: the backbone's tokenizer.
        epochs: passes over the training split; ``steps`` (optimizer steps) overrides them.
        batch_size: rows a forward, on each process.
        learning_rate: default: the method's own, found by a stated search.
        head_learning_rate: the task head's; default: the same as ``learning_rate``.
        warmup: share of the steps in which the rate rises linearly from 0.
        schedule: a scheduler name of transformers' ``get_scheduler``; ``schedule_options`` are what it takes beside
            the numbers of steps, such as ``{"num_cycles": 2}`` of "cosine_with_restarts".
        precision: autocast: "no", "bf16" or "fp16"; trained parameters stay in their own dtype.
        group_by_length: make batches of rows of similar length, in random order: less padding, faster steps.
        evaluate_on: split to evaluate on at the end (and every ``evaluate_every`` steps); None: never.
        seed: order of the data, dropout and what the method draws.
        progress: show a bar on a terminal.

    The process group, if any, is the one that ``accelerate launch`` or ``torchrun`` set up.

    Raises DataError for a task without labels or with an empty split, UnsupportedError for one that the model's head
    is not made for, UnknownNameError for another schedule and ConfigError for options that it does not take.
    """
    # Imported late: it brings in transformers' Trainer and the optional packages that know it. One of them,
    # bitsandbytes, logs that a CPU kernel which nothing here uses is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers import get_scheduler

    at_least("batch_size", batch_size, 1)
    at_least("gradient_accumulation", gradient_accumulation, 1)
    _check_task(adapted, task)
    _check_schedule(schedule, schedule_options)
    set_seed(seed)
    accelerator = _accelerator(precision, gradient_accumulation)
    model = adapted.model
    model.to(accelerator.device)
    loader = task.loader(
        "train",
        tokenizer,
        batch_size=batch_size,
        shuffle=True,
        seed=seed,
        max_length=max_length,
        group_by_length=group_by_length,
    )
    if evaluate_on:
        _check_labels(task, evaluate_on, tokenizer, max_length)
    began = time.perf_counter()
    if not adapted.calibrated:
        adapted.calibrate(loader)
    calibration = time.perf_counter() - began

    trained = adapted.trainable()
    if not trained and not adapted.method.searched():
        raise StateError(f"{adapted.name} trains nothing on {type(model).__name__} with these options")

    def evaluate() -> dict[str, float]:
        return evaluate_task(
            adapted, task, evaluate_on, tokenizer, batch_size=2 * batch_size, max_length=max_length, precision=precision
        )

    if not trained:
        metrics = evaluate() if evaluate_on else {}
        history = [{"step": 0, **_prefixed(evaluate_on, metrics)}] if evaluate_on else []
        return FitResult(steps=0, metrics=metrics, history=history, calibration_seconds=calibration)

    rate = adapted.method.learning_rate if learning_rate is None else learning_rate
    groups = adapted.parameter_groups(rate, head_learning_rate=head_learning_rate, weight_decay=weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=rate)

    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        transient=True,
        disable=not progress or not accelerator.is_main_process,
    )
    start, spent = time.perf_counter(), 0.0
    with _prepared(accelerator, model, optimizer, loader) as (wrapped, optimizer, prepared):
        total = steps if steps is not None else max(1, round(epochs * len(prepared) / gradient_accumulation))
        at_least("steps", total, 1)
        scheduler = get_scheduler(schedule, optimizer, round(warmup * total), total, schedule_options)
        result = FitResult(steps=total, metrics={}, calibration_seconds=calibration)
        batches = _forever(prepared)

        def forward_backward(batch: dict) -> torch.Tensor:
            with accelerator.accumulate(wrapped):
                loss = wrapped(**batch).loss
                accelerator.backward(loss)
            return loss.detach()

        with bar, adapted.lifecycle(total) as life:
            shown = bar.add_task(f"{adapted.name} on {task.name}", total=total)
            for step in range(total):
                wrapped.train()
                began = time.perf_counter()
                life.step_start()
                losses = [forward_backward(next(batches)) for _ in range(gradient_accumulation)]
                if max_grad_norm:
                    accelerator.clip_grad_norm_(trained.values(), max_grad_norm)
                life.gradients()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                life.step_end()
                spent += time.perf_counter() - began
                bar.advance(shown)
                last = step + 1 == total
                if last or (step + 1) % log_every == 0:
                    result.history.append({"step": step + 1, "loss": float(torch.stack(losses).mean())})
                if evaluate_on and evaluate_every and not last and (step + 1) % evaluate_every == 0:
                    result.history.append({"step": step + 1, **_prefixed(evaluate_on, evaluate())})
    result.seconds_per_step = spent / total
    if task.kind == "classification":
        adapted.method.fit(loader)
    if evaluate_on:
        result.metrics = evaluate()
        result.history.append({"step": total, **_prefixed(evaluate_on, result.metrics)})
    result.seconds = time.perf_counter() - start
    return result


@torch.no_grad()
def evaluate_task(
    adapted: Adapted,
    task,
    split: str,
    tokenizer,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    precision: Precision = "no",
) -> dict[str, float]:
    """The task's metrics of a model on one split, and its mean ``loss``, under the precision's autocast. A method that
    is ``fitted`` answers in its model's place.

    Leaves the model in evaluation mode. Raises DataError for a split that is empty or has no labels.
    """
    _check_labels(task, split, tokenizer, max_length)
    model = adapted.model
    model.eval()
    device = next(model.parameters()).device
    loader: DataLoader = task.loader(
        split, tokenizer, batch_size=batch_size, max_length=max_length, group_by_length=True
    )
    logits, labels, task_ids, losses, weights = [], [], [], [], []
    for batch in loader:
        batch = {k: v.to(device) for k, v in batch.items()}
        with torch.autocast(device.type, _AUTOCAST.get(precision), enabled=precision in _AUTOCAST):
            answer, asked, loss = _answer(adapted, task, batch, tokenizer)
        logits.append(answer.float().cpu())
        labels.append(asked.cpu())
        losses.append(float(loss))
        weights.append(len(asked))
        if "task_ids" in batch:
            task_ids.append(batch["task_ids"].cpu())
    outputs, targets = torch.cat(logits), torch.cat(labels)
    if task.kind in ("causal_lm", "seq2seq"):
        outputs, targets = outputs[None], targets[None]
        if task.kind == "causal_lm":
            # One position more, so that label t + 1 belongs to output t as in a causal model's row.
            outputs, targets = (F.pad(t, p, value=-100) for t, p in ((outputs, (0, 0, 0, 1)), (targets, (1, 0))))
    metrics = task.evaluate(outputs, targets, torch.cat(task_ids) if task_ids else None)
    return {**metrics, "loss": sum(n * x for n, x in zip(weights, losses)) / sum(weights)}


def _answer(adapted: Adapted, task, batch: dict, tokenizer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is compared, (n, classes) or (n, V), its labels (n,), and their mean loss: n rows or, for text, n tokens."""
    model, labels = adapted.model, batch["labels"]
    if task.kind == "classification" and adapted.method.fitted:
        logs = adapted.method.predict(batch).clamp_min(torch.finfo(torch.float32).tiny).log()
        return logs, labels, F.nll_loss(logs, labels)
    if task.kind == "multiple_choice":
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        choices = task.choice_logits(model(**inputs).logits, batch["attention_mask"], tokenizer)
        return choices, labels, F.cross_entropy(choices.float(), labels)
    output = model(**batch)
    if task.kind not in ("causal_lm", "seq2seq"):
        return output.logits, labels, output.loss
    logits = output.logits
    if task.kind == "causal_lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    asked = labels != -100
    return logits[asked], labels[asked], output.loss


def _check_task(adapted: Adapted, task) -> None:
    if task.kind == "multiple_choice":
        raise UnsupportedError(f"task {task.name!r} is multiple choice, which is evaluated but not trained on")
    kind = type(adapted.model).__name__
    text = task.kind in ("causal_lm", "seq2seq")
    classifies = adapted.method.classifies or kind.endswith("ForSequenceClassification")
    if text == classifies:
        raise UnsupportedError(
            f"task {task.name!r} is of kind {task.kind!r}, and {kind} has no head for it: load the backbone with "
            f"head={task.kind if text else 'classification'!r}"
        )
    if not text and adapted.model.config.num_labels != task.num_labels:
        raise UnsupportedError(
            f"task {task.name!r} needs {task.num_labels} outputs, and the model's head has "
            f"{adapted.model.config.num_labels}: load the backbone with num_labels={task.num_labels}"
        )


def _check_schedule(name: str, options: dict | None) -> None:
    from transformers import SchedulerType, get_scheduler

    # These two follow a metric, which a step of this loop does not have.
    known = [kind.value for kind in SchedulerType if kind.value not in ("reduce_lr_on_plateau", "greedy")]
    if name not in known:
        raise UnknownNameError("schedule", name, known)
    try:
        get_scheduler(name, torch.optim.SGD([torch.zeros(1)], lr=1.0), 0, 1, options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"schedule_options={options!r} do not fit the schedule {name!r}: {error}") from error


def _check_labels(task, split: str, tokenizer, max_length: int | None) -> None:
    if "labels" not in task.encode(tokenizer, split, max_length).column_names:
        raise DataError(f"task {task.name!r} has no labels in split {split!r}, so there is nothing to compare with")


@contextmanager
def _prepared(accelerator: Accelerator, model, *others):
    """The objects as accelerate prepares them. It wraps ``model.forward`` for autocast and marks the model as done,
    which would keep another run from its own precision: both are taken back."""
    marks = ("forward", "_original_forward", "_is_accelerate_prepared")
    before = {name: vars(model)[name] for name in marks if name in vars(model)}
    vars(model).pop("_is_accelerate_prepared", None)
    try:
        yield accelerator.prepare(model, *others)
    finally:
        for name in marks:
            vars(model).pop(name, None)
        vars(model).update(before)
        model.eval()


def _accelerator(precision: str, gradient_accumulation: int) -> Accelerator:
    # The process group stays; precision is this run's own, and accelerate refuses to change it otherwise.
    AcceleratorState._reset_state()
    plugin = GradientAccumulationPlugin(num_steps=gradient_accumulation, sync_with_dataloader=False)
    return Accelerator(mixed_precision=precision, gradient_accumulation_plugin=plugin)


def _prefixed(split: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{split}_{name}": value for name, value in metrics.items()}


def _forever(loader):
    while True:
        yield from loader
