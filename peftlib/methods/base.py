"""What a method is: a config, what it attaches, and the training hooks in which it acts."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from peftlib import taxonomy
from peftlib.errors import ConfigError, MergeError
from peftlib.mechanisms.call import plainly
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.outputs import logits_of
from peftlib.mechanisms.schedules import Schedule, Stage, current, staged

HOOKS = ("on_step_start", "penalty", "on_gradients", "on_step_end", "on_train_end")


@dataclass(frozen=True)
class TrainingState:
    """Where training stands: ``step`` counts optimizer steps from 0, ``total`` is how many there will be; ``schedule``
    is that of the learning rate and ``stages`` are the method's. ``max_norm``: the norm to which the method itself is
    to clip gradients, where it does that (:attr:`Method.clips`). ``accumulation``: how many backward passes a step has
    at most; ``loss_scale``: by which the loss was multiplied in them (GradScaler), and what they left beside the
    gradients of what trains."""

    step: int
    total: int
    schedule: Schedule = field(default_factory=Schedule)
    stages: tuple[Stage, ...] = ()
    max_norm: float | None = None
    accumulation: int = 1
    loss_scale: float = 1.0

    @property
    def fraction(self) -> float:
        return self.step / max(1, self.total)

    @property
    def stage(self) -> str:
        """The title of the stage that this step is in."""
        return current(self.stages, self.step)[0].title

    def rate(self) -> float:
        """By which the schedule multiplies the learning rate at this step."""
        return staged(self.schedule, self.stages or (Stage("", self.total),))(self.step)

    def rate_since(self, start: int, warmup_steps: int | None = None) -> float:
        """The same for what began to train at step ``start`` and has a schedule of its own from there to the end, with
        as many steps of warm-up as the whole training has, or ``warmup_steps``."""
        schedule, rising = self.schedule, warmup_steps
        if rising is None:
            rising = schedule.warmup_steps(self.total)
        if schedule.name == "constant":  # it has no warm-up by itself
            schedule = dataclasses.replace(schedule, name="constant_with_warmup")
        return schedule.over(self.total - start, rising)(self.step - start)


@dataclass(frozen=True)
class ForwardPass:
    """A training forward of the whole model: what went in, what came out, and another one over the same inputs."""

    model: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def replay(self) -> Any:
        """The output of a second forward, with draws (dropout and the like) of its own; no penalty is added to it."""
        return plainly(self.model, self.args, self.kwargs)

    def logits(self, output: Any = None) -> torch.Tensor:
        """The logits in this or another output; of answers' starts and ends (b, 2, t)."""
        output = self.output if output is None else output
        if isinstance(output, tuple):
            return torch.stack(output[1:3], dim=1) if "start_positions" in self.kwargs else output[1]
        return logits_of(output)

    @property
    def labels(self) -> torch.Tensor | None:
        return self.kwargs.get("labels")


