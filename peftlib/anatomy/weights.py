"""What the weight of a linear map is, however its module keeps it.

A plain module keeps floating-point numbers that can be read and written. One of a quantized backbone keeps them packed:
in integers with scales beside them (bitsandbytes), in a tensor class of their own (torchao), or in other tensors than
``weight`` (GPTQ, AWQ, HQQ). One that accelerate offloads has them elsewhere, and its own on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from peftlib.errors import MergeError, UnsupportedError

PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes of weights that can be read and written as they are."""

WAY_OUT = (
    "Load the backbone unquantized, or choose a method that leaves its weights as they are (lora, ia3, bitfit, "
    "sequential_adapter, prefix_tuning, ...)."
)

_written: ContextVar[tuple[torch.dtype, list[nn.Module]] | None] = ContextVar("_written", default=None)


def packed(module: nn.Module) -> str | None:
    """The form in which the module keeps its weight, where that is not plain numbers; None where it is."""
    weight = module._parameters.get("weight")
    if weight is None:
        if not hasattr(module, "in_features") or parametrize.is_parametrized(module, "weight"):
            return None
        own = (*module._parameters.values(), *module._buffers.values())
        holds = hasattr(module, "dequantize") or any(t is not None and t.dtype not in PLAIN for t in own)
        return type(module).__name__ if holds else None
    if is_packed(weight):
        return type(weight).__name__ if type(weight) is not nn.Parameter else str(weight.dtype).removeprefix("torch.")
    size = getattr(module, "in_features", None)
    return type(module).__name__ if size is not None and weight.numel() != size * module.out_features else None


def is_packed(tensor: torch.Tensor) -> bool:
    """Whether these are codes, not the numbers that they stand for."""
    return tensor.dtype not in PLAIN or getattr(type(tensor), "dequantize", None) is not torch.Tensor.dequantize


def of(module: nn.Module) -> torch.Tensor:
    """The (out, in) weight: a view of a plain one, else a copy. While :func:`written` is on, the module is unpacked
    first, so that it is always a view."""
    if packed(module) is not None:
        writing = _written.get()
        if writing is None:
            return dequantized(module)
        unpack(module)
    elif offloaded(module):
        if _written.get() is not None:
            raise MergeError(
                f"the weight of a {type(module).__name__} is offloaded, so nothing can be merged into it; save() the "
                "adapter, load the backbone without offload, load() the adapter there and merge"
            )
        return onloaded(module, "weight")
    weight = cast(torch.Tensor, module.weight)  # a parametrized one is no parameter
    return weight.T if transposed(module) else weight


def transposed(module: nn.Module) -> bool:
    """Whether the module stores its weight as (in, out), as transformers' Conv1D does."""
    # A parametrized module has a class of its own, below the one that it had.
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)


def dequantized(module: nn.Module) -> torch.Tensor:
    """The (out, in) numbers that a packed weight stands for.

    Raises UnsupportedError for a form that keeps them to itself.
    """
    map_: Any = module
    weight = module._parameters.get("weight")
    found: torch.Tensor | None = None
    if hasattr(module, "dequantize"):
        found = map_.dequantize()
    elif type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        module.state_dict()  # takes back the order of codes that its CPU kernel wants
        found = dequantize_4bit(map_.weight.data, map_.weight.quant_state)
    elif type(weight).__name__ == "Int8Params":
        scales = map_.state.SCB if map_.weight.SCB is None else map_.weight.SCB
        found = map_.weight.data.float() * (scales.float() / 127)[:, None]
    elif weight is not None and is_packed(weight) and type(weight) is not nn.Parameter:
        found = weight.dequantize()
    if found is None or found.shape != (map_.out_features, map_.in_features):
        raise UnsupportedError(
            f"the weight of a {type(module).__name__} is kept as {packed(module)}, which peftlib cannot read. {WAY_OUT}"
        )
    return found.detach()


def dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype of the weight before it was packed, where the module knows it."""
    map_: Any = module
    weight = module._parameters.get("weight")
    if (state := getattr(weight, "quant_state", None)) is not None:
        return getattr(state, "original_dtype", state.dtype)
    if isinstance(weight, torch.Tensor):
        return weight.dtype if weight.dtype in PLAIN else default
    return getattr(map_, "dtype", default)


def unpack(module: nn.Module, weight: torch.Tensor | None = None) -> None:
    """Make a packed map a plain one, in its place: an nn.Linear or, where it was one, a Conv1D, with the same bias,
    hooks and children and this (out, in) weight, by default its own."""
    default, unpacked = _written.get() or (torch.float32, [])
    kind = getattr(module, "source_cls", nn.Linear)
    values = dequantized(module) if weight is None else weight
    values = values.to(dtype(module, default))
    old: Any = module
    before = dict(vars(module))
    bias = old.bias
    if bias is not None and not isinstance(bias, nn.Parameter):
        bias = nn.Parameter(bias, requires_grad=False)
    sizes = {"nf": old.out_features, "nx": old.in_features}
    if kind is not Conv1D:
        sizes = {"in_features": old.in_features, "out_features": old.out_features}
    kept = {k: v for k, v in before.items() if k[0] == "_" and k not in ("_parameters", "_buffers", "_modules")}
    if "_hf_hook" in kept:
        kept |= {"forward": before["forward"], "_old_forward": MethodType(kind.forward, module)}
    module.__class__ = kind
    vars(module).clear()
    vars(module).update(vars(nn.Module()) | before.get("attributes", sizes) | kept)
    module.training = before["training"]
    values = values.T.contiguous() if kind is Conv1D else values
    module._parameters["weight"] = nn.Parameter(values, requires_grad=False)
    module._parameters["bias"] = bias
    module._modules.update((n, child) for n, child in before["_modules"].items() if n != "quantized")
    unpacked.append(module)


@contextmanager
def written(default: torch.dtype) -> Iterator[list[nn.Module]]:
    """Inside ``with``, packed weights become plain ones as soon as they are asked for, of their former dtype or, where
    that is not known, of ``default``. Gives the modules to which that happened."""
    unpacked: list[nn.Module] = []
    token = _written.set((default, unpacked))
    try:
        yield unpacked
    finally:
        _written.reset(token)


# Offloaded weights


def offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the module's weights elsewhere and brings them for its forward."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False))


def onloaded(module: nn.Module, name: str) -> torch.Tensor:
    """A copy of an offloaded parameter on the device where the module computes; a weight is (out, in)."""
    from accelerate.utils import align_module_device

    with align_module_device(module):
        values = module.get_parameter(name).detach().clone()
    return values.T if name == "weight" and transposed(module) else values


def device(module: nn.Module) -> torch.device | None:
    """Where the module computes: that of its own tensors or, where these are offloaded, where they are brought; None
    for one without tensors."""
    tensor = next((t for t in (*module.parameters(), *module.buffers())), None)
    if tensor is None:
        return None
    if tensor.is_meta:
        hooks = (getattr(m, "_hf_hook", None) for m in module.modules())
        brought = (getattr(hook, "execution_device", None) for hook in hooks)
        return torch.device(next((device for device in brought if device is not None), tensor.device))
    return tensor.device


# Counting


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter; a packed one has that of the plain one in its place."""
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if packed(module) is not None and hasattr(module, "in_features"):
            prefix = f"{name}." if name else ""
            for own in module._parameters:
                if own != "bias":
                    found.pop(prefix + own, None)
            shape = (module.out_features, module.in_features)
            found[f"{prefix}weight"] = shape[::-1] if getattr(module, "source_cls", None) is Conv1D else shape
            if getattr(module, "bias", None) is not None:
                found[f"{prefix}bias"] = (module.out_features,)
    return found


def count(model: nn.Module) -> int:
    """How many parameters the model has, however they are kept."""
    return sum(torch.Size(shape).numel() for shape in shapes(model).values())
