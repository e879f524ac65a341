"""The lifecycle inside ``transformers.Trainer``."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peftlib.training.lifecycle import Guard, Lifecycle

RUN_STATE = "peftlib.safetensors"


class PeftCallback(TrainerCallback):
    """Runs the training hooks of an attached method, and at the end shows it the training data once more where it fits
    something to them (Laplace-LoRA). Methods that calibrate need ``adapted.calibrate(batches)`` before the Trainer is
    built, because the Trainer collects the trained parameters first."""

    def __init__(self, guard: Guard):
        self.guard = guard
        self.method = guard.method
        self.life: Lifecycle | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if self.life is not None:
            # An earlier train() of this Trainer ended in an exception and never reached on_train_end.
            self.life.abandon()
        self.life = Lifecycle(self.guard, state.max_steps, step=state.global_step)
        self.life.__enter__()
        if state.global_step:
            self._load_run_state(args, state)

    def on_step_begin(self, args, state, control, **kwargs):
        self.life.step_start()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.life.gradients()

    def on_step_end(self, args, state, control, **kwargs):
        self.life.step_end()

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero and (run_state := self.method.run_state()):
            tensors = {name: t.detach().cpu().contiguous().clone() for name, t in run_state.items()}
            save_file(tensors, _checkpoint(args, state) / RUN_STATE)

    def _load_run_state(self, args, state) -> None:
        """Only a method that has a state of the run has a file."""
        named = args.resume_from_checkpoint
        folders = [_checkpoint(args, state), *([Path(named)] if isinstance(named, str) else [])]
        if (file := next((f / RUN_STATE for f in folders if (f / RUN_STATE).is_file()), None)) is not None:
            self.method.load_run_state(load_file(file))

    def on_train_end(self, args, state, control, train_dataloader=None, **kwargs):
        self.life.__exit__(None, None, None)
        self.life = None
        if train_dataloader is not None and _chooses_a_class(self.method.host.model):
            self.method.fit(train_dataloader)


def _chooses_a_class(model: PreTrainedModel) -> bool:
    """Whether it gives a text one of several classes: no regression, and not several labels at a time."""
    head, kind = type(model).__name__, model.config.problem_type
    single = kind == "single_label_classification" or (kind is None and model.config.num_labels > 1)
    return single and head.endswith("ForSequenceClassification")


def _checkpoint(args, state) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
