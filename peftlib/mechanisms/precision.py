"""One policy for dtypes: what trains is float32 by default, also on a half-precision backbone, which computes with it
rounded to its own dtype."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from peftlib.mechanisms import undo
from peftlib.mechanisms.outputs import Args

HALF = (torch.float16, torch.bfloat16)

_forwards = threading.local()


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is on where x is. The meta device, on which memory is planned, has none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Inside ``with``, products on x's device have their inputs' dtype."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def cast(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x`` in the dtype in which ``weight`` computes; autocast decides by itself where it is on."""
    if x.dtype == weight.dtype or autocasts(x):
        return x
    return x.to(weight.dtype)


# A half-precision backbone's own parameters, trained in float32


def to_float32(model: nn.Module, parameters: Iterable[nn.Parameter]) -> list[Callable[[], None]]:
    """Let those of a model's parameters that are in half precision be float32, and let the model compute with them
    rounded to the dtype that they had. Gives the steps that take this back, to be called from the last to the first.

    The parameters stay the objects and keep the names that they have. Within a forward of the model, or of a part of it
    that has one, ``module.weight`` is the rounded one; outside it is the parameter itself.
    """
    half = {id(p): p for p in parameters if p.dtype in HALF}
    owners = {m: [n for n, p in m._parameters.items() if id(p) in half] for m in model.modules()}
    owners = {module: names for module, names in owners.items() if names}
    steps: list[Callable[[], None]] = []
    for module, names in owners.items():
        _widen(module, names)
        steps.append(functools.partial(_narrow, module, names))
    for module in _around(model, owners):
        handles = (
            module.register_forward_pre_hook(_enter, prepend=True),
            module.register_forward_hook(_leave, always_call=True),
        )
        steps += [functools.partial(undo.unhook, handle, True) for handle in handles]
    for parameter in half.values():
        steps.append(functools.partial(_put_dtype, parameter, parameter.dtype))
        parameter.data = parameter.data.float()
    return steps


@contextlib.contextmanager
def in_float32(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside ``with``, :func:`to_float32`: for a training whose results are taken before the end."""
    steps = to_float32(model, parameters)
    try:
        yield
    finally:
        for step in reversed(steps):
            step()


def _put_dtype(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    parameter.data = parameter.data.to(dtype)


@undo.suspends(_put_dtype)
def _keep_dtype(model: nn.Module, parameter: nn.Parameter, dtype: torch.dtype) -> undo.Step:
    return undo.nothing  # the values from before, which are then in its place, have their own


def _widened(module: nn.Module) -> tuple[Any, tuple[str, ...]]:
    """The module's own class, and which of its parameters it rounds."""
    return getattr(type(module), "peftlib_widened", (type(module), ()))


def _widen(module: nn.Module, names: Sequence[str]) -> None:
    kind, before = _widened(module)
    like = torch.empty(0, dtype=module.get_parameter(names[0]).dtype, device=module.get_parameter(names[0]).device)
    module.register_buffer(LIKE, like, persistent=False)
    module.__class__ = _computing(kind, (*before, *names))


def _narrow(module: nn.Module, names: Sequence[str]) -> None:
    kind, before = _widened(module)
    left = tuple(name for name in before if name not in names)
    if before and not left:
        module._buffers.pop(LIKE)
        module._non_persistent_buffers_set.discard(LIKE)
    module.__class__ = _computing(kind, left) if left else kind


@undo.suspends(_narrow)
def _keep_wide(model: nn.Module, module: nn.Module, names: Sequence[str]) -> undo.Step:
    return undo.nothing  # rounding leaves half precision as it is


LIKE = "peftlib_like"
"""The name of an empty buffer whose dtype is the one that a module computes in: ``model.to(dtype)`` changes it too."""


@functools.cache
def _computing(kind: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """A class of modules of this kind whose parameters of these names are rounded within a forward."""

    def reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
        reduced = super(made, module).__reduce_ex__(protocol)
        return (_unpickled, (kind, names), *reduced[2:])

    members = {name: property(functools.partial(_read, name), functools.partial(_set, name)) for name in names}
    made: type[nn.Module] = type(
        kind.__name__,
        (kind,),
        {**members, "peftlib_widened": (kind, names), "__reduce_ex__": reduce, "__module__": kind.__module__},
    )
    return made


def _unpickled(kind: Any, names: tuple[str, ...]) -> nn.Module:
    made = _computing(kind, names)
    return made.__new__(made)


def _read(name: str, module: nn.Module) -> torch.Tensor | None:
    value = module._parameters.get(name)
    if value is None:
        value = vars(module).get(name)  # a replica of DataParallel has no parameters
    if value is None or not (torch.compiler.is_compiling() or getattr(_forwards, "running", None)):
        return value
    return value.to(module.get_buffer(LIKE).dtype)


def _set(name: str, module: nn.Module, value: torch.Tensor) -> None:
    vars(module)[name] = value


def _enter(module: nn.Module, args: Args) -> None:
    if not torch.compiler.is_compiling():
        _forwards.__dict__.setdefault("running", []).append(id(module))


def _leave(module: nn.Module, args: Args, output: Any) -> None:
    running = None if torch.compiler.is_compiling() else getattr(_forwards, "running", None)
    if running and running[-1] == id(module):
        running.pop()


def _around(model: nn.Module, modules: Iterable[nn.Module]) -> list[nn.Module]:
    """These modules and all that contain them, without those that have the hooks."""
    ids = {id(m) for m in modules}
    return [
        m
        for m in model.modules()
        if not ids.isdisjoint(map(id, m.modules())) and _enter not in m._forward_pre_hooks.values()
    ]
