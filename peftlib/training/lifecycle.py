"""The training hooks of a method in a training run, in any loop; forgetting them is an error."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peftlib.errors import LoadError, StateError
from peftlib.mechanisms.outputs import Args, Kwargs
from peftlib.mechanisms.schedules import Schedule, staged
from peftlib.methods.base import ForwardPass, Method, TrainingState


class Guard:
    """Of one attached method: whether it is calibrated, and which lifecycle runs its hooks.

    The model's forward hooks ask it. They are handed the model alone, so it cannot be a parameter.
    """

    def __init__(self, method: Method):
        self.method = method
        self.calibrated = not method.calibrates
        self.running: Lifecycle | None = None
        self.from_meta = False
        self.filled = True
        self.added = self.reached = False
        """Whether a penalty was added since the step began, and whether a backward pass has come to it."""
        self._open = False

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside ``with``, training forwards pass although no lifecycle runs: a calibration trains, a plan measures."""
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def require_values(self, model: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """A forward hook of a model that was on the meta device, where nothing has values."""
        self.check_values()

    def check_values(self) -> None:
        """Raise StateError where what the method added has had no values yet."""
        if self.filled or self.method.host.device.type == "meta":
            return
        raise StateError(
            f"{self.method.name} was attached on the meta device, so its start was never drawn: attach it once the "
            "model has its weights, or load a state that holds what it trains (model.load_state_dict)"
        )

    def take_values(self, model: nn.Module, incompatible: Any) -> None:
        """A hook after ``load_state_dict``: whether the state had all that the method stores."""
        names = {*self.method.host.root.trained(), *self.method.host.root.state()}
        self.filled = self.filled or names.isdisjoint(incompatible.missing_keys)

    def require_lifecycle(self, model: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """A forward hook: a training forward outside the lifecycle would silently be another method."""
        if not (model.training and torch.is_grad_enabled()) or self._open:
            return
        if self.running is not None:
            return self.running.count_forward()
        name = self.method.name
        raise StateError(
            f"{name} acts during training ({', '.join(self.method.hooks()) or 'calibrate'}) and nothing runs it. Train "
            "with peftlib.fit(adapted, ...), with Trainer(..., callbacks=[adapted.callback()]), or inside `with "
            "adapted.lifecycle(total_steps)`; call model.eval() or torch.no_grad() for inference."
        )

    def add_penalty(self, model: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        """A forward hook: adds the method's penalty to the loss that the model returns in training."""
        if not (model.training and torch.is_grad_enabled()):
            return None
        penalty = self.method.penalty(ForwardPass(model, args, kwargs, output))
        if penalty is None:
            return None
        if penalty.requires_grad and not torch.compiler.is_compiling():
            self.added = True
            penalty.register_hook(self._reach)
        if isinstance(output, tuple):
            return (output[0] + penalty, *output[1:])
        if getattr(output, "loss", None) is None:
            raise StateError(
                f"{self.method.name} adds a penalty to the loss, and {type(model).__name__} returned none: pass labels "
                "to the model (Trainer: no label smoothing and no compute_loss that drops them)"
            )
        output.loss = output.loss + penalty
        return output

    def _reach(self, gradient: torch.Tensor) -> None:
        self.reached = True

    def check_penalty(self, forwards: int) -> None:
        """Raise StateError where the loss that was differentiated is not the one that the penalty was added to, or came
        of no forward of the model."""
        bypassed = not forwards and "penalty" in self.method.hooks()
        if bypassed or (self.added and not self.reached):
            raise StateError(
                f"{self.method.name} adds a penalty to the loss that the model returns, and this loop trains on "
                "another one that it computes from the outputs (as TRL's trainers do): the penalty is lost. Train on "
                "output.loss (peftlib.fit, transformers.Trainer), or attach a method without a penalty"
            )


class Lifecycle:
    """Runs a method's hooks. :func:`peftlib.fit` and ``adapted.callback()`` use it; so can a loop of your own:

    >>> life = adapted.lifecycle(total_steps)
    >>> scheduler = life.scheduler(optimizer, peftlib.Schedule("linear", warmup=0.1))
    >>> with life:
    ...     for batch in batches:
    ...         life.step_start()
    ...         model(**batch).loss.backward()
    ...         life.gradients()
    ...         optimizer.step(); scheduler.step(); optimizer.zero_grad()
    ...         life.step_end()

    Inside it each training forward adds the method's penalty to ``output.loss``. Leaving it normally runs
    ``on_train_end``; leaving it by an exception does not. Without :meth:`scheduler` the rate counts as constant: a
    schedule of your own knows nothing of a method's stages. ``step`` counts optimizer steps from 0; a run that resumes
    starts at another one. A method that clips gradients itself (``adapted.method.clips``) cuts them to ``max_norm``,
    where one is given; the loop leaves them as they are.

    A step of several forwards and backward passes has one ``step_start`` before and one ``gradients`` after all of
    them, and says how many they are at most, ``accumulation``. Their losses add up to that of one forward over all
    rows: divide each by their number, or hand ``num_items_in_batch``, the step's number of labels, to the model, whose
    losses are then shares of it. With GradScaler, ``unscale_`` comes before :meth:`gradients`; a step whose gradients
    are not finite, which the scaler leaves out, is none for the method.
    """

    def __init__(
        self, guard: Guard, total_steps: int, step: int = 0, max_norm: float | None = None, accumulation: int = 1
    ):
        self.guard = guard
        self.total = total_steps
        self.step = step
        self.max_norm = max_norm
        self.accumulation = accumulation
        self.forwards = 0
        self.skipped = False
        self.schedule = Schedule()
        self.stages = guard.method.stages(total_steps)

    @property
    def method(self) -> Method:
        return self.guard.method

    @property
    def training(self) -> TrainingState:
        return TrainingState(self.step, self.total, self.schedule, self.stages, self.max_norm, self.accumulation)

    def scheduler(self, optimizer: torch.optim.Optimizer, schedule: Schedule) -> torch.optim.lr_scheduler.LambdaLR:
        """A scheduler for the optimizer, to be stepped after it: ``schedule`` over all steps, or, where the method's
        training has stages, over each of them. Methods whose parts begin to train later follow it too."""
        self.schedule = dataclasses.replace(schedule, rate=optimizer.defaults["lr"])
        return torch.optim.lr_scheduler.LambdaLR(optimizer, staged(self.schedule, self.stages))

    def __enter__(self) -> Lifecycle:
        if not self.guard.calibrated:
            raise StateError(
                f"{self.method.name} chooses what to train from data first: call adapted.calibrate(batches), then "
                "build the optimizer, then train"
            )
        if self.guard.running is not None:
            raise StateError(f"{self.method.name} is already being trained by another loop")
        self.guard.running = self
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: object) -> None:
        self.abandon()
        if kind is None:
            self.method.on_train_end()

    def abandon(self) -> None:
        """End it without ``on_train_end``: the training that it was for has failed."""
        if self.guard.running is self:
            self.guard.running = None

    # Resuming

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside model, optimizer and scheduler: the step, the method with its options, and its
        state of the run. accelerate: ``accelerator.register_for_checkpointing(life)``."""
        run_state = {name: t.detach().cpu().clone() for name, t in self.method.run_state().items()}
        return {"step": self.step, **describe(self.method), "run_state": run_state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises LoadError that names the difference for another method or other options."""
        check_same(self.method, state)
        self.step = state["step"]
        self.method.load_run_state(state["run_state"])

    # A step

    def step_start(self) -> None:
        """Before the first forward of an optimizer step."""
        self.forwards, self.skipped = 0, False
        self.guard.added = self.guard.reached = False
        self.method.on_step_start(self.training)

    def count_forward(self) -> None:
        """A training forward begins. Raises StateError for one too many, where the method has to know their number."""
        self.forwards += 1
        if self.forwards > self.accumulation and self.method.counts_passes(self.training):
            raise StateError(
                f"{self.method.name} reads what each backward pass leaves, and this step has more than "
                f"{self.accumulation}: say so with adapted.lifecycle(total_steps, accumulation=...)"
            )

    def gradients(self, loss_scale: float = 1.0) -> None:
        """After backward and clipping, before the optimizer's step. ``loss_scale``: by which the loss was multiplied in
        the backward pass; the gradients of what trains are without it again."""
        self.guard.check_penalty(self.forwards)
        self.skipped = not self._finite()
        if not self.skipped:
            self.method.on_gradients(dataclasses.replace(self.training, loss_scale=loss_scale))

    def step_end(self) -> None:
        """After the optimizer's step."""
        if not self.skipped:
            self.method.on_step_end(self.training)
        self.step += 1

    def _finite(self) -> bool:
        """Whether all gradients are; not asked for a method that does not look at them."""
        if not {"on_gradients", "on_step_end"} & set(self.method.hooks()):
            return True
        found = [p.grad.isfinite().all() for p in self.method.host.root.trained().values() if p.grad is not None]
        return not found or bool(torch.stack([f.to(found[0].device) for f in found]).all())


def describe(method: Method) -> dict[str, Any]:
    """The method and its options, as JSON has them."""
    return {"method": method.name, "config": json.loads(json.dumps(method.config.as_dict()))}


def check_same(method: Method, described: dict[str, Any]) -> None:
    """Raise LoadError that names the difference where a run was of another method, or of other options."""
    here = describe(method)
    there, mine = ({"method": d["method"], **d["config"]} for d in (described, here))
    names = ["method"] if there["method"] != mine["method"] else [n for n in mine if there.get(n) != mine[n]]
    if names:
        differences = ", ".join(f"{n}={there.get(n)!r} there and {mine[n]!r} here" for n in names)
        raise LoadError(
            f"the run to resume had {differences}; attach {described['method']} with its options, or train anew"
        )
