"""The steps that take a change back. They are module-level functions, put off by ``functools.partial`` with modules and
tensors as arguments, so that a deep copy of a model undoes its own changes and not the original's.

Beside each stands how its change is suspended, with the same arguments, and taken up again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from peftlib.errors import StateError
from peftlib.mechanisms.call import Handle, Place

Step = Callable[[], None]
_SUSPENSIONS: dict[Callable[..., None], Callable[..., Step]] = {}


def suspends(undo: Callable[..., None]) -> Callable[[Callable[..., Step]], Callable[..., Step]]:
    """Declare a function ``f(model, *arguments of undo)`` as what suspends the change that ``undo`` takes back; it
    gives what takes the change up again."""

    def declare(function: Callable[..., Step]) -> Callable[..., Step]:
        _SUSPENSIONS[undo] = function
        return function

    return declare


def suspend(model: nn.Module, undo: Step) -> Step:
    """Suspend the change that this step takes back; gives what takes it up again. Raises StateError for a step whose
    change cannot be suspended."""
    step: Any = undo
    if isinstance(step, partial) and step.func is restore:
        (step,) = step.args
    function = _SUSPENSIONS.get(getattr(step, "func", None))  # type: ignore[arg-type]  # None is no key
    if function is None:
        raise StateError(f"one of its changes can be taken back, and not suspended ({step}); detach() the method")
    return function(model, *step.args)


def nothing() -> None:
    pass


def unhook(handle: Handle, stays: bool = False) -> None:
    """Remove a hook; one that ``stays`` only reads or names what is there, and is not suspended."""
    handle.remove()


@suspends(unhook)
def _suspend_hook(model: nn.Module, handle: RemovableHandle | Place, stays: bool = False) -> Step:
    if stays:
        return nothing
    if isinstance(handle, Place):
        return handle.suspend(_no_hook)
    hooks = handle.hooks_dict_ref()
    if hooks is None or handle.id not in hooks:
        return nothing
    function, hooks[handle.id] = hooks[handle.id], _no_hook  # in its place, so that the order stays
    return partial(hooks.__setitem__, handle.id, function)


def _no_hook(*_: Any) -> None:
    pass


def name_of(module: nn.Module, child: nn.Module) -> str:
    """The child's name in the module."""
    return next(name for name, candidate in module.named_children() if candidate is child)


def take_out(module: nn.Module, name: str) -> None:
    del module._modules[name]


@suspends(take_out)
def _leave_in(model: nn.Module, module: nn.Module, name: str) -> Step:
    return nothing  # a child does nothing by itself


def put_module(owner: nn.Module, name: str, module: nn.Module) -> None:
    present = owner.get_submodule(name)
    device = next((tensor.device for tensor in (*present.parameters(), *present.buffers())), None)
    if device is not None:
        # A quantized map's weight has the dtype that it would have; the model may have got another since.
        weight = getattr(present, "weight", None)
        module.to(device, None if weight is None else weight.dtype)
    owner._modules[name] = module.train(present.training)


@suspends(put_module)
def _suspend_module(model: nn.Module, owner: nn.Module, name: str, module: nn.Module) -> Step:
    present = owner.get_submodule(name)
    waiting = [(parameter, parameter.data) for parameter in module.parameters()]
    put_module(owner, name, module)
    return partial(_resume_module, owner, name, present, waiting)


def _resume_module(
    owner: nn.Module, name: str, module: nn.Module, waiting: list[tuple[nn.Parameter, torch.Tensor]]
) -> None:
    owner._modules[name] = module.train(owner.get_submodule(name).training)
    for parameter, data in waiting:
        parameter.data = data


def put_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    present = module.get_parameter(name)
    parameter.data = parameter.data.to(present.device, present.dtype)
    module._parameters[name] = parameter


@suspends(put_parameter)
def _suspend_parameter(model: nn.Module, module: nn.Module, name: str, parameter: nn.Parameter) -> Step:
    present = module.get_parameter(name)
    module._parameters[name] = nn.Parameter(parameter.to(present.device, present.dtype), requires_grad=False)
    return partial(module._parameters.__setitem__, name, present)


