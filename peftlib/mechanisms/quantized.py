"""Frozen weights in 4 or 2 bits: NormalFloat codes with scales, and a linear map that computes from a quantized weight.

Source: Dettmers et al. 2023, arXiv:2305.14314 (NF4 and double quantization); Dettmers et al. 2022, arXiv:2110.02861
(the 8-bit dynamic data type of the scales). The layout of 4-bit NormalFloat in memory is that of bitsandbytes, whose
kernel dequantizes on CUDA where it is installed; everything here also runs without it, on any device.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftlib.anatomy import weights
from peftlib.errors import UnsupportedError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.precision import autocasts, without_autocast

BLOCK, SCALE_BLOCK = 64, 256
"""Weights that share a scale, and scales that share a scale of their own."""

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The sixteen levels of 4-bit NormalFloat: quantiles of N(0, 1) scaled to [-1, 1], with an exact zero."""

NF2 = (-1.0, 0.0, 0.33791524171829224, 1.0)
"""The four levels of 2-bit NormalFloat, by the same rule."""

NORMAL_FLOAT = {4: NF4, 2: NF2}


@functools.cache
def dynamic_levels() -> list[float]:
    """The 256 levels of the signed 8-bit dynamic type: seven decades, each with twice the levels of the one below."""
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, device="cpu")
        centres = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        found += [*centres.tolist(), *(-centres).tolist()]
    return sorted(found)


