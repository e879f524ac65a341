"""The project's loop: accelerate underneath, the method's training hooks in place, one dictionary a log line."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, set_seed
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import nn

from peftlib.errors import StateError, UnsupportedError
from peftlib.mechanisms.schedules import Schedule
from peftlib.methods.base import at_least
from peftlib.training.accumulation import items
from peftlib.training.evaluation import Precision, Task, Tuned, check_labels, evaluate_task
from peftlib.training.lifecycle import Lifecycle

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Trainable(Tuned, Protocol):
    """What the loop needs of an adapted model; :class:`peftlib.Adapted` is one."""

    @property
    def name(self) -> str: ...

    @property
    def calibrated(self) -> bool: ...

    def calibrate(
        self, batches: Iterable[dict[str, torch.Tensor]], checkpoint: str | os.PathLike[str] | None = None
    ) -> None: ...

    def trainable(self) -> dict[str, nn.Parameter]: ...

    def parameter_groups(
        self, learning_rate: float, *, head_learning_rate: float | None = None, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]: ...

    def lifecycle(
        self, total_steps: int, step: int = 0, max_norm: float | None = None, *, accumulation: int = 1
    ) -> Lifecycle: ...


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
    adapted: Trainable,
    task: Task,
    *,
    tokenizer: PreTrainedTokenizerBase,
    epochs: float = 3.0,
    steps: int | None = None,
    batch_size: int = 16,
    learning_rate: float | None = None,
    head_learning_rate: float | None = None,
    weight_decay: float = 0.0,
    warmup: float = 0.06,
    schedule: str = "linear",
    schedule_options: dict[str, Any] | None = None,
    max_grad_norm: float = 1.0,
    gradient_accumulation: int = 1,
    precision: Precision = "no",
    max_length: int | None = None,
    group_by_length: bool = True,
    evaluate_on: str | None = "validation",
    evaluate_every: int | None = None,
    calibration_checkpoint: str | os.PathLike[str] | None = None,
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
        gradient_accumulation: forwards a step; together they count as one on as many rows, all labels alike.
        learning_rate: default: the method's own, found by a stated search.
        head_learning_rate: the task head's; default: the same as ``learning_rate``.
        warmup: share of the steps in which the rate rises linearly from 0; from 1 on, their number.
        schedule: a scheduler name of transformers' ``get_scheduler``; ``schedule_options`` are what it takes beside
            the numbers of steps, such as ``{"num_cycles": 2}`` of "cosine_with_restarts". A method whose training has
            stages goes through it once in each, unless the stage has another.
        precision: autocast: "no", "bf16" or "fp16"; trained parameters stay in their own dtype.
        group_by_length: make batches of rows of similar length, in random order: less padding, faster steps.
        evaluate_on: split to evaluate on at the end (and every ``evaluate_every`` steps); None: never.
        calibration_checkpoint: the file in which a calibration that takes long keeps its state, to go on from where it
            was cut off.
        seed: order of the data, dropout and what the method draws.
        progress: show a bar on a terminal.

    The process group, if any, is the one that ``accelerate launch`` or ``torchrun`` set up.

    Raises DataError for a task without labels or with an empty split, UnsupportedError for one that the model's head
    is not made for, UnknownNameError for another schedule and ConfigError for options that it does not take.
    """
    at_least("batch_size", batch_size, 1)
    at_least("gradient_accumulation", gradient_accumulation, 1)
    _check_task(adapted, task)
    course = Schedule(schedule, warmup, schedule_options)
    course.check()
    set_seed(seed)
    accelerator = _accelerator(precision, gradient_accumulation)
    adapted.model.to(accelerator.device)
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
        check_labels(task, evaluate_on, tokenizer, max_length)
    evaluate = partial(
        evaluate_task,
        adapted,
        task,
        tokenizer=tokenizer,
        batch_size=2 * batch_size,
        max_length=max_length,
        precision=precision,
    )
    result = FitResult(steps=0, metrics={}, calibration_seconds=_calibrate(adapted, loader, calibration_checkpoint))

    began = time.perf_counter()
    if trained := adapted.trainable():
        rate = adapted.method.learning_rate if learning_rate is None else learning_rate
        groups = adapted.parameter_groups(rate, head_learning_rate=head_learning_rate, weight_decay=weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=rate)
        with _prepared(accelerator, adapted.model, optimizer, loader) as (model, optimizer, batches):
            total = steps if steps is not None else max(1, round(epochs * len(batches) / gradient_accumulation))
            at_least("steps", total, 1)
            # With fp16 the loss is scaled, and what the method sees of the gradients beside it.
            own = max_grad_norm if adapted.method.clips and precision != "fp16" else None
            life = adapted.lifecycle(total, max_norm=own, accumulation=gradient_accumulation)
            scheduler = life.scheduler(optimizer, course)
            clip = max_grad_norm if own is None else 0.0
            step = _Step(accelerator, model, optimizer, scheduler, list(trained.values()), clip)
            title = f"{adapted.name} on {task.name}"
            bar, stream = _bar(title, total, progress and accelerator.is_main_process), _forever(batches)
            with bar as advance, life:
                for number in range(1, total + 1):
                    result.seconds_per_step += step(life, stream, gradient_accumulation) / total
                    advance()
                    if number == total or number % log_every == 0:
                        result.history.append({"step": number, "loss": step.loss()})
                    if evaluate_on and evaluate_every and number < total and number % evaluate_every == 0:
                        result.history.append({"step": number, **_prefixed(evaluate_on, evaluate(evaluate_on))})
        result.steps = total
        if task.kind == "classification":
            adapted.method.fit(loader)
    if evaluate_on:
        result.metrics = evaluate(evaluate_on)
        result.history.append({"step": result.steps, **_prefixed(evaluate_on, result.metrics)})
    result.seconds = time.perf_counter() - began
    return result


