"""The moments of a method in a training run, in any loop; forgetting them is an error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from peftlib.errors import StateError
from peftlib.mechanisms.host import Pass
from peftlib.methods.base import Progress

if TYPE_CHECKING:
    from peftlib.adapted import Adapted


class Lifecycle:
    """Runs a method's moments. :func:`peftlib.fit` and ``adapted.callback()`` use it; so can a loop of your own:

    >>> with adapted.lifecycle(total_steps) as life:
    ...     for batch in batches:
    ...         life.step_start()
    ...         model(**batch).loss.backward()
    ...         life.gradients()
    ...         optimizer.step(); optimizer.zero_grad()
    ...         life.step_end()

    Inside it each training forward adds the method's penalty to ``output.loss``. Leaving it normally runs
    ``on_train_end``; leaving it by an exception does not.
    """

    def __init__(self, adapted: Adapted, total_steps: int):
        self.adapted = adapted
        self.total = total_steps
        self.step = 0

    @property
    def progress(self) -> Progress:
        return Progress(self.step, self.total)

    def __enter__(self) -> Lifecycle:
        if not self.adapted.calibrated:
            raise StateError(
                f"{self.adapted.name} chooses what to train from data first: call adapted.calibrate(batches), then "
                "build the optimizer, then train"
            )
        if self.adapted.lifecycle_active is not None:
            raise StateError(f"{self.adapted.name} is already being trained by another loop")
        self.adapted.lifecycle_active = self
        return self

    def __exit__(self, kind, value, traceback) -> None:
        self.adapted.lifecycle_active = None
        if kind is None:
            self.adapted.method.on_train_end()

    def step_start(self) -> None:
        """Before the first forward of an optimizer step."""
        self.adapted.method.on_step_start(self.progress)

    def gradients(self) -> None:
        """After backward and clipping, before the optimizer's step."""
        self.adapted.method.on_gradients(self.progress)

    def step_end(self) -> None:
        """After the optimizer's step."""
        self.adapted.method.on_step_end(self.progress)
        self.step += 1


def require_lifecycle(adapted: Adapted, model: nn.Module, args: tuple, kwargs: dict) -> None:
    """A forward hook: a training forward outside the lifecycle would silently be another method."""
    if not (model.training and torch.is_grad_enabled()) or adapted.lifecycle_active is not None:
        return
    raise StateError(
        f"{adapted.name} acts during training ({', '.join(adapted.method.moments()) or 'calibrate'}) and nothing runs "
        "it. Train with peftlib.fit(adapted, ...), with Trainer(..., callbacks=[adapted.callback()]), or inside "
        "`with adapted.lifecycle(total_steps)`; call model.eval() or torch.no_grad() for inference."
    )


def add_penalty(adapted: Adapted, model: nn.Module, args: tuple, kwargs: dict, output):
    """A forward hook: adds the method's penalty to the loss that the model returns in training."""
    if not (model.training and torch.is_grad_enabled()):
        return None
    adapted.host.passed = Pass(model, args, kwargs, output)
    penalty = adapted.method.penalty()
    adapted.host.passed = None
    if penalty is None:
        return None
    if isinstance(output, tuple):
        return (output[0] + penalty, *output[1:])
    if getattr(output, "loss", None) is None:
        raise StateError(
            f"{adapted.name} adds a penalty to the loss, and {type(model).__name__} returned none: pass labels to the "
            "model (Trainer: no label smoothing and no compute_loss that drops them)"
        )
    output.loss = output.loss + penalty
    return output
