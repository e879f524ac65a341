"""The lifecycle inside ``transformers.Trainer``."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, SchedulerType, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peftlib.errors import LoadError, StateError, UnsupportedError
from peftlib.mechanisms.schedules import Schedule, staged
from peftlib.methods.base import Method
from peftlib.saved import INSIDE
from peftlib.training.lifecycle import Guard, Lifecycle, check_same, describe

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


class PeftCallback(TrainerCallback, ExportableState):
    """Runs the training hooks of the method that is attached to the Trainer's model, and at the end shows it the
    training data once more where it fits something to them (Laplace-LoRA). Methods that calibrate need
    ``adapted.calibrate(batches)`` before the Trainer is built, because the Trainer collects the trained parameters
    first. A checkpoint has the adapter, as :meth:`Adapted.save` writes it, in its folder ``adapter``.

    ``guard``: of the method; None: that of the model which the Trainer trains, each time another one with
    ``model_init``.
    """

    def __init__(self, guard: Guard | None = None):
        self.guard = guard
        self.life: Lifecycle | None = None
        self.max_norm: float | None = None

    @property
    def method(self) -> Method:
        assert self.guard is not None, "the Trainer calls on_train_begin first"
        return self.guard.method

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into ``trainer_state.json``: the method, its options, and a hash of what
        :meth:`on_save` writes of the run."""
        if self.guard is None:
            return {"args": {}, "attributes": {}}
        described = describe(self.method) | {"run_state": _hash(self.method.run_state())}
        return {"args": {}, "attributes": {"described": described}}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        lr_scheduler: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.life is not None:
            # An earlier train() of this Trainer ended in an exception and never reached on_train_end.
            self.life.abandon()
        if (tuned := _tuned(model)) is not None:
            self.guard = tuned.guard
        if self.guard is None:
            raise StateError(
                f"nothing is attached to the Trainer's {type(model).__name__}: call peftlib.attach(model, ...) "
                "before, or inside of model_init"
            )
        if state.global_step:
            self._check_resumed(state)
        self._check_optimizer(optimizer)
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

    def _check_resumed(self, state: TrainerState) -> None:
        """Raise LoadError where the checkpoint is of another method, or of other options."""
        if (described := _described(state)) is not None:
            check_same(self.method, described)

    def _check_optimizer(self, optimizer: Any) -> None:
        """Raise StateError where it was made for parameters that are gone."""
        if optimizer is None:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        here = {id(p) for p in self.method.host.model.parameters()}
        new = [n for n, p in self.method.host.root.trained().items() if p.requires_grad and id(p) not in held]
        if new and not held <= here:
            raise StateError(
                f"{self.method.name} has put new parameters in the place of those that its first training had, such as "
                f"{new[0]}, and this Trainer's optimizer knows the old ones: build a new Trainer for another training"
            )

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

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or (folder := _checkpoint(args, state)) is None:
            return
        if run_state := self.method.run_state():
            tensors = {name: t.detach().cpu().contiguous().clone() for name, t in run_state.items()}
            save_file(tensors, folder / RUN_STATE)
        if (tuned := _tuned(model)) is not None and not (args.fsdp or args.deepspeed):
            tuned.save(folder / INSIDE)

    def _load_run_state(self, args: TrainingArguments, state: TrainerState) -> None:
        """Only a method that has a state of the run has a file. Raises LoadError where that of the checkpoint is not
        found: the Trainer does not say which folder it resumes from."""
        named, wanted = args.resume_from_checkpoint, (_described(state) or {}).get("run_state")
        folders = [_checkpoint(args, state), Path(named) if isinstance(named, str) else None]
        for file in (folder / RUN_STATE for folder in folders if folder is not None):
            if file.is_file() and (_hash(run_state := load_file(file)) == wanted or wanted is None):
                return self.method.load_run_state(run_state)
        if wanted:
            raise LoadError(
                f"{self.method.name} goes on from {RUN_STATE} of the checkpoint, which is not in {args.output_dir}: "
                "name its folder also in TrainingArguments(resume_from_checkpoint=...)"
            )

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


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path | None:
    """The folder of the last checkpoint; a trial of a search has its own in a folder of the trial."""
    output, name = Path(cast(str, args.output_dir)), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    found = [*output.glob(name), *(output.glob(f"*/{name}") if state.is_hyper_param_search else ())]
    return max(found, key=lambda folder: folder.stat().st_mtime, default=None)


def _described(state: TrainerState) -> dict[str, Any] | None:
    """What :meth:`PeftCallback.state` wrote; None in a checkpoint of an older peftlib."""
    states: Any = state.stateful_callbacks or {}
    found = states.get(PeftCallback.__name__)
    last = found[-1] if isinstance(found, list) else found
    return last and last["attributes"].get("described")


def _hash(tensors: dict[str, torch.Tensor]) -> str:
    """Of tensors by name; an empty string for none."""
    if not tensors:
        return ""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tuned(model: nn.Module | None) -> Any:
    """The handle on the model, which may be inside of another module."""
    modules = () if model is None else model.modules()
    return next((m.peftlib_adapted for m in modules if hasattr(m, "peftlib_adapted")), None)
