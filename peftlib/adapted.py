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

from peftlib import attached, saved
from peftlib.errors import ConfigError, LoadError, StateError, TargetError
from peftlib.mechanisms import atomic, quantized, sparse
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


@dataclass(frozen=True)
class Extent:
    """Where a method acts and what trains beside it: the ``layers_to_transform``, ``train_embeddings`` and
    ``train_head`` of :func:`attach`; ``beside`` names the stored tensors of the embeddings."""

    layers: tuple[int, ...] | None = None
    train_embeddings: bool | tuple[int, ...] = False
    train_head: bool = True
    beside: tuple[str, ...] = ()


class Adapted:
    """A backbone with one method attached. Made by :func:`attach`; ``model`` is the same object that was given."""

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        host: Host,
        head: dict[str, nn.Parameter],
        identity: dict[str, Any],
        shapes: dict[str, tuple[int, ...]],
        extent: Extent,
    ):
        self.model = model
        self.method = method
        self.host = host
        self.guard = Guard(method)
        self._head = head
        self._also: dict[str, nn.Parameter] = {}
        self._identity = identity
        self._shapes = shapes
        self.extent = extent
        self._attached = True
        self._disabled = False

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
        if self._disabled:
            return f"Adapted({type(self.model).__name__}, {self.config}, disabled)"
        count = self.count()
        return (
            f"Adapted({type(self.model).__name__}, {self.config}, "
            f"trained={count.trained:,} of {count.total:,} ({count.percent:.3f} %))"
        )

    def __str__(self) -> str:
        """What trains, of how much, and where: a target that matched fewer layers than was meant shows here."""
        if not self._attached or self._disabled:
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
    def is_disabled(self) -> bool:
        """Whether this is inside :meth:`disabled`."""
        return self._disabled

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
        trained, for_now = self.host.trained(), self.host.trains_for_now()
        named = self.model.named_parameters()
        more = {n: p for n, p in named if p.requires_grad and n not in trained and id(p) not in for_now}
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
        One that fails in the middle leaves the model as it was. Raises StateError when it was done already.
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
            with (
                self.guard.open(),
                atomic.kept(self.host.state().values()),
                self.host.all_or_nothing(*self.method.parts_and_itself(), writes=False),
            ):
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
        with self.host.all_or_nothing(*self.method.parts_and_itself()):
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

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Inside ``with``, the model is the backbone as it was before :func:`attach` and answers as that did, bit for
        bit: a reference for DPO, a teacher, a comparison. Gives the model.

        >>> with torch.no_grad(), adapted.disabled() as backbone:
        ...     reference = backbone(**batch).logits

        The task head counts as part of the method: where it trains, the one from before answers. What was trained waits
        untouched, as the same parameters; meanwhile it cannot be counted, saved, trained or taken off. The whole model
        is disabled, for every thread. What is computed inside is also differentiated inside: gradient checkpointing
        computes again in the backward pass. Originals that wait on the CPU are copied to the model's device each time,
        and compiled parts run without their compiled code.

        Raises StateError after ``attach(..., keep_original=False)`` when originals are needed.
        """
        if self._disabled:
            yield self.model
            return
        self._check_attached()
        self._check_originals()
        with self.host.suspended():
            self._disabled = True
            try:
                yield self.model
            finally:
                self._disabled = False

    # Files

    def state(self) -> dict[str, torch.Tensor]:
        """What :meth:`save` stores, by name in the model."""
        self._check_attached()
        self._adopt()
        state = {n: t.detach() for n, t in self.method.state().items()}
        state.update(self._embeddings())
        state.update({n: p.detach() for n, p in (self._head | self._also).items()})
        return state

    def _embeddings(self) -> dict[str, torch.Tensor]:
        """The stored tensors of embeddings that train beside the method, by name in the model."""
        names = self.extent.beside
        return {n: t for n, t in self.host.state().items() if n in names} if names else {}

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
            layers=self.extent.layers,
            train_embeddings=self.extent.train_embeddings,
            labels=_labels(self.model) if self._head else (),
        )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``adapter.safetensors`` and ``config.json``: what was trained, the task head included, nothing else.

        The folder is written whole or not at all; an existing adapter there is replaced.
        """
        return saved.write(self.snapshot(), folder)

    def _load_state(self, given: SavedAdapter, head: bool) -> None:
        assert given.state is not None, "a source without its tensors cannot be loaded"
        state = dict(given.state)
        if not head:
            left = {n: p.detach() for n, p in self._head.items()}
            state = {n: t for n, t in state.items() if n not in given.head} | left
        way_out = "; build the model for its task, or leave its head out: load(model, ..., head=False)"
        for name, parameter in self._head.items():
            if name not in state:
                raise LoadError(f"{given.name} lacks the task head's {name}{way_out}")
            if state[name].shape != parameter.shape:
                raise LoadError(
                    f"the head's {name} has shape {tuple(state[name].shape)} in {given.name}, "
                    f"{tuple(parameter.shape)} in the model; build the model with the same number of labels, or leave "
                    "the head out: load(model, ..., head=False)"
                )
        if head and (others := [name for name in given.head if name not in self._head]):
            raise LoadError(f"{given.name} has a task head that the model has not ({others[0]}){way_out}")
        mine = self.method.state()
        tensors = self._head | self._embeddings() | self._also
        for name, tensor in tensors.items():
            if name in mine:
                continue
            if name not in state or state[name].shape != tensor.shape:
                raise LoadError(f"{given.name} does not hold {name} in the shape {tuple(tensor.shape)}")
            with torch.no_grad():
                tensor.copy_(state.pop(name))
        self.method.load_state(state)
        self.guard.calibrated = self.guard.filled = True
        if head:
            self._name_labels(given)

    def _name_labels(self, given: SavedAdapter) -> None:
        """Give the classes the names that they have in a file."""
        present, config = _labels(self.model), cast(Any, self.model).config
        if not given.labels or given.labels == present:
            return
        if sorted(given.labels) == sorted(present):
            raise LoadError(
                f"{given.name} has the classes in the order {', '.join(given.labels)}, and the model's config in the "
                f"order {', '.join(present)}; set model.config.id2label to the file's, and number your labels so"
            )
        self.host.set(config, "id2label", dict(enumerate(given.labels)))
        self.host.set(config, "label2id", {name: i for i, name in enumerate(given.labels)})

    def resized(self, more: int) -> None:
        """The backbone's vocabulary has another size, and the model ``more`` parameters than before."""
        parts = self.host.anatomy
        inside = {id(p) for p in parts.embeddings.parameters()}
        grown = {n: tuple(p.shape) for n, p in parts.base.named_parameters() if id(p) in inside}
        self._shapes = self._shapes | grown
        self._identity = self._identity | {
            "vocabulary": parts.embeddings.num_embeddings,
            "parameters": self._identity["parameters"] + more,
            "shapes": saved.hashed(self._shapes),
        }

    # Leaving

    def merge(self) -> nn.Module:
        """Fold the method into plain backbone weights and return the model, free of peftlib.

        A merge that fails in the middle leaves the model as it was; until it is done, the CPU keeps a copy of the
        weights that it writes. Maps of a quantized backbone into which something is merged become plain ones: the codes
        that they had could not follow. Raises MergeError that names why, for a method that has no merge, or an
        offloaded weight.
        """
        self._check_attached()
        self.guard.check_values()
        self.method.check_mergeable()
        with self.host.all_or_nothing(*self.method.parts_and_itself()):
            self.host.fold()
            with quantized.written(self.host):
                self.method.merge()
                self.method.merge_inputs()
            self._leave(merge=True)
        return self.model

    def detach(self) -> nn.Module:
        """Give back the backbone as it was before :func:`attach`, bit for bit, the task head included.

        Raises StateError after ``attach(..., keep_original=False)`` when originals were needed.
        """
        self._check_attached()
        self._adopt()
        self._check_originals()
        with self.host.all_or_nothing(writes=False):  # values that were put back stay: a second try does them again
            self._leave(merge=False)
        return self.model

    def _leave(self, merge: bool) -> None:
        self.host.remove(merge=merge)
        del self.model.peftlib_adapted
        self._attached = False

    def _check_attached(self) -> None:
        if not self._attached:
            raise StateError(f"{self.name} is no longer attached (it was merged or detached); attach it again")
        if self._disabled:
            raise StateError(f"{self.name} is disabled; leave `with adapted.disabled()` first")

    def _check_originals(self) -> None:
        if not self.host.can_restore:
            raise StateError(
                f"{self.name} changed the backbone's own parameters and attach(keep_original=False) kept no copy; "
                "load the backbone again"
            )
        if self.guard.from_meta and self.host.device.type != "meta" and self.trainable().keys() - self.host.paths():
            raise StateError(
                f"{self.name} was attached on the meta device, where there were no values to keep; load the backbone "
                "again"
            )


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
    train_embeddings: bool | Sequence[int] = False,
    layers_to_transform: Sequence[int] | None = None,
    keep_original: bool = True,
    keep_half: bool = False,
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
        train_embeddings: train the token embeddings too, and a language model's output embeddings: all (True), or the
            rows of these token ids, such as those of new tokens (resize the vocabulary first). They are saved along.
        layers_to_transform: let the method act on these layers only, counted from 0 over the encoder's, then the
            decoder's layers; negative ones from the end. What stands in no layer, such as a prompt, is not concerned.
        keep_original: keep CPU copies of backbone parameters that the method trains or replaces, for ``detach()``.
        keep_half: on a half-precision backbone let what trains be in half precision too, which loses small steps. By
            default it is float32, and the backbone computes with it rounded to its own dtype.
        seed: seeds the new parameters; the global random state is left alone.

    Raises:
        UnknownNameError: the method or an option does not exist.
        ConfigError: an option cannot have its value; sources are missing, or of a method that cannot be one.
        TargetError: a target matches nothing, a size does not fit, or a layer or token does not exist.
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
    rows = train_embeddings if isinstance(train_embeddings, bool) else tuple(sorted(set(train_embeddings)))
    extent = Extent(None if layers_to_transform is None else tuple(layers_to_transform), rows, train_head)
    return _attach(model, chosen, given, here, extent, keep_original, keep_half, seed)


