"""The steps that take a change back. They are module-level functions, put off by ``functools.partial`` with modules and
tensors as arguments, so that a deep copy of a model undoes its own changes and not the original's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeGuard

import torch
from torch import nn
from torch.nn.utils import parametrize


def name_of(module: nn.Module, child: nn.Module) -> str:
    """The child's name in the module."""
    return next(name for name, candidate in module.named_children() if candidate is child)


def take_out(module: nn.Module, name: str) -> None:
    del module._modules[name]


def put_module(owner: nn.Module, name: str, module: nn.Module) -> None:
    present = owner.get_submodule(name)
    device = next((tensor.device for tensor in (*present.parameters(), *present.buffers())), None)
    owner._modules[name] = module if device is None else module.to(device)


def put_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    present = module.get_parameter(name)
    parameter.data = parameter.data.to(present.device, present.dtype)
    module._parameters[name] = parameter


def put_attribute(module: nn.Module, name: str, value: object) -> None:
    """Give the module this attribute of its own again, or, with None, take away the one it has."""
    if value is None:
        delattr(module, name)
    else:
        setattr(module, name, value)


def unparametrize(module: nn.Module, name: str, order: list[str]) -> None:
    """Make the parameter plain again, in its old place among the module's."""
    # torch keeps the computed parameter on a class of the module's own and takes it from there; deep copies share that
    # class, so this module gets its own first.
    shared = type(module)
    module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    for other in order:
        if other in module._parameters:
            module._parameters[other] = module._parameters.pop(other)


def write_computed(parameter: nn.Parameter, child: nn.Module) -> None:
    parameter.data.copy_(child(parameter).detach())


def copy_back(parameter: nn.Parameter, original: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(original)


def puts_back(undo: Callable[[], None], parameter: nn.Parameter) -> TypeGuard[partial[None]]:
    return isinstance(undo, partial) and undo.func is copy_back and undo.args[0] is parameter


def restore(function: Callable[[], None]) -> None:
    function()


def restores(undo: Callable[[], None]) -> bool:
    """Whether this undo step puts old values back, which a merge must not do."""
    return isinstance(undo, partial) and undo.func in (copy_back, put_module, restore)