def quantize(values: torch.Tensor, levels: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (n,) uint8 and scales (ceil(n / block),) float32 of a tensor with n entries.

    Each block is divided by its largest magnitude, its scale; an entry's code is the nearest of the sorted ``levels``.
    """
    flat = values.reshape(-1).float()  # (n,)
    padded = F.pad(flat, (0, -len(flat) % block)).view(-1, block)  # (n,) -> (blocks, block)
    scales = padded.abs().amax(dim=1)  # (blocks, block) -> (blocks,)
    unit = (padded * (1 / scales.clamp(min=1e-38))[:, None]).clamp(-1, 1)  # (blocks, block)
    codes = torch.bucketize(unit, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)  # (blocks, block)
    return codes.view(-1)[: len(flat)], scales  # (n,), (blocks,)


def dequantize(values: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    """Levels (n,) that were looked up by their codes, times the scale of each block."""
    short = -len(values) % block
    padded = F.pad(values, (0, short)) if short else values
    return (padded.view(-1, block) * scales[:, None]).view(-1)[: len(values)]  # -> (blocks, block) -> (n,)


class NormalFloatWeight(nn.Module):
    """An (out, in) weight as NormalFloat codes with a scale for every block of 64: about 4.127 bits an entry with four
    bits and ``double`` quantization, which keeps the scales in 8 bits too; 4.5 without.

    Buffers: ``codes`` (ceil(n bits / 8),) uint8, the first entry in the high bits; ``scale_codes`` (ceil(n / 64),)
    uint8, empty without ``double``; ``scales``: the blocks', or with ``double`` a scale for every 256 scales, and last
    the mean that was subtracted from them. ``like`` is empty and has the dtype that the weight would have. ``scales``
    and the two tables of levels are float32, kept as integers so that ``model.to(dtype)`` leaves them alone.
    """

    table: torch.Tensor
    codes: torch.Tensor
    dynamic: torch.Tensor
    scale_codes: torch.Tensor
    scales: torch.Tensor
    like: torch.Tensor

    def __init__(self, weight: torch.Tensor, bits: int = 4, double: bool = True):
        super().__init__()
        self.shape, self.bits, self.double_quantized = weight.shape, bits, double
        levels = torch.tensor(NORMAL_FLOAT[bits], dtype=torch.float32, device=weight.device)
        self.register_buffer("table", lookup(levels), persistent=False)
        codes, scales = quantize(weight.detach(), levels, BLOCK)
        self.register_buffer("codes", pack(codes, bits, fill=NORMAL_FLOAT[bits].index(0.0)))
        scale_codes = codes.new_empty(0)
        if double:
            dynamic = torch.tensor(dynamic_levels(), dtype=torch.float32, device=weight.device)
            self.register_buffer("dynamic", dynamic.view(torch.int32), persistent=False)
            mean = scales.mean()
            scale_codes, outer = quantize(scales - mean, dynamic, SCALE_BLOCK)
            scale_codes = scale_codes.clone()  # a file without pickle wants a tensor's whole storage
            scales = torch.cat([outer, mean[None]])
        self.register_buffer("scale_codes", scale_codes)
        self.register_buffer("scales", scales.view(torch.int32))
        self.register_buffer("like", weight.detach().new_empty(0), persistent=False)

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes; the two tables of levels are not counted."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale_codes, self.scales))

    def block_scales(self) -> torch.Tensor:
        """The scales of the weight's blocks, (ceil(n / 64),) float32."""
        scales = self.scales.view(torch.float32)
        if not self.double_quantized:
            return scales
        units = self.dynamic.index_select(0, self.scale_codes.int()).view(torch.float32)
        return dequantize(units, scales[:-1], SCALE_BLOCK) + scales[-1]

    def forward(self, dtype: torch.dtype) -> torch.Tensor:
        """The (out, in) weight, computed in float32 and rounded once to ``dtype``."""
        fast = self.bits == 4 and FAST and dtype in (torch.float32, torch.bfloat16, torch.float16)
        if self.codes.is_cuda and fast:
            return _kernel(self.codes, self.block_scales(), self.shape, dtype)
        values = unpack(self.codes, self.table)[: math.prod(self.shape)]  # (out in,)
        return dequantize(values, self.block_scales(), BLOCK).view(self.shape).to(dtype)  # (out in,) -> (out, in)


class UniformWeight(nn.Module):
    """An (out, in) weight as integers with one scale and one offset, ``W = s c + beta``, codes c from 0 to 2^bits - 1:
    even levels from the smallest to the largest entry, after entries were cut off at ``deviations`` standard deviations
    from their mean.

    Buffers: ``codes`` c (ceil(n bits / 8),) uint8, the first entry in the high bits; ``line``, s and beta, float32 kept
    as integers so that ``model.to(dtype)`` leaves them alone. ``like`` is empty and has the dtype that the weight would
    have.
    """

    table: torch.Tensor
    codes: torch.Tensor
    line: torch.Tensor
    like: torch.Tensor

    def __init__(self, weight: torch.Tensor, bits: int = 4, deviations: float = 2.0):
        super().__init__()
        self.shape, self.bits = weight.shape, bits
        W = weight.detach().double()  # (out, in)
        middle, reach = W.mean(), deviations * W.std()
        W = W.clamp(middle - reach, middle + reach)
        low, high = W.min(), W.max()
        scale = ((high - low) / (2**bits - 1)).clamp(min=1e-38)
        codes = ((W - low) / scale).round().clamp(0, 2**bits - 1)  # (out, in)
        levels = torch.arange(2**bits, dtype=torch.float32, device=weight.device)
        self.register_buffer("table", lookup(levels), persistent=False)
        self.register_buffer("codes", pack(codes.to(torch.uint8).flatten(), bits))
        self.register_buffer("line", torch.stack([scale, low]).float().view(torch.int32))
        self.register_buffer("like", weight.detach().new_empty(0), persistent=False)

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes; the table of levels is not counted."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.line))

    def forward(self, dtype: torch.dtype) -> torch.Tensor:
        """The (out, in) weight, computed in float32 or wider and rounded once to ``dtype``."""
        wide = torch.promote_types(dtype, torch.float32)
        c = unpack(self.codes, self.table)[: math.prod(self.shape)].to(wide)  # (out in,)
        scale, low = self.line.view(torch.float32).to(wide)
        return (scale * c + low).view(self.shape).to(dtype)  # (out in,) -> (out, in)


def pack(codes: torch.Tensor, bits: int, fill: int = 0) -> torch.Tensor:
    """Codes (n,) uint8 below 2^bits, several a byte, the first in the high bits; ``fill`` completes the last byte."""
    each = 8 // bits
    codes = F.pad(codes, (0, -len(codes) % each), value=fill).view(-1, each)
    packed = codes[:, 0]
    for i in range(1, each):
        packed = (packed << bits) | codes[:, i]
    return packed


def unpack(packed: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The levels, float32, of packed codes, by the table of :func:`lookup`."""
    return table.index_select(0, packed.int()).view(torch.float32).flatten()


def lookup(levels: torch.Tensor) -> torch.Tensor:
    """Byte -> the levels that it stands for: two float32 in the bytes of one int64, (256,), or four in two, (256, 2).
    That way they are looked up together, and ``model.to(dtype)`` leaves them alone."""
    bits = (len(levels) - 1).bit_length()
    bytes_ = torch.arange(256, device=levels.device)
    parts = [levels[(bytes_ >> shift) & (len(levels) - 1)] for shift in range(8 - bits, -1, -bits)]
    return torch.stack(parts, dim=1).view(torch.int64).squeeze(1)


FAST = importlib.util.find_spec("bitsandbytes") is not None
"""Whether bitsandbytes is installed: its kernel then dequantizes on CUDA."""


def _kernel(codes: torch.Tensor, scales: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    import bitsandbytes  # noqa: F401 - it registers the operator

    return torch.ops.bitsandbytes.dequantize_4bit(codes[:, None], scales, BLOCK, "nf4", list(shape), dtype)


class _Linear(torch.autograd.Function):
    """x W^T + b for a frozen W that is computed anew in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, weight: nn.Module) -> torch.Tensor:
        ctx.weight = weight
        return F.linear(x, weight(x.dtype), bias)  # (b, t, in) -> (b, t, out)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x = gradient @ ctx.weight(gradient.dtype) if ctx.needs_input_grad[0] else None  # (b, t, out) -> (b, t, in)
        bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None  # (b, t, out) -> (out,)
        return x, bias, None


class QuantizedLinear(nn.Module):
    """A linear map that keeps its weight quantized. It takes the place of an nn.Linear or a transformers Conv1D.

    Args:
        module: the map whose weight is quantized; its bias parameter moves over as it is.
        compute: the dtype of the product; None: bfloat16 on CUDA, elsewhere that of the input. Autocast overrides it.
        quantize: what keeps the (out, in) weight.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        module: nn.Module,
        compute: torch.dtype | None = None,
        quantize: Callable[[torch.Tensor], nn.Module] = NormalFloatWeight,
    ):
        super().__init__()
        if not isinstance(module, nn.Linear | Conv1D):
            raise UnsupportedError(
                f"only nn.Linear and transformers' Conv1D can be quantized, not {type(module).__name__}"
            )
        if (form := weights.packed(module)) is not None:
            raise UnsupportedError(
                f"the weight of a {type(module).__name__} is kept as {form} already; load the backbone unquantized, or "
                "attach lora, which trains beside it as it is"
            )
        self.source_cls = type(module)
        self.attributes = {k: v for k, v in vars(module).items() if k not in vars(nn.Module())}
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        self.out_features, self.in_features = weight.shape
        self.compute = compute
        self.quantized = quantize(weight)
        self.register_parameter("bias", module.bias)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weight would have."""
        return cast(torch.Tensor, self.quantized.like).dtype

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized (out, in) weight: a fresh tensor, so writing to it changes nothing."""
        return self.quantized(self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if autocasts(x):
            return self._product(x, torch.get_autocast_dtype(x.device.type))
        return self._product(x, self.compute or (torch.bfloat16 if x.is_cuda else x.dtype)).to(x.dtype)

    def _product(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Linear.apply(x.to(dtype), bias, self.quantized)

    def dequantize(self) -> torch.Tensor:
        """The dequantized (out, in) weight in float32 or wider, to compute a merged one from."""
        return self.quantized(torch.promote_types(self.dtype, torch.float32))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The names of the dtypes that a quantized map may compute in."""


def quantize_sites(
    host: Host,
    patterns: Sequence[str] | str,
    quantize: Callable[[torch.Tensor], nn.Module] = NormalFloatWeight,
    compute: str | None = None,
) -> dict[str, QuantizedLinear]:
    """Path -> quantized map, put in the place of every map that one of the site patterns names, if any."""
    dtype = None if compute is None else DTYPES.get(compute)
    modules: dict[str, QuantizedLinear] = {}
    for path in dict.fromkeys(site.path for site in host.anatomy.sites(patterns, optional=True)):
        module = QuantizedLinear(host.model.get_submodule(path), dtype, quantize)
        modules[path] = host.replace(path, module)
    return modules


@contextmanager
def written(host: Host) -> Iterator[None]:
    """Inside ``with``, the host's packed maps become plain ones as soon as their weights are asked for; the model's
    config then no longer says that these are quantized."""
    embedding = host.anatomy.embeddings.weight
    with weights.written(embedding.dtype) as unpacked, without_autocast(embedding):
        yield
    if unpacked:
        _say_plain(host.model)


def _say_plain(model: Any) -> None:
    """Let a transformers model say which of its linear maps are not quantized, so that it is saved and read as it is;
    one without any quantized map says nothing of quantization."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return
    maps = {n: m for n, m in model.named_modules() if hasattr(m, "in_features") or isinstance(m, Conv1D)}
    if any(weights.packed(m) for m in maps.values()):
        name = "llm_int8_skip_modules" if hasattr(config, "llm_int8_skip_modules") else "modules_to_not_convert"
        plain = [n for n, m in maps.items() if weights.packed(m) is None]
        setattr(config, name, sorted({*(getattr(config, name, None) or ()), *plain}))
    else:
        del model.config.quantization_config
        for name in ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"):
            vars(model).pop(name, None)