def _attach(
    model: nn.Module,
    chosen: Method,
    sources: tuple[SavedAdapter, ...],
    here: dict[str, Any],
    extent: Extent,
    keep_original: bool,
    keep_half: bool = False,
    seed: int = 0,
) -> Adapted:
    chosen.take_sources(sources)
    shapes = saved.shapes_of(model)
    host = Host(model, keep_original, keep_half)
    head = dict(host.anatomy.head)
    devices = [host.device] if host.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.device(host.device):
            torch.manual_seed(seed)
            if extent.layers is not None:
                extent = replace(extent, layers=_layers(host.anatomy.num_layers, extent.layers))
            chosen.host = host if extent.layers is None else host.scope(layers=extent.layers)
            host.take_task_ids()
            rows = _train_embeddings(host, extent.train_embeddings)
            extent = replace(extent, beside=tuple(host.state()))
            chosen.attach(chosen.host)
            if any(table.requires_grad for table in rows):
                raise ConfigError(f"{chosen.name} trains the token embeddings itself; leave train_embeddings out")
            host.name_task_ids()
            head = chosen.head(head) if extent.train_head else {}
            host.train(head.values())
        state_dict.look_after(host)
    except BaseException:
        host.remove()
        raise
    adapted = Adapted(model, chosen, host, head, here, shapes, extent)
    if host.device.type == "meta":
        adapted.guard.from_meta, adapted.guard.filled = True, False
        host.hook(model, adapted.guard.require_values, before=True, stays=True)
        host._hook(model.register_load_state_dict_post_hook(adapted.guard.take_values), stays=True)
    if chosen.hooks() or chosen.calibrates:
        host.hook(model, adapted.guard.require_lifecycle, before=True)
    accumulation.look_after(host)
    if "penalty" in chosen.hooks():
        host.hook(model, adapted.guard.add_penalty)
    host.hook(model, accumulation.give_share)
    attached.answer(adapted)
    cast(Any, model).peftlib_adapted = adapted
    return adapted


