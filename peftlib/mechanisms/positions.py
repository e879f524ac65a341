"""Positions of the text behind trained vectors: counting them in, and not running out of them."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from peftlib.errors import UnsupportedError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.outputs import Args, Kwargs


def names(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's parameters in the order of its forward."""
    return tuple(inspect.signature(module.forward).parameters)


def by_name(order: tuple[str, ...], args: Args, kwargs: Kwargs) -> Kwargs:
    """A call's arguments by name."""
    return {**dict(zip(order, args, strict=False)), **kwargs}


def past_length(call: Kwargs) -> int:
    """Positions that the call's cache holds already."""
    cache = call.get("past_key_values")
    return 0 if cache is None else cache.get_seq_length()


def refuse_packed(call: Kwargs, why: str) -> None:
    """Raise UnsupportedError for several texts in a row, whose ``position_ids`` start anew; ``why`` says what stands
    against them. In a compiled graph it is a RuntimeError."""
    message = (
        f"{why}, and position_ids that start anew pack several into it; give each text a row of its own "
        "(packing=False, or a collator that pads)"
    )
    if call.get("cu_seq_lens_q") is not None:
        raise UnsupportedError(message)
    positions = call.get("position_ids")
    if positions is None or call.get("attention_mask") is not None or call.get("past_key_values") is not None:
        return
    goes_on = (positions.diff(dim=-1) == 1).all()
    if torch.compiler.is_compiling():
        torch._assert_async(goes_on, message)
    elif not goes_on:
        raise UnsupportedError(message)


def check_length(tokens: int, extra: int, limit: int | None) -> None:
    """Raise UnsupportedError when ``tokens`` and ``extra`` trained positions exceed the backbone's ``limit``."""
    if limit is not None and tokens + extra > limit:
        raise UnsupportedError(
            f"an input of {tokens} tokens and {extra} trained positions need {tokens + extra} positions; this backbone "
            f"has {limit}. "
            + (f"Cut the input to {limit - extra} tokens or choose a smaller length." if limit > extra else "")
            + ("" if limit > extra else f"Choose a length below {limit}.")
        )


def count_from_text(host: Host) -> None:
    """Let a decoder with rotary positions count those of a row that is padded on the left from its first token, where a
    call names none. Among themselves tokens are as far apart either way; from trained keys or vectors they are not."""
    parts = host.anatomy
    if parts.max_length is None and parts.position_module() is not None:
        stack = parts.stack_inputs(parts.stacks[0])
        host.hook(stack, _count_from_text, names(stack), before=True)


def _count_from_text(
    order: tuple[str, ...], module: nn.Module, args: Args, kwargs: Kwargs
) -> tuple[Args, Kwargs] | None:
    call = by_name(order, args, kwargs)
    mask, ids = call.get("attention_mask"), call.get("input_ids")
    if mask is None or mask.dim() != 2 or call.get("position_ids") is not None:
        return None
    tokens = (call["inputs_embeds"] if ids is None else ids).shape[1]
    place = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)  # (b, past + t)
    counted = (mask.long().cumsum(-1) - 1).clamp(min=0)  # (b, past + t)
    call["position_ids"] = torch.where(mask[:, :1] == 0, counted, place)[:, -tokens:]  # (b, t)
    return (), call


def shift(host: Host, length: int) -> None:
    """Let the text of a one-stack backbone stand at the positions after ``length`` others. Backbones with relative
    positions or two stacks stay as they are. An input that leaves too few positions is an UnsupportedError."""
    parts = host.anatomy
    module = parts.position_module()
    if module is None:
        return
    host.hook(module, _shift, length, before=True)
    if parts.max_length is not None:
        stack = parts.stack_inputs(parts.stacks[0])
        host.hook(stack, _check, names(stack), length, parts.max_length, before=True)


def _shift(length: int, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": kwargs["position_ids"] + length}
    *others, ids = args
    return (*others, ids + length), kwargs


def _check(order: tuple[str, ...], length: int, limit: int, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
    call = by_name(order, args, kwargs)
    given: torch.Tensor | None = call.get("input_ids")
    tokens = (call["inputs_embeds"] if given is None else given).shape[1]
    check_length(past_length(call) + tokens, length, limit)
