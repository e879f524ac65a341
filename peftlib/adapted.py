"""The handle on a tuned model: attach, count, save, load, merge, detach."""

from __future__ import annotations

import fnmatch
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from peftlib import saved
from peftlib.errors import LoadError, StateError, TargetError
from peftlib.mechanisms.host import Host
from peftlib.methods.base import Method, MethodConfig, SavedAdapter
from peftlib.methods.registry import resolve
from peftlib.training import accumulation, state_dict
from peftlib.training.lifecycle import Guard, Lifecycle

if TYPE_CHECKING:
    from peftlib.training.callback import PeftCallback


@dataclass(frozen=True)
class Count:
    """Parameter counts. ``trained`` includes ``head``, the task head; ``total`` is the backbone as it was, with its
    head; ``stored`` and ``stored_bytes`` are what a saved adapter holds, head included."""

    trained: int
    head: int
    stored: int
    stored_bytes: int
    total: int

    @property
    def method(self) -> int:
        """Trained parameters without the task head."""
        return self.trained - self.head

    @property
    def percent(self) -> float:
        return 100 * self.trained / self.total


class Adapted:
    """A backbone with one method attached. Made by :func:`attach`; ``model`` is the same object that was given."""

    def __init__(
        self, model: nn.Module, method: Method, host: Host, head: dict[str, nn.Parameter], identity: dict[str, Any]
    ):
        self.model = model
        self.method = method
        self.host = host
        self.guard = Guard(method)
        self._head = head
        self._also: dict[str, nn.Parameter] = {}
        self._identity = identity
        self._attached = True

    @property
    def calibrated(self) -> bool:
        """Whether the method has looked at the training data, where it must before training."""
        return self.guard.calibrated

    @property
    def config(self) -> MethodConfig:
        return self.method.config

    @property
    def name(self) -> str:
        return self.method.name

    def __repr__(self) -> str:
        if not self._attached:
            return f"Adapted({type(self.model).__name__}, {self.config}, no longer attached)"
        count = self.count()
        return (
            f"Adapted({type(self.model).__name__}, {self.config}, "
            f"trained={count.trained:,} of {count.total:,} ({count.percent:.3f} %))"
        )

    def __str__(self) -> str:
        """What trains, of how much, and where: a target that matched fewer layers than was meant shows here."""
        if not self._attached:
            return repr(self)
        count = self.count()
        head = f", {count.head:,} of them the task head's" if count.head else ""
        modules = {name.rpartition(".")[0] for name in self.trainable()}
        places = self.host.anatomy.describe(modules | self.host.paths().keys())
        options = ", ".join(f"{name}={value!r}" for name, value in self.config.as_dict().items())
        rows = [("trains", f"{count.trained:,} of {count.total:,} parameters ({count.percent:.3f} %){head}")]
        rows += [("acts at" if not i else "", place) for i, place in enumerate(places)]
        rows += [("options", options)] if options else []
        return "\n".join([f"{self.name} on {type(self.model).__name__}", *(f"  {name:9}{text}" for name, text in rows)])

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of the trained task head's parameters in the model."""
        return tuple(self._head)

    # What trains

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name in the model -> parameter, for every parameter that trains: the method's, the task head's, and those of
        the backbone that were unfrozen after :func:`attach`."""
        self._check_attached()
        self._adopt()
        return self.host.trained()

    def train_also(self, *patterns: str) -> tuple[str, ...]:
        """Train more of the backbone's parameters, by shell patterns of their names in the model: they count as
        trained, are saved and loaded with the adapter, and get their values back in :meth:`detach`. Gives the names.

        Raises TargetError for a pattern that matches nothing, StateError for a parameter that the method replaces.
        """
        self._check_attached()
        named = dict(self.model.named_parameters())
        found: dict[str, nn.Parameter] = {}
        for pattern in patterns:
            matching = fnmatch.filter(named, pattern)
            if not matching:
                raise TargetError(f"no parameter of this {type(self.model).__name__} is named {pattern!r}")
            found |= {name: named[name] for name in matching}
        self._train_also({n: p for n, p in found.items() if n not in self.host.trained()})
        return tuple(found)

    def _train_also(self, parameters: dict[str, nn.Parameter]) -> None:
        owned = self.host.owned().keys()
        for name in parameters:
            if name in owned or ".parametrizations." in name:
                raise StateError(f"{name} is computed or written by {self.name}, and cannot train beside it")
        self.host.train(parameters.values())
        self._also |= parameters

    def _adopt(self) -> None:
        """Take what was unfrozen by hand for trained, too."""
        trained = self.host.trained()
        more = {n: p for n, p in self.model.named_parameters() if p.requires_grad and n not in trained}
        if more:
            warnings.warn(
                f"{len(more)} parameters were unfrozen after attach ({next(iter(more))}, ...). They count as trained "
                "and are saved with the adapter, and detach() gives back the values that they have now; "
                "adapted.train_also(names) before training keeps those from before",
                stacklevel=3,
            )
            self._train_also(more)

    def count(self) -> Count:
        """Trained, stored and total parameters; before calibration with what it will add, stored as an upper bound."""
        trained = self.trainable()
        state = self.state()
        more, stored, stored_bytes = (0, 0, 0) if self.calibrated else self.method.pending()
        return Count(
            trained=sum(p.numel() for p in trained.values()) + more + self.method.searched(),
            head=sum(p.numel() for n, p in trained.items() if n in self._head),
            stored=sum(t.numel() for t in state.values()) + stored,
            stored_bytes=sum(t.numel() * t.element_size() for t in state.values()) + stored_bytes,
            total=self._identity["parameters"],
        )

    def calibrate(
        self, batches: Iterable[dict[str, torch.Tensor]], checkpoint: str | os.PathLike[str] | None = None
    ) -> None:
        """Let the method look at training batches, where it must before training: Fisher masks, and methods whose first
        phase trains everything. Batches with a length, such as a DataLoader, are read as often as the method asks for.
        A method whose calibration takes long writes its state to the file ``checkpoint``, and goes on from there.

        ``batches`` are model inputs with ``labels``; :func:`peftlib.fit` calls this by itself. For methods that need
        no calibration it does nothing. Call it before building an optimizer: it can create the trained parameters.
        Raises StateError when it was done already.
        """
        self._check_attached()
        if not self.method.calibrates:
            return
        if self.calibrated:
            raise StateError(f"{self.name} is calibrated already; detach() and attach it again to use other data")
        device = self.host.device
        mode = self.model.training
        self.model.eval()
        try:
            with self.guard.open():
                self.method.calibrate(_OnDevice(batches, device), None if checkpoint is None else Path(checkpoint))
        finally:
            self.model.train(mode)
        self.guard.calibrated = True

    def start_from(self, converted: str | os.PathLike[str] | SavedAdapter) -> None:
        """Start from what :func:`peftlib.convert` gave for this backbone, or from the folder that it was saved in.

        Raises ConfigError for a method without such a phase, LoadError for another backbone or other shapes.
        """
        self._check_attached()
        given = converted if isinstance(converted, SavedAdapter) else saved.read(converted)
        # Under another head a backbone may lack its pooler; the method compares the shapes of what it takes.
        shapes = (given.backbone or {}).get("shapes")
        saved.check_backbone(given, self._identity | {"shapes": shapes})
        self.method.start_from(given)

    # Training

    def lifecycle(
        self, total_steps: int, step: int = 0, max_norm: float | None = None, *, accumulation: int = 1
    ) -> Lifecycle:
        """The method's training hooks for a loop of your own; see :class:`peftlib.training.Lifecycle`. A resumed run
        starts at another ``step`` than 0; ``max_norm`` is for methods that clip the gradients themselves;
        ``accumulation`` is how many backward passes an optimizer step has at most."""
        self._check_attached()
        return Lifecycle(self.guard, total_steps, step, max_norm, accumulation)

    def parameter_groups(
        self, learning_rate: float, *, head_learning_rate: float | None = None, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """What an optimizer trains, in groups: the task head at its own rate (default: the same), and the parameters
        for which the method asks for a multiple of the rate. :func:`peftlib.fit` uses them; with ``transformers``:

        >>> optimizer = torch.optim.AdamW(adapted.parameter_groups(1e-4))
        >>> Trainer(model, ..., optimizers=(optimizer, None), callbacks=[adapted.callback()])
        """
        factors = self.method.learning_rates()
        groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for name, parameter in self.trainable().items():
            head = name in self._head
            rate = learning_rate * factors.get(name, 1.0)
            if head and head_learning_rate is not None:
                rate = head_learning_rate
            groups.setdefault((head, rate), []).append(parameter)
        return [{"params": params, "lr": rate, "weight_decay": weight_decay} for (_, rate), params in groups.items()]

    @contextmanager
    def task(self, index: int) -> Iterator[Adapted]:
        """Inside ``with``, rows belong to this task where a batch has no ``task_ids``, as in ``generate()``. With
        several tasks, rows that name none are an error outside.

        Raises DataError for a task that the method does not know.
        """
        self._check_attached()
        tasks = self.host.tasks
        tasks.check(index)
        before, tasks.default = tasks.default, index
        try:
            yield self
        finally:
            tasks.default = before

    def callback(self) -> PeftCallback:
        """A ``transformers.TrainerCallback`` that runs the method's training hooks inside ``transformers.Trainer``."""
        self._check_attached()
        from peftlib.training.callback import PeftCallback

        return PeftCallback(self.guard)

    # Files

    def state(self) -> dict[str, torch.Tensor]:
        """What :meth:`save` stores, by name in the model."""
        self._check_attached()
        self._adopt()
        state = {n: t.detach() for n, t in self.method.state().items()}
        state.update({n: p.detach() for n, p in (self._head | self._also).items()})
        return state

    def snapshot(self) -> SavedAdapter:
        """What :meth:`save` writes, as copies in memory."""
        return SavedAdapter(
            name=self.name,
            config=self.config,
            state={n: t.cpu().contiguous().clone() for n, t in self.state().items()},
            head=tuple(sorted(self._head)),
            also=tuple(sorted(self._also)),
            backbone=self._identity,
            sources=self.method.sources,
            notes=self.method.notes(),
        )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``adapter.safetensors`` and ``config.json``: what was trained, the task head included, nothing else.

        The folder is written whole or not at all; an existing adapter there is replaced.
        """
        return saved.write(self.snapshot(), folder)

    def _load_state(self, state: dict[str, torch.Tensor]) -> None:
        state = dict(state)
        for name, parameter in self._head.items():
            if name not in state:
                raise LoadError(f"the file lacks the task head's {name}; load it into a model of its task")
            if state[name].shape != parameter.shape:
                raise LoadError(
                    f"the head's {name} has shape {tuple(state[name].shape)} in the file, {tuple(parameter.shape)} in "
                    "the model; build the model with the same number of labels"
                )
            if name in self.method.state():
                continue
            with torch.no_grad():
                parameter.copy_(state.pop(name))
        for name, parameter in self._also.items():
            if name not in state or state[name].shape != parameter.shape:
                raise LoadError(
                    f"the file has no {name} of shape {tuple(parameter.shape)}, which trained with the adapter"
                )
            if name not in self.method.state():
                with torch.no_grad():
                    parameter.copy_(state.pop(name))
        self.method.load_state(state)
        self.guard.calibrated = True

    # Leaving

    def merge(self) -> nn.Module:
        """Fold the method into plain backbone weights and return the model, free of peftlib.

        Raises MergeError that names why, for a method that has no merge.
        """
        self._check_attached()
        self.method.check_mergeable()
        self.method.merge()
        self._leave(merge=True)
        return self.model

    def detach(self) -> nn.Module:
        """Give back the backbone as it was before :func:`attach`, bit for bit, the task head included.

        Raises StateError after ``attach(..., keep_original=False)`` when originals were needed.
        """
        self._check_attached()
        self._adopt()
        if not self.host.can_restore:
            raise StateError(
                f"{self.name} changed the backbone's own parameters and attach(keep_original=False) kept no copy; "
                "load the backbone again"
            )
        self._leave(merge=False)
        return self.model

    def _leave(self, merge: bool) -> None:
        self.host.remove(merge=merge)
        del self.model.peftlib_adapted
        self._attached = False

    def _check_attached(self) -> None:
        if not self._attached:
            raise StateError(f"{self.name} is no longer attached (it was merged or detached); attach it again")


class _OnDevice:
    """Batches on a device, as often and as many as ``batches`` gives them."""

    def __init__(self, batches: Iterable[dict[str, torch.Tensor]], device: torch.device):
        self.batches, self.device = batches, device

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return ({k: v.to(self.device) for k, v in batch.items()} for batch in self.batches)

    def __len__(self) -> int:
        return len(cast(Sized, self.batches))


def attach(
    model: nn.Module,
    method: str | MethodConfig,
    *,
    sources: Sequence[str | os.PathLike[str] | SavedAdapter] = (),
    train_head: bool = True,
    keep_original: bool = True,
    seed: int = 0,
    **options: Any,
) -> Adapted:
    """Freeze a transformers model and attach a method to it. The model object stays the same and keeps its forward.

    Args:
        model: a model of a family in :func:`peftlib.anatomy.families`.
        method: a name of :func:`peftlib.methods` with its ``options``, or a config object.
        sources: for methods that build on other adapters of the same backbone: the folders that they were saved in,
            or what :func:`peftlib.read` and :meth:`Adapted.snapshot` give.
        train_head: train the new task head too (classification, token and span heads; language-model heads are
            pretrained and stay frozen).
        keep_original: keep CPU copies of backbone parameters that the method trains or replaces, for ``detach()``.
        seed: seeds the new parameters; the global random state is left alone.

    Raises:
        UnknownNameError: the method or an option does not exist.
        ConfigError: an option cannot have its value; sources are missing, or of a method that cannot be one.
        TargetError: a target matches nothing, or a size does not fit.
        UnsupportedError: the family cannot host the method.
        LoadError: a source was made for another backbone, or is damaged.
        StateError: something is attached already.
    """
    chosen = resolve(method, **options)
    _check_free(model)
    given = tuple(s if isinstance(s, SavedAdapter) else saved.read(s) for s in sources)
    here = saved.identity(model)
    for source in given:
        saved.check_backbone(source, here)
    return _attach(model, chosen, given, here, train_head, keep_original, seed)


def _attach(
    model: nn.Module,
    chosen: Method,
    sources: tuple[SavedAdapter, ...],
    here: dict[str, Any],
    train_head: bool,
    keep_original: bool,
    seed: int = 0,
) -> Adapted:
    chosen.take_sources(sources)
    host = Host(model, keep_original=keep_original)
    head = dict(host.anatomy.head)
    devices = [host.device] if host.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.device(host.device):
            torch.manual_seed(seed)
            chosen.host = host
            host.take_task_ids()
            chosen.attach(host)
            head = chosen.head(head) if train_head else {}
            host.train(head.values())
        state_dict.look_after(host)
    except BaseException:
        host.remove()
        raise
    adapted = Adapted(model, chosen, host, head, here)
    if chosen.hooks() or chosen.calibrates:
        host.hook(model, adapted.guard.require_lifecycle, before=True)
    accumulation.look_after(host)
    if "penalty" in chosen.hooks():
        host.hook(model, adapted.guard.add_penalty)
    host.hook(model, accumulation.give_share)
    cast(Any, model).peftlib_adapted = adapted
    return adapted


def load(model: nn.Module, adapter: str | os.PathLike[str] | SavedAdapter, *, keep_original: bool = True) -> Adapted:
    """Attach a saved adapter to the backbone it was made for.

    Args:
        model: the backbone, of the same family and shapes as when it was saved.
        adapter: the folder that :meth:`Adapted.save` wrote, or what :func:`peftlib.read` and
            :meth:`Adapted.snapshot` give.
        keep_original: as in :func:`attach`.

    Only safetensors and JSON are read; nothing is unpickled. Raises LoadError for a file that is missing, truncated,
    changed, or made for another backbone, head or method. Weights that differ from the saved backbone's under the same
    shapes give a warning.
    """
    _check_free(model)
    given = adapter if isinstance(adapter, SavedAdapter) else saved.read(adapter)
    here = saved.identity(model)
    saved.check_backbone(given, here)
    assert given.state is not None, "a source without its tensors cannot be loaded"
    # What the sources gave is in the adapter's own tensors; how they were built is all that is needed of them.
    sources = tuple(replace(source, state=None) for source in given.sources)
    adapted = _attach(model, resolve(given.config), sources, here, bool(given.head), keep_original)
    try:
        named = dict(model.named_parameters())
        if unknown := [name for name in given.also if name not in named]:
            raise LoadError(f"{given.name} trained {unknown[0]} too, which this {type(model).__name__} does not have")
        adapted._train_also({name: named[name] for name in given.also})
        adapted._load_state(given.state)
    except BaseException:
        adapted._leave(merge=False)
        raise
    return adapted


def _check_free(model: nn.Module) -> None:
    if (attached := getattr(model, "peftlib_adapted", None)) is not None:
        raise StateError(
            f"{attached.name} is already attached to this {type(model).__name__}; merge() or detach() it first, "
            "or attach both at once with peftlib.combine(...)"
        )
