"""The lifecycle inside ``transformers.Trainer``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import TrainerCallback

from peftlib.training.lifecycle import Lifecycle

if TYPE_CHECKING:
    from peftlib.adapted import Adapted


class PeftCallback(TrainerCallback):
    """Runs the moments of ``adapted``'s method. Methods that calibrate need ``adapted.calibrate(batches)`` before the
    Trainer is built, because the Trainer collects the trained parameters first."""

    def __init__(self, adapted: Adapted):
        self.adapted = adapted
        self.life: Lifecycle | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if self.life is not None and self.adapted.lifecycle_active is self.life:
            # An earlier train() of this Trainer ended in an exception and never reached on_train_end.
            self.adapted.lifecycle_active = None
        self.life = self.adapted.lifecycle(state.max_steps)
        self.life.step = state.global_step
        self.life.__enter__()

    def on_step_begin(self, args, state, control, **kwargs):
        self.life.step_start()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.life.gradients()

    def on_step_end(self, args, state, control, **kwargs):
        self.life.step_end()

    def on_train_end(self, args, state, control, **kwargs):
        self.life.__exit__(None, None, None)
        self.life = None
