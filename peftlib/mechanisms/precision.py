"""One policy for dtypes: what trains is float32 by default, also on a half-precision backbone, which computes with it
rounded to its own dtype."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterable, Sequence
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


def widen(module: nn.Module, names: Sequence[str]) -> None:
    """Let these parameters of a module be float32, and let it compute with them in their present dtype.

    The parameters stay the objects and keep the names that they had. Within a forward of the module, or of one around
    it that :func:`enter` and :func:`leave` are hooks of, ``module.weight`` is the rounded one; outside it is the
    parameter itself.
    """
    dtype = module.get_parameter(names[0]).dtype
    kind = type(module)
    if (widened := getattr(kind, "peftlib_widened", None)) is not None:
        kind, before = widened
        names = tuple(dict.fromkeys((*before, *names)))
    module.register_buffer(LIKE, torch.empty(0, dtype=dtype), persistent=False)
    module.__class__ = _computing(kind, tuple(names))


def narrow(module: nn.Module) -> None:
    """Take :func:`widen` back, but for the parameters' dtype."""
    if (widened := getattr(type(module), "peftlib_widened", None)) is not None:
        module.__class__ = widened[0]
    module._buffers.pop(LIKE, None)
    module._non_persistent_buffers_set.discard(LIKE)


@undo.suspends(narrow)
def _stay_wide(model: nn.Module, module: nn.Module) -> undo.Step:
    return undo.nothing  # within a suspended forward the parameters from before are read, in their own dtype


LIKE = "peftlib_like"
"""The name of an empty buffer whose dtype is the one that a module computes in: ``model.to(dtype)`` changes it too."""


@functools.cache
def _computing(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A class of modules of this kind whose parameters of these names are rounded within a forward."""

    def reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
        _, _, *rest = super(made, module).__reduce_ex__(protocol)
        return (_unpickled, (kind, names), *rest)

    members = {name: property(functools.partial(_read, name), functools.partial(_set, name)) for name in names}
    made: type[nn.Module] = type(
        kind.__name__,
        (kind,),
        {**members, "peftlib_widened": (kind, names), "__reduce_ex__": reduce, "__module__": kind.__module__},
    )
    return made


def _unpickled(kind: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    made = _computing(kind, names)
    return made.__new__(made)


def _read(name: str, module: nn.Module) -> torch.Tensor | None:
    value = module._parameters.get(name)
    if value is None:
        value = vars(module).get(name)  # a replica of DataParallel has no parameters
    if value is None or not (torch.compiler.is_compiling() or getattr(_forwards, "running", None)):
        return value
    return value.to(module._buffers[LIKE].dtype)


def _set(name: str, module: nn.Module, value: torch.Tensor) -> None:
    vars(module)[name] = value


def enter(module: nn.Module, args: Args) -> None:
    """A hook before a forward."""
    if not torch.compiler.is_compiling():
        _forwards.__dict__.setdefault("running", []).append(id(module))


def leave(module: nn.Module, args: Args, output: Any) -> None:
    """A hook after it, also where it fails."""
    running = None if torch.compiler.is_compiling() else getattr(_forwards, "running", None)
    if running and running[-1] == id(module):
        running.pop()


def around(model: nn.Module, modules: Iterable[nn.Module]) -> list[nn.Module]:
    """These modules and all that contain them, without those that have the hooks."""
    ids = {id(m) for m in modules}
    return [
        m
        for m in model.modules()
        if not ids.isdisjoint(map(id, m.modules())) and enter not in m._forward_pre_hooks.values()
    ]