@suspends(setattr)
def _suspend_attribute(model: nn.Module, module: nn.Module, name: str, value: object) -> Step:
    present = getattr(module, name)
    setattr(module, name, value)
    return partial(setattr, module, name, present)


def put_attribute(module: nn.Module, name: str, value: object, stays: bool = False) -> None:
    """Give the module this attribute of its own again, or, with None, take away the one it has. One that ``stays`` is
    not suspended."""
    if value is None:
        delattr(module, name)
    else:
        setattr(module, name, value)


@suspends(put_attribute)
def _suspend_own_attribute(model: nn.Module, module: nn.Module, name: str, value: object, stays: bool = False) -> Step:
    if stays:
        return nothing
    present = vars(module).get(name)
    put_attribute(module, name, value)
    return partial(setattr, module, name, present)


def unparametrize(module: nn.Module, name: str, order: list[str]) -> None:
    """Make the parameter plain again, in its old place among the module's; nothing where it never ceased to be."""
    if not parametrize.is_parametrized(module, name):
        return
    # torch keeps the computed parameter on a class of the module's own and takes it from there; deep copies share that
    # class, so this module gets its own first.
    shared = type(module)
    module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    for other in order:
        if other in module._parameters:
            module._parameters[other] = module._parameters.pop(other)


@suspends(unparametrize)
def _suspend_computation(model: nn.Module, module: nn.Module, name: str, order: list[str]) -> Step:
    children = list(module.parametrizations[name])  # type: ignore[index]  # a dict of module lists
    for child in children:
        child.forward = _unchanged
    return partial(_resume_computation, children)


def _unchanged(parameter: torch.Tensor) -> torch.Tensor:
    return parameter


def _resume_computation(children: list[nn.Module]) -> None:
    for child in children:  # tied weights share them
        vars(child).pop("forward", None)


def write_computed(parameter: nn.Parameter, child: nn.Module) -> None:
    parameter.data.copy_(child(parameter).detach())


def copy_back(parameter: nn.Parameter, original: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(original)


@suspends(copy_back)
def _suspend_values(model: nn.Module, parameter: nn.Parameter, original: torch.Tensor) -> Step:
    # Another parameter takes its place: its own values may be part of a graph that waits for its backward pass.
    places = [(m, n) for m in model.modules() for n, p in m._parameters.items() if p is parameter]
    before = nn.Parameter(original.to(parameter.device), requires_grad=False)
    for module, name in places:
        module._parameters[name] = before
    return partial(_resume_values, places, parameter)


def _resume_values(places: list[tuple[nn.Module, str]], parameter: nn.Parameter) -> None:
    for module, name in places:
        module._parameters[name] = parameter


def makes_plain(undo: Callable[[], None]) -> bool:
    return isinstance(undo, partial) and undo.func is unparametrize


def puts_back(undo: Callable[[], None], parameter: nn.Parameter) -> TypeGuard[partial[None]]:
    return isinstance(undo, partial) and undo.func is copy_back and undo.args[0] is parameter


def restore(function: Callable[[], None]) -> None:
    function()


def restores(undo: Callable[[], None]) -> bool:
    """Whether this undo step puts old values back, which a merge must not do."""
    return isinstance(undo, partial) and undo.func in (copy_back, put_module, restore)


def restores_values(undo: Callable[[], None]) -> bool:
    return isinstance(undo, partial) and undo.func is copy_back


def is_around(undo: Callable[[], None], model: nn.Module) -> bool:
    """Whether the change is a hook or an attribute of the whole model, not inside of it, or a hook that only reads."""
    if not isinstance(undo, partial):
        return False
    if undo.func is unhook:
        handle, stays = undo.args
        if stays:
            return True
        if isinstance(handle, Place):
            return handle.forward.module is model
        return any(handle.hooks_dict_ref() is own for own in vars(model).values())
    return undo.func is put_attribute
