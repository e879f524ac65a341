"""The lifecycle inside ``transformers.Trainer``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, SchedulerType, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peftlib.errors import UnsupportedError
from peftlib.mechanisms.schedules import Schedule, staged
from peftlib.training.lifecycle import Guard, Lifecycle

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import TrainerControl, TrainerState, TrainingArguments

RUN_STATE = "peftlib.safetensors"


@dataclass(frozen=True)
class _AsInTrainer(Schedule):
    """A schedule whose steps of warm-up the Trainer's arguments say."""

    args: TrainingArguments | None = None

    def warmup_steps(self, steps: int) -> int:
        assert self.args is not None
        return self.args.get_warmup_steps(steps)


class PeftCallback(TrainerCallback):
    """Runs the training hooks of an attached method, and at the end shows it the training data once more where it fits
    something to them (Laplace-LoRA). Methods that calibrate need ``adapted.calibrate(batches)`` before the Trainer is
    built, because the Trainer collects the trained parameters first."""

    def __init__(self, guard: Guard):
        self.guard = guard
        self.method = guard.method
        self.life: Lifecycle | None = None
        self.max_norm: float | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        lr_scheduler: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.life is not None:
            # An earlier train() of this Trainer ended in an exception and never reached on_train_end.
            self.life.abandon()
        if self.method.clips and args.max_grad_norm and not args.fp16:
            # The method clips in the Trainer's place; with fp16, where the loss is scaled, it cannot.
            self.max_norm, args.max_grad_norm = args.max_grad_norm, 0.0
        self.life = Lifecycle(
            self.guard, state.max_steps, state.global_step, self.max_norm, args.gradient_accumulation_steps
        )
        self._schedule(args, getattr(lr_scheduler, "scheduler", lr_scheduler), optimizer)
        self.life.__enter__()
        if state.global_step:
            self._load_run_state(args, state)

    def _schedule(self, args: TrainingArguments, scheduler: Any, optimizer: Any) -> None:
        """Tell the lifecycle the Trainer's schedule, and start that anew in each of the method's stages."""
        life = self._running()
        if len(life.stages) == 1 and not self.method.restarts:
            return
        schedule = _AsInTrainer(
            SchedulerType(args.lr_scheduler_type).value,
            options=args.lr_scheduler_kwargs if isinstance(args.lr_scheduler_kwargs, dict) else None,
            rate=optimizer.defaults["lr"],
            args=args,
        )
        if not _follows(scheduler, schedule, life.total):
            raise UnsupportedError(
                f"{self.method.name} starts the learning-rate schedule anew in the middle of a training, and peftlib "
                f"cannot make the Trainer's scheduler, a {type(scheduler).__name__}, for a part of it: leave it out "
                "(optimizers=(optimizer, None)) and name a function of the step with lr_scheduler_type and warmup_steps"
            )
        life.schedule = schedule
        if len(life.stages) > 1:
            scheduler.lr_lambdas = [staged(schedule, life.stages)] * len(scheduler.lr_lambdas)
            for group, base in zip(optimizer.param_groups, scheduler.base_lrs):
                group["lr"] = base * scheduler.lr_lambdas[0](life.step)

    def _running(self) -> Lifecycle:
        assert self.life is not None, "the Trainer calls on_train_begin first"
        return self.life

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._running().step_start()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None and not args.max_grad_norm:
            # Clipping has the gradients without the scale; here the method is to have them.
            scaler.unscale_(optimizer.optimizer)
        self._running().gradients(1.0 if scaler is None else scaler.get_scale())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._running().step_end()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and (run_state := self.method.run_state()):
            tensors = {name: t.detach().cpu().contiguous().clone() for name, t in run_state.items()}
            save_file(tensors, _checkpoint(args, state) / RUN_STATE)

    def _load_run_state(self, args: TrainingArguments, state: TrainerState) -> None:
        """Only a method that has a state of the run has a file."""
        named = args.resume_from_checkpoint
        folders = [_checkpoint(args, state), *([Path(named)] if isinstance(named, str) else [])]
        if (file := next((f / RUN_STATE for f in folders if (f / RUN_STATE).is_file()), None)) is not None:
            self.method.load_run_state(load_file(file))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._running().__exit__(None, None, None)
        self.life = None
        if self.max_norm is not None:
            args.max_grad_norm, self.max_norm = self.max_norm, None
        if train_dataloader is not None and _chooses_a_class(self.method.host.model):
            self.method.fit(train_dataloader)


def _follows(scheduler: Any, schedule: Schedule, total: int) -> bool:
    """Whether a scheduler of torch multiplies the rate by what the schedule says, at each of so many steps."""
    if not isinstance(scheduler, LambdaLR):
        return False
    named = schedule.over(total)
    return all(
        math.isclose(factor(step), named(step), abs_tol=1e-9)
        for factor in scheduler.lr_lambdas
        for step in range(total)
    )


def _chooses_a_class(model: nn.Module) -> bool:
    """Whether it gives a text one of several classes: no regression, and not several labels at a time."""
    config = cast(PreTrainedModel, model).config
    head, kind = type(model).__name__, config.problem_type
    single = kind == "single_label_classification" or (kind is None and (config.num_labels or 0) > 1)
    return single and head.endswith("ForSequenceClassification")


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(cast(str, args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