def _layers(count: int, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Positions of existing layers, in order."""
    if not layers or not all(-count <= layer < count for layer in layers):
        raise TargetError(
            f"layers_to_transform={layers} are not all among the {count} layers; name some from 0 to {count - 1}"
        )
    return tuple(sorted({layer % count for layer in layers}))


def _train_embeddings(host: Host, rows: bool | tuple[int, ...]) -> list[nn.Parameter]:
    """Let the token embeddings train, of the input and of a language model's output, as a whole or in some rows; gives
    the tables of which rows train."""
    if rows is False or rows == ():
        return []
    model = cast(Any, host.model)
    modules = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    weights = list({id(module.weight): module.weight for module in modules}.values())  # they may be tied
    if rows is True:
        host.train(weights)
        return []
    for weight in weights:
        tokens, width = weight.shape
        if not all(0 <= row < tokens for row in rows):
            raise TargetError(
                f"train_embeddings={rows} are not all token ids, 0 to {tokens - 1}; for new tokens call "
                "model.resize_token_embeddings(len(tokenizer)) first"
            )
        starts = torch.tensor(rows, device=weight.device)[:, None] * width  # (k, 1)
        sparse.train_entries(host, weight, (starts + torch.arange(width, device=weight.device)).flatten())  # (k e)
    return weights


def _labels(model: nn.Module) -> tuple[str, ...]:
    """The names of the classes, where the model's config has others than numbers."""
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    labels = tuple(str(names[i]) for i in sorted(names))
    return () if all(label == f"LABEL_{i}" for i, label in enumerate(labels)) else labels


def load(
    model: nn.Module,
    adapter: str | os.PathLike[str] | SavedAdapter,
    *,
    head: bool = True,
    keep_original: bool = True,
    keep_half: bool = False,
) -> Adapted:
    """Attach a saved adapter to the backbone it was made for.

    Args:
        model: the backbone, of the same family and shapes as when it was saved.
        adapter: the folder that :meth:`Adapted.save` wrote, or what :func:`peftlib.read` and
            :meth:`Adapted.snapshot` give.
        head: load the task head too; False leaves it out, for a model with another head or number of labels, whose
            own head then trains.
        keep_original, keep_half: as in :func:`attach`.

    The head's classes get the names that they have in the file. Only safetensors and JSON are read; nothing is
    unpickled. Raises LoadError for a file that is missing, truncated, changed, or made for another backbone, head or
    method. Weights that differ from the saved backbone's under the same shapes give a warning.
    """
    _check_free(model)
    given = adapter if isinstance(adapter, SavedAdapter) else saved.read(adapter)
    here = saved.identity(model)
    # Under another head a backbone may lack its pooler; the shapes of what is loaded are compared all the same.
    own = here if head or given.backbone is None else here | {"shapes": given.backbone.get("shapes")}
    saved.check_backbone(given, own)
    # What the sources gave is in the adapter's own tensors; how they were built is all that is needed of them.
    sources = tuple(replace(source, state=None) for source in given.sources)
    extent = Extent(given.layers, given.train_embeddings, bool(given.head) or not head)
    adapted = _attach(model, resolve(given.config), sources, here, extent, keep_original, keep_half)
    try:
        named = dict(model.named_parameters())
        if unknown := [name for name in given.also if name not in named]:
            raise LoadError(f"{given.name} trained {unknown[0]} too, which this {type(model).__name__} does not have")
        adapted._train_also({name: named[name] for name in given.also})
        adapted._load_state(given, head)
    except BaseException:
        adapted._leave(merge=False)
        raise
    return adapted


def _check_free(model: nn.Module) -> None:
    if (present := getattr(model, "peftlib_adapted", None)) is not None:
        raise StateError(
            f"{present.name} is already attached to this {type(model).__name__}; merge() or detach() it first "
            "(model.peftlib_adapted.detach(), as in a notebook's cell that runs again), or attach both at once with "
            "peftlib.combine(...)"
        )
