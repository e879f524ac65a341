"""Several saved adapters on one backbone: switched without loading the backbone again, or mixed in one batch."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from peftlib import saved
from peftlib.adapted import Adapted, load
from peftlib.errors import ConfigError, DataError, UnknownNameError
from peftlib.methods.base import SavedAdapter


class Bank:
    """Adapters by name, one of them attached at a time; they may be of different methods.

    >>> bank = peftlib.Bank(model, {"sst2": "adapters/sst2", "rte": "adapters/rte"})
    >>> adapted = bank.use("sst2")
    >>> bank(task_ids=("rte", "sst2", "rte"), **batch).logits

    Adapters are read once and then kept on the CPU. One that was trained on while it was in use keeps what it learned,
    and its parameters stay the same objects, so that an optimizer that was made once serves whenever it is in use. The
    task head is one for all of them, with each one's values while that one is in use. Threads take turns.

    Args:
        model: the backbone, with nothing attached to it.
        adapters: name -> a folder that :meth:`Adapted.save` wrote, or a :class:`SavedAdapter`.

    Raises ConfigError for an empty mapping, LoadError for an adapter that is damaged or of another backbone.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, str | os.PathLike[str] | SavedAdapter]):
        if not adapters:
            raise ConfigError("a bank needs at least one adapter: Bank(model, {name: folder})")
        self.model = model
        self.adapters: dict[str, SavedAdapter] = {}
        self.adapted: Adapted | None = None
        self.name: str | None = None
        self._here = saved.identity(model)
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}
        self._turn = threading.RLock()
        for name, adapter in adapters.items():
            self.add(name, adapter)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in the order of their ``task_ids``."""
        return tuple(self.adapters)

    def add(self, name: str, adapter: str | os.PathLike[str] | SavedAdapter) -> None:
        """One more adapter, at any time. Raises ConfigError for a name that is taken, LoadError as the bank does."""
        if name in self.adapters:
            raise ConfigError(f"the bank has an adapter {name!r} already; remove({name!r}) it first")
        adapter = adapter if isinstance(adapter, SavedAdapter) else saved.read(adapter)
        saved.check_backbone(adapter, self._here)
        with self._turn:
            self.adapters[name] = adapter

    def remove(self, name: str) -> SavedAdapter:
        """Take an adapter out, also the one in use, and give it as it is now; the numbers of those behind it go down by
        one. Raises UnknownNameError for a name that is not here."""
        with self._turn:
            self._check(name)
            if name == self.name:
                self.put_away()
            self._parameters.pop(name, None)
            return self.adapters.pop(name)

    def use(self, name: str) -> Adapted:
        """Attach this adapter in the place of the one in use. Raises UnknownNameError for a name that is not here."""
        with self._turn:
            self._check(name)
            if self.adapted is None or name != self.name:
                self.put_away()
                self.adapted, self.name = load(self.model, self.adapters[name]), name
                self._take_parameters(self._parameters.get(name, {}))
            return self.adapted

    def put_away(self) -> nn.Module:
        """Take the adapter in use from the model, which then is the plain backbone; what it learned is kept."""
        with self._turn:
            if self.adapted is not None and self.name is not None:
                self.adapters[self.name] = self.adapted.snapshot()
                self._parameters[self.name] = self.adapted.trainable()
                self.adapted.detach()
                backbone = {id(p) for p in self.model.parameters()}
                for parameter in self._parameters[self.name].values():
                    if id(parameter) not in backbone:
                        parameter.data, parameter.grad = parameter.data.cpu(), None
                self.adapted = self.name = None
        return self.model

    def _check(self, name: str) -> None:
        if name not in self.adapters:
            raise UnknownNameError("adapter of the bank", name, self.adapters)

    def _take_parameters(self, kept: dict[str, nn.Parameter]) -> None:
        """Put the adapter's parameters of before in the place of the new ones, with these ones' values."""
        names = {id(p): n for n, p in self.model.named_parameters()}
        for module in self.model.modules():
            for leaf, new in module._parameters.items():
                old = None if new is None else kept.get(names[id(new)])
                if new is not None and old is not None and old is not new:
                    old.data = new.data
                    module._parameters[leaf] = old

    @torch.no_grad()
    def __call__(self, *, task_ids: torch.Tensor | Sequence[int | str], **inputs: torch.Tensor) -> ModelOutput:
        """One forward a task: each row through the adapter that its entry of ``task_ids`` names or numbers.

        Returns ``logits`` in the order of the rows. For inference: no gradient is kept. Raises DataError for as many
        task ids as there are not rows, or for adapters whose logits do not fit together.
        """
        ids: list[Any] = task_ids.tolist() if isinstance(task_ids, torch.Tensor) else list(task_ids)
        with self._turn:
            return self._mixed(ids, inputs)

    def _mixed(self, ids: list[Any], inputs: dict[str, Any]) -> ModelOutput:
        names = [self.names[i] if isinstance(i, int) and 0 <= i < len(self.names) else i for i in ids]
        rows = len(next(iter(inputs.values())))
        if len(names) != rows:
            raise DataError(f"{len(names)} task ids were given for {rows} rows")
        self.model.eval()
        answers: dict[int, torch.Tensor] = {}
        for name in dict.fromkeys(names):
            self.use(name)
            mine = [i for i, n in enumerate(names) if n == name]
            logits = self.model(**{k: v[mine] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}).logits
            answers.update(zip(mine, logits))
        if len({answer.shape for answer in answers.values()}) > 1:
            raise DataError("these adapters answer with logits of different shapes; use(name) them one by one")
        return ModelOutput(logits=torch.stack([answers[row] for row in range(rows)]))
