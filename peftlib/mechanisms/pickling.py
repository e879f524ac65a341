"""Pickles of modules with parametrized tensors, as ``torch.save(model)`` makes them.

torch gives such a module a class of its own, which pickle cannot find by its name, and refuses. What it is made from
can be found: the class from before, and the module's attributes.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize


def allow(module: nn.Module) -> None:
    """Let a parametrized module be pickled."""
    type(module).__reduce_ex__ = _reduce  # type: ignore[method-assign, assignment]  # the class is this module's own


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    plain = type(module).__bases__[0]
    return plain.__new__, (plain,), dict(vars(module)), None, None, _fill


def _fill(module: nn.Module, attributes: dict[str, Any]) -> None:
    vars(module).update(attributes)
    parametrize._inject_new_class(module)
    for name in attributes["_modules"]["parametrizations"]:
        parametrize._inject_property(module, name)
    allow(module)
