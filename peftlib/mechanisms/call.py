"""One call of a model: what acts around a forward, and what one part of a call leaves for a later one.

Forward hooks do not act where a program calls ``model.forward(...)`` itself. :func:`around` gives a model a
:class:`Forward`, whose functions act either way, and however the call ends.

What a call leaves for its later parts is kept in a :class:`Local`: every thread has its own, and so does a copy of the
model. A backward pass on an accelerator runs in threads of its own, where gradient checkpointing repeats a part of the
forward; what such a part reads is kept in a :class:`Kept`.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from peftlib.errors import StateError


class Local(threading.local):
    """State of a call, which begins in every thread as ``__init__`` says. Copies and pickles begin anew."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class Handed(Local):
    """One ``value`` that a hook hands to a later one of the same call, which takes it."""

    def __init__(self) -> None:
        self.value: Any = None

    def take(self) -> Any:
        value, self.value = self.value, None
        return value


class Kept:
    """A ``value`` that a call sets at its begin and that its parts read, also where a backward pass repeats them."""

    def __init__(self) -> None:
        self._here = Handed()
        self._by_thread: dict[int, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def set(self, value: Any) -> None:
        self._here.value = (value,)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._by_thread[threading.get_ident()] = value

    def get(self) -> Any:
        """This thread's value, None before the first. In a backward pass in a thread of its own, that of the thread
        that trains; StateError where several do."""
        if self._here.value is not None:
            return self._here.value[0]
        if not in_backward() or not self._by_thread:
            return None
        if len(self._by_thread) > 1:
            raise StateError(
                f"{len(self._by_thread)} threads have trained this model, and gradient checkpointing repeats a layer "
                "without knowing for which; switch gradient checkpointing off, or train in one thread (with several "
                "devices, by torch's DistributedDataParallel)"
            )
        return next(iter(self._by_thread.values()))


def in_backward() -> bool:
    """Whether a backward pass runs in this thread, which repeats a part of a forward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Forward:
    """In the place of a module's ``forward``: functions before, behind and at the end of it.

    ``before`` get ``(module, args, kwargs)`` and give new ones or None; ``behind`` get the output too, and give a new
    one or None, as torch's hooks do; ``leaving`` get the module, also where the forward raises.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.own: Callable[..., Any] | None = vars(module).get("forward")  # another library's, as accelerate's
        self.before: list[Callable[..., Any]] = []
        self.behind: list[Callable[..., Any]] = []
        self.leaving: list[Callable[..., Any]] = []
        self.inputs: tuple[str, ...] = ()
        """Names that the functions take by keyword, beside the module's own."""
        self.refusal: str | None = None
        """Why torch's DataParallel cannot copy the module; None: it can."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.module, args, kwargs)

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            for function in self.before:
                changed = function(module, args, kwargs)
                if changed is not None:
                    args, kwargs = changed
            output = self.plain(module, args, kwargs)
            for function in self.behind:
                changed = function(module, args, kwargs, output)
                if changed is not None:
                    output = changed
            return output
        finally:
            for function in self.leaving:
                function(module)

    def plain(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward without the functions."""
        return type(module).forward(module, *args, **kwargs) if self.own is None else self.own(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.own or partial(type(self.module).forward, self.module))
        *others, last = signature.parameters.values()
        more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in self.inputs]
        named = [*others, *more, last] if last.kind is inspect.Parameter.VAR_KEYWORD else [*others, last, *more]
        return signature.replace(parameters=named)

    @property
    def __func__(self) -> Unbound:
        """As a bound method has it; accelerate wraps this one."""
        return Unbound(self)

    def replicate(self) -> nn.Module:
        """In the place of ``module._replicate_for_data_parallel()``: a replica whose forward is its own."""
        if self.refusal is not None:
            raise StateError(self.refusal)
        replica = type(self.module)._replicate_for_data_parallel(self.module)
        forward = Forward.__new__(Forward)
        vars(forward).update(vars(self) | {"module": replica})
        vars(replica).update(forward=forward, peftlib_forward=forward)
        return replica


class Unbound:
    """A :class:`Forward` as a function of the module and its inputs."""

    def __init__(self, forward: Forward):
        self._forward = forward
        mine = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        signature = forward.__signature__
        self.__signature__ = signature.replace(parameters=[mine, *signature.parameters.values()])

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._forward.run(module, args, kwargs)


def around(module: nn.Module) -> Forward:
    """The module's :class:`Forward`, made when there is none."""
    present = vars(module).get("peftlib_forward")  # another library may have wrapped it
    if present is not None:
        return present
    forward = Forward(module)
    vars(module).update(forward=forward, peftlib_forward=forward, _replicate_for_data_parallel=forward.replicate)
    return forward


def plainly(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The module's forward without the functions around it."""
    present = vars(module).get("peftlib_forward")
    return module.forward(*args, **kwargs) if present is None else present.plain(module, args, kwargs)


class Handle(Protocol):
    """What takes a hook away again."""

    def remove(self) -> None: ...


class Place:
    """That of one function among those around a forward."""

    def __init__(self, forward: Forward, functions: list[Callable[..., Any]], function: Callable[..., Any]):
        self.forward, self.functions, self.function = forward, functions, function
        functions.append(function)

    def suspend(self, instead: Callable[..., Any]) -> Callable[[], None]:
        """Put another function there; gives what puts this one back."""
        at = next(i for i, function in enumerate(self.functions) if function is self.function)
        self.functions[at] = instead
        return partial(self.functions.__setitem__, at, self.function)

    def remove(self) -> None:
        """Take the function away, and with the last one the :class:`Forward`, unless another library has wrapped it."""
        self.functions[:] = [f for f in self.functions if f is not self.function]
        forward, own = self.forward, vars(self.forward.module)
        if own.get("forward") is not forward or forward.before or forward.behind or forward.leaving:
            return
        del own["forward"], own["peftlib_forward"], own["_replicate_for_data_parallel"]
        if forward.own is not None:
            own["forward"] = forward.own