class _Step:
    """One optimizer step, with the method's training hooks around it."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        scheduler: Any,
        parameters: list[nn.Parameter],
        max_grad_norm: float,
    ):
        self.accelerator, self.model = accelerator, model
        self.optimizer, self.scheduler = optimizer, scheduler
        self.parameters, self.max_grad_norm = parameters, max_grad_norm
        self.losses: list[torch.Tensor] = []

    def __call__(self, life: Lifecycle, batches: Iterator[dict[str, torch.Tensor]], forwards: int) -> float:
        """Takes as many batches as there are forwards; gives the seconds that it took."""
        self.model.train()
        began = time.perf_counter()
        life.step_start()
        parts = [next(batches) for _ in range(forwards)]
        self.losses = [self._backward(batch, weight) for batch, weight in zip(parts, self._weights(parts))]
        if self.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)
        else:
            self.accelerator.unscale_gradients()
        scaler = self.accelerator.scaler
        life.gradients(1.0 if scaler is None else scaler.get_scale())
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        life.step_end()
        return time.perf_counter() - began

    def _weights(self, parts: list[dict[str, torch.Tensor]]) -> list[torch.Tensor | float]:
        """Of each part's mean loss, so that all labels of the step count alike; their mean is 1."""
        if len(parts) == 1:
            return [1.0]
        model = self.accelerator.unwrap_model(self.model)
        counts = torch.stack([cast(torch.Tensor, items(model, part)) for part in parts]).double()  # (parts,)
        mean = self.accelerator.reduce(counts.mean(), "mean")  # over the processes
        return list((counts / mean).float())

    def _backward(self, batch: dict[str, torch.Tensor], weight: torch.Tensor | float) -> torch.Tensor:
        with self.accelerator.accumulate(self.model):
            loss = self.model(**batch).loss * weight
            self.accelerator.backward(loss)
        return loss.detach()

    def loss(self) -> float:
        """The mean loss over the last step's labels."""
        return float(torch.stack(self.losses).mean())


def _calibrate(
    adapted: Trainable, loader: Iterable[dict[str, torch.Tensor]], checkpoint: str | os.PathLike[str] | None
) -> float:
    """Calibrate where that is due; gives the seconds. Raises StateError where nothing is there to train afterwards."""
    began = time.perf_counter()
    if not adapted.calibrated:
        adapted.calibrate(loader, checkpoint)
    if not adapted.trainable() and not adapted.method.searched():
        raise StateError(f"{adapted.name} trains nothing on {type(adapted.model).__name__} with these options")
    return time.perf_counter() - began


@contextmanager
def _bar(title: str, total: int, shown: bool) -> Iterator[Callable[[], None]]:
    """Inside ``with``, a progress bar on a terminal; call what it gives once a step."""
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}")
    with Bar(*columns, TimeRemainingColumn(), transient=True, disable=not shown) as bar:
        yield partial(bar.advance, bar.add_task(title, total=total))


def _check_task(adapted: Tuned, task: Task) -> None:
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
    outputs = cast("PreTrainedModel", adapted.model).config.num_labels
    if not text and outputs != task.num_labels:
        raise UnsupportedError(
            f"task {task.name!r} needs {task.num_labels} outputs, and the model's head has {outputs}: "
            f"load the backbone with num_labels={task.num_labels}"
        )


@contextmanager
def _prepared(accelerator: Accelerator, model: nn.Module, *others: Any) -> Iterator[Any]:
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


def _forever(loader: Iterable[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield from loader
