"""All or nothing: a step that fails in the middle leaves a model as it was before it.

What a step overwrites in place is kept on the CPU until the step is over, tensor by tensor as it is written, so a merge
takes the memory of the weights that it writes. Everything else is references: modules, hooks, attributes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peftlib.mechanisms.call import Forward


@contextmanager
def all_or_nothing(model: nn.Module, *holders: object, writes: bool = True) -> Iterator[None]:
    """Inside ``with``, an exception of any kind takes back what happened to the model and to the attributes of the
    ``holders``, lists and dictionaries among them included. Without ``writes`` only what is exchanged is taken back,
    and not what is written into tensors."""
    tensors = [(t, t.data, t.requires_grad, t.grad) for t in (*model.parameters(), *model.buffers())]
    modules = list(model.modules())
    forwards = [forward for m in modules if isinstance(forward := vars(m).get("forward"), Forward)]
    config = (model.config,) if hasattr(model, "config") else ()
    objects = [_Attributes(one) for one in (*modules, *forwards, *config, *holders)]
    journal = _Journal(data for _, data, *_ in tensors)
    try:
        with ExitStack() as stack:
            if writes:
                stack.enter_context(journal)
            yield
    except BaseException:
        for attributes in objects:
            attributes.put_back()
        for tensor, data, flag, gradient in tensors:
            tensor.data = data
            tensor.requires_grad_(flag).grad = gradient
        journal.put_back()
        raise


@contextmanager
def kept(parameters: Iterable[torch.Tensor], device: torch.device | str | None = None) -> Iterator[list[torch.Tensor]]:
    """Gives copies of the values on this device (None: where they are); an exception inside ``with`` puts them back."""
    parameters = list(parameters)
    before = [parameter.detach().to(device, copy=True) for parameter in parameters]
    try:
        yield before
    except BaseException:
        with torch.no_grad():
            for parameter, values in zip(parameters, before):
                parameter.copy_(values)
        raise


class _Attributes:
    """An object's class and attributes; of lists and dictionaries also what is in them."""

    def __init__(self, owner: Any):
        self.owner, self.cls, self.values = owner, type(owner), dict(vars(owner))
        self.inside = [(value, value.copy()) for value in self.values.values() if isinstance(value, dict | list)]

    def put_back(self) -> None:
        if type(self.owner) is not self.cls:
            self.owner.__class__ = self.cls
        vars(self.owner).clear()
        vars(self.owner).update(self.values)
        for container, inside in self.inside:  # in place: hooks' handles know the dictionaries
            container.clear()
            container.extend(inside) if isinstance(container, list) else container.update(inside)


class _Journal(TorchDispatchMode):
    """Keeps what in-place operations overwrite of these tensors."""

    def __init__(self, tensors: Iterable[torch.Tensor]):
        super().__init__()
        self.watched: dict[int, list[torch.Tensor]] = {}
        for tensor in tensors:
            self.watched.setdefault(_place(tensor), []).append(tensor)
        self.watched.pop(0, None)  # tensors without memory
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = {argument.name: value for argument, value in zip(function._schema.arguments, args)} | (kwargs or {})
        for argument in function._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write and argument.name in named:
                self.keep(named[argument.name])
        return function(*args, **(kwargs or {}))

    def keep(self, written: Any) -> None:
        for tensor in written if isinstance(written, list | tuple) else (written,):
            for watched in self.watched.pop(_place(tensor), ()):
                self.kept.append((watched, watched.cpu().clone()))

    @torch.no_grad()
    def put_back(self) -> None:
        for tensor, values in self.kept:
            tensor.copy_(values)


def _place(tensor: torch.Tensor) -> int:
    """Where a tensor's memory begins; 0 where it has none of its own, as on the meta device."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0
