"""The state dict of a model with a method attached, as torch, accelerate and transformers' Trainer write and read it.

A tensor that several children share has one name in it, as files without pickle want it, and empty ones have none; both
are found again when a state is loaded. A state of another method, or of the same with other options, is refused, also
by a ``load_state_dict(strict=False)``, which would leave out what does not fit. A state of the backbone alone passes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from peftlib.errors import LoadError
from peftlib.mechanisms.host import Host

State = dict[str, torch.Tensor]


def look_after(host: Host) -> None:
    """Write and read the state dict of the host's model that way, until the method leaves."""
    host._hook(host.model.register_state_dict_post_hook(partial(_write, host)), stays=True)
    host._hook(host.model.register_load_state_dict_pre_hook(partial(_read, host)), stays=True)


def _own(host: Host) -> set[int]:
    """The ids of the tensors in the children."""
    return {id(t) for child in host.paths().values() for t in (*child.parameters(), *child.buffers())}


def _tensors(model: nn.Module) -> State:
    """All parameters and persistent buffers under all their names."""
    tensors = {}
    for path, module in model.named_modules(remove_duplicate=False):
        lasting = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        found = (*module._parameters.items(), *lasting.items())
        tensors.update({f"{path}.{n}" if path else n: t for n, t in found if t is not None})
    return tensors


def _again(host: Host) -> dict[str, str | None]:
    """The names that the state dict leaves out: of a tensor of the children that has another one, which is given, and
    of those without elements."""
    own, first, again = _own(host), dict[int, str](), dict[str, str | None]()
    for name, tensor in _tensors(host.model).items():
        if not tensor.numel():
            again[name] = None
        elif id(tensor) in own and first.setdefault(id(tensor), name) != name:
            again[name] = first[id(tensor)]
    return again


def _write(host: Host, module: nn.Module, state: State, prefix: str, metadata: dict[str, Any]) -> None:
    for name in _again(host):
        state.pop(prefix + name, None)


def _read(host: Host, module: nn.Module, state: State, prefix: str, *_: Any) -> None:
    given = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    again = _again(host)
    _check(host, given, again)
    mine = _tensors(module)
    for name, first in again.items():
        if first is None:
            state.setdefault(prefix + name, mine[name])
        elif first in given:
            state.setdefault(prefix + name, given[first])


def _check(host: Host, given: State, again: dict[str, str | None]) -> None:
    """Raise LoadError for a state that is neither the backbone's alone nor that of this method with these options."""
    own, tensors = _own(host), _tensors(host.model)
    mine = {n: t for n, t in tensors.items() if id(t) in own and n not in again}
    lost = sorted(mine.keys() - given.keys())
    foreign = sorted(name for name in given.keys() - tensors.keys() if _is_hung(host, name))
    shapes = [n for n in mine.keys() & given.keys() if mine[n].shape != given[n].shape]
    if shapes:
        name = min(shapes)
        what = f"{name} has shape {tuple(given[name].shape)} in it and {tuple(mine[name].shape)} here"
    elif foreign or (lost and len(lost) < len(mine)):
        differences = {
            "it has {} tensors that this model has not ({})": foreign,
            "it lacks {} of this model's ({})": lost,
        }
        what = " and ".join(text.format(len(names), names[0]) for text, names in differences.items() if names)
    else:
        return
    raise LoadError(
        f"this state is of another method than the one attached, or of other options: {what}. Attach what it was made "
        "with (calibrate() first where that is needed), or train anew instead of resuming"
    )


def _is_hung(host: Host, name: str) -> bool:
    """Whether a name that the model does not have is that of something on one of its layers or its parametrized or
    other maps, and not of another head."""
    path = name.rpartition(".")[0]
    modules = dict(host.model.named_modules())
    while path and path not in modules:
        path = path.rpartition(".")[0]
    if not path:
        return False
    inside = any(path == layer.path or path.startswith(f"{layer.path}.") for layer in host.anatomy.layers)
    return inside or bool(modules[path]._parameters)