@dataclass(frozen=True)
class MethodConfig:
    """Base of the methods' configs: frozen dataclasses whose fields are JSON values."""

    registered_as: ClassVar[str] = ""
    """The name of a method from outside of peftlib."""

    @property
    def method(self) -> str:
        """The method's name: its file's, or its package's, whose class is in ``method.py``."""
        if own := vars(type(self)).get("registered_as"):
            return own
        *_, folder, module = type(self).__module__.split(".")
        return folder if module == "method" else module

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, eq=False)
class SavedAdapter:
    """An adapter outside of a model: what a saved folder holds, in memory.

    ``state`` (by name in the model, task head included) is None for the source of an adapter that was itself loaded:
    its file holds what it took from its sources, so only their configs are needed. ``backbone`` is the identity of the
    model it was made for, ``sources`` are the adapters it was built on, ``notes`` is what the config file
    tells its reader. ``head`` and ``also`` name the task head's and the backbone's other parameters in ``state``;
    ``layers`` and ``train_embeddings`` are the layers to transform and the embeddings of :func:`peftlib.attach`,
    ``labels`` the names of the head's classes, where they have some.
    """

    name: str
    config: MethodConfig
    state: dict[str, torch.Tensor] | None = None
    head: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    backbone: dict[str, Any] | None = None
    sources: tuple[SavedAdapter, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    train_embeddings: bool | tuple[int, ...] = False
    labels: tuple[str, ...] = ()

    @property
    def own(self) -> dict[str, torch.Tensor]:
        """The method's own part of the state."""
        assert self.state is not None, "a source that was itself loaded has no tensors"
        return {n: t for n, t in self.state.items() if n not in (*self.head, *self.also)}


class Method:
    """One attached method. Subclasses override :meth:`attach` and, at most, some of the training hooks.

    ``learning_rate`` is the default of :func:`peftlib.fit`, found by the search that the leaderboard page states.
    """

    Config: ClassVar[type[MethodConfig]]
    learning_rate: ClassVar[float] = 1e-3
    restarts: ClassVar[bool] = False
    """Whether what begins to train later has the learning-rate schedule for itself (``TrainingState.rate_since``)."""
    calibrates: bool = False
    """Whether training needs :meth:`calibrate` first."""
    converts: bool = False
    """Whether a phase on unlabelled text comes before the task, :func:`peftlib.convert`; its result is taken by
    :meth:`start_from`."""
    clips: bool = False
    """Whether :meth:`on_gradients` clips the gradients, in the loop's place, by another norm than what trains has."""
    replaces: bool = False
    """Whether :meth:`attach` puts modules in the place of the backbone's, beside which other parts of a combination
    stand."""
    source_methods: tuple[str, ...] = ()
    """The methods whose saved adapters can be sources of this one; without any it takes no sources."""
    fewest_sources: int = 2
    """How many sources it needs at least, where it takes any."""
    hf_peft: ClassVar[Any] = None
    """How HF peft's files hold its adapters, a :class:`peftlib.methods.bases.hf_peft.Format`; None: not at all."""
    structure_search: ClassVar[type | None] = None
    """The search over its structures, a class of :mod:`peftlib.methods.bases.search`; None: it has none."""
    config: Any
    """Its options, an instance of ``Config``, whose fields only the class itself knows."""
    host: Host
    """The backbone that it changes; there is none before :meth:`attach`."""

    def __init__(self, config: MethodConfig):
        self.config = config
        self.sources: tuple[SavedAdapter, ...] = ()

    @property
    def name(self) -> str:
        return self.config.method

    @property
    def entry(self) -> taxonomy.Entry:
        return taxonomy.entry(self.name)

    def parts_and_itself(self) -> tuple[Method, ...]:
        """The methods whose state this one's attributes hold: itself and, of a combination, its parts."""
        return (self,)

    def take_sources(self, sources: tuple[SavedAdapter, ...]) -> None:
        """Keep the adapters that this method builds on. Raises ConfigError for too few, or of a wrong method."""
        if not self.source_methods:
            if sources:
                raise ConfigError(f"{self.name} takes no sources, and {len(sources)} were given; leave them out")
        elif len(sources) < self.fewest_sources:
            raise ConfigError(
                f"{self.name} builds on at least {self.fewest_sources} saved adapters of "
                f"{' or '.join(self.source_methods)}, and {len(sources)} were given: "
                f'attach(model, "{self.name}", sources=[folder, ...])'
            )
        for source in sources:
            if source.config.method not in self.source_methods:
                raise ConfigError(
                    f"source {source.name!r} is an adapter of {source.config.method}; {self.name} builds on "
                    f"{' or '.join(self.source_methods)}"
                )
        self.sources = tuple(sources)

    @property
    def classifies(self) -> bool:
        """Whether a model without a classification head answers with the logits of classes while this is attached."""
        return False

    @property
    def fitted(self) -> bool:
        """Whether :meth:`predict` answers in the model's place."""
        return False

    # What it does to a model

    def attach(self, host: Host) -> None:
        """Change the frozen backbone through the host's seams."""
        raise NotImplementedError

    def head(self, head: dict[str, torch.nn.Parameter]) -> dict[str, torch.nn.Parameter]:
        """What trains and is counted as task head, by name in the model; ``head`` is the model's own. Asked after
        :meth:`attach`."""
        return head

    def calibrate(self, batches: Iterable[dict[str, torch.Tensor]], checkpoint: Path | None = None) -> None:
        """Look at training batches (model inputs with labels, on the model's device) before training.

        ``checkpoint``: the file where a calibration that takes long writes its state, and from which it goes on.
        """

    def start_from(self, converted: SavedAdapter) -> None:
        """Take what :func:`peftlib.convert` gave in the place of the start."""
        raise ConfigError(f"{self.name} has no phase before the task, so there is nothing that it could start from")

    def pending(self) -> tuple[int, int, int]:
        """What :meth:`calibrate` will add to the counts: trained parameters, and stored numbers and bytes at most."""
        return 0, 0, 0

    def searched(self) -> int:
        """How many numbers :meth:`calibrate` finds without gradients; they count as trained."""
        return 0

    # Training hooks

    def stages(self, total: int) -> tuple[Stage, ...]:
        """The parts of a training of ``total`` steps, in order; each has the learning-rate schedule for itself."""
        return (Stage("training", total),)

    def counts_passes(self, training: TrainingState) -> bool:
        """Whether it reads what a backward pass leaves beside gradients, which do not add up over passes, and thus has
        to know how many a step has."""
        return False

    def on_step_start(self, training: TrainingState) -> None:
        """Before the first forward of an optimizer step."""

    def penalty(self, forward: ForwardPass) -> torch.Tensor | None:
        """A scalar to add to the loss of this training forward."""

    def on_gradients(self, training: TrainingState) -> None:
        """After backward and clipping, before the optimizer's step."""

    def on_step_end(self, training: TrainingState) -> None:
        """After the optimizer's step."""

    def on_train_end(self) -> None:
        """After the last step."""

    # After training

    def fit(self, batches: Iterable[dict[str, torch.Tensor]]) -> None:
        """Look at training batches of a classification task once training is over; :func:`peftlib.fit` and the
        Trainer's callback call it."""

    def predict(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Class probabilities (N, C) that are not the softmax of the model's logits, where ``fitted``."""
        raise NotImplementedError

    def learning_rates(self) -> dict[str, float]:
        """Factors of the learning rate for parameters that do not train at 1 times it, by name in the model."""
        return {}

    # State

    def state(self) -> dict[str, torch.Tensor]:
        """What is stored, by name in the model. Override where that differs from what trains."""
        return self.host.state()

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Write a stored state back; raises LoadError where it does not fit."""
        self.host.load_state(state)

    def notes(self) -> dict[str, Any]:
        """What a saved adapter's config file tells its reader of the result, as JSON; loading does not need it."""
        return {}

    def run_state(self) -> dict[str, torch.Tensor]:
        """What a training run has beside the model's tensors, by name, for a checkpoint that training resumes from."""
        return {}

    def load_run_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take up what :meth:`run_state` gave, before the first resumed step."""

    def merge(self) -> None:
        """Write the method into the backbone's weights; the host then removes it. Parametrized weights and trained
        backbone parameters need nothing here."""

    def merge_inputs(self) -> None:
        """Write what the method does to the inputs of maps into their weights: after :meth:`merge` of all parts of a
        combination, for what these add to a map's output is computed from the input that this gives."""

    def check_mergeable(self) -> None:
        """Raise MergeError that says why, where the method cannot be folded into plain weights."""
        if self.entry.merge == "no":
            raise MergeError(
                f"{self.name} has no merge: {self.entry.merge_note} Keep it attached, or save() it and load() it later."
            )

    def hooks(self) -> tuple[str, ...]:
        """The names of the training hooks that this method has."""
        return tuple(n for n in HOOKS if getattr(type(self), n) is not getattr(Method, n))


def check_alike(method: str, sources: tuple[SavedAdapter, ...], *fields: str) -> None:
    """Raise ConfigError where the sources' configs differ, in these fields or, without any, in anything."""
    first = sources[0].config
    for source in sources[1:]:
        names = fields or tuple(first.as_dict())
        one, other = ({n: getattr(c, n, None) for n in names} for c in (first, source.config))
        differing = [n for n in names if one[n] != other[n]]
        if not fields and source.config.method != first.method:
            differing = ["method"]
            one, other = {"method": first.method}, {"method": source.config.method}
        if differing:
            n = differing[0]
            raise ConfigError(
                f"{method} needs sources of one {n}, and {sources[0].name!r} has {n}={one[n]!r}, {source.name!r} "
                f"{n}={other[n]!r}; give those that agree"
            )


C = TypeVar("C", bound=MethodConfig)


def fitted(config: C, where: object, **values: Any) -> C:
    """The config with these values in the place of defaults that do not fit ``where``, said in a warning."""
    said = ", ".join(f"{name}={getattr(config, name)!r} becomes {value!r}" for name, value in values.items())
    warnings.warn(f"defaults of {config.method} do not suit {where}: {said}", stacklevel=2)
    return dataclasses.replace(config, **values)


def is_default(config: MethodConfig, name: str) -> bool:
    """Whether an option has its default."""
    return getattr(config, name) == next(f.default for f in dataclasses.fields(config) if f.name == name)


def at_least(name: str, value: float, low: float) -> None:
    """Raise ConfigError unless ``value >= low``."""
    _number(name, value)
    if not value >= low:
        raise ConfigError(f"{name}={value!r} is too small; it must be at least {low}")


def between(name: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless ``low < value <= high``."""
    _number(name, value)
    if not low < value <= high:
        raise ConfigError(f"{name}={value!r} is out of range; it must be above {low} and at most {high}")


def one_of(name: str, value: object, known: Iterable[object]) -> None:
    """Raise ConfigError unless ``value`` is one of ``known``."""
    known = tuple(known)
    if value not in known:
        raise ConfigError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, known))}")


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name}={value!r} is not a number")
