r"""QA-LoRA: the update of a group-wise quantized weight is constant within a group, so it folds into the offsets.

.. math:: y = \tilde{W} x + \frac{\alpha}{r} B A \operatorname{pool}_g(x), \qquad
    \tilde{W}_{ij} = s_{i\gamma}\, c_{ij} + \beta_{i\gamma}, \quad \gamma = \lfloor j / g \rfloor

Shapes: codes c (out, in) of 4 or 2 bits, scales s and offsets beta (out, in / g) float32; pool_g is the mean of every g
inputs; A (r, in / g) starts Xavier-uniform, B (out, r) at zero, so the start is the quantized backbone, near the
original.
Trained: r (in / g + out) a matrix. The merge is exact into the quantized weight: codes and scales stay,
:math:`\beta \leftarrow \beta + \frac{\alpha}{r g} B A`, rounded once to float32. (The zero point of other conventions
is -beta / s: a float that moves by the update over s.)

``merge()`` leaves plain maps with the merged weight, in the dtype that they had, as with every other method; with
``keep_quantized`` it leaves the low-bit maps with new offsets. These compute without LoRA and without peftlib's hooks,
but are peftlib's modules: codes, scales and offsets are in the model's state dict.

Source: Xu et al. 2023, arXiv:2309.14717, and its code: groups of 32, alpha 16, rank 64, the mean as the pool (the
paper's listing sums), then dropout. As there, r may be above in / g: then A has more rows than its product can have
rank, which a model of few inputs meets at the defaults. Where we differ: the weight is rounded to the nearest of the
levels between a group's smallest and largest entry, without GPTQ's corrections from data; scales and offsets are
float32 (6 bits a weight together with 4-bit codes in groups of 32), and 3 bits are not offered. Files hold the factors
alone; loading quantizes the backbone again, with the same result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.anatomy import Site
from peftlib.errors import TargetError
from peftlib.mechanisms import low_rank
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import LowRank
from peftlib.mechanisms.precision import cast
from peftlib.mechanisms.quantized import DTYPES, QuantizedLinear, lookup, pack, quantize_sites, unpack
from peftlib.methods.base import MethodConfig, at_least, one_of
from peftlib.methods.bases.low_rank import QuantizedUpdates


@dataclass(frozen=True)
class QALoRAConfig(MethodConfig):
    """``rank`` r, ``alpha`` (the update is scaled by alpha / r), ``targets``, the maps that are quantized and adapted
    (site patterns), ``bits`` (4 or 2), ``group`` g of inputs, ``dropout`` on the pooled input, ``compute`` dtype of
    the frozen products (None: bfloat16 on CUDA, elsewhere the input's), ``keep_quantized`` through a merge."""

    rank: int = 64
    alpha: float = 16.0
    targets: tuple[str, ...] | str = "all-linear"
    bits: int = 4
    group: int = 32
    dropout: float = 0.0
    compute: str | None = None
    keep_quantized: bool = False

    def __post_init__(self):
        at_least("rank", self.rank, 1)
        at_least("group", self.group, 1)
        one_of("bits", self.bits, (2, 4))
        one_of("compute", self.compute, (None, *DTYPES))


class GroupWeight(nn.Module):
    """An (out, in) weight as integers with a scale and an offset for every group of inputs of every output:
    ``W = s c + beta``, codes c from 0 to 2^bits - 1.

    A group's largest and smallest entry are met exactly; in between it rounds to the nearest code. Buffers: ``codes`` c
    (ceil(n bits / 8),) uint8, the first entry in the high bits; ``scales`` s and ``offsets`` beta (out, in / g)
    float32, kept as integers so that ``model.to(dtype)`` leaves them alone. ``like`` is empty and has the dtype that
    the weight would have.
    """

    def __init__(self, weight: torch.Tensor, bits: int = 4, group: int = 32):
        super().__init__()
        rows, columns = self.shape = weight.shape
        self.bits, self.group = bits, group
        W = weight.detach().float().reshape(rows, columns // group, group)  # (out, in) -> (out, in / g, g)
        low, high = W.amin(dim=-1), W.amax(dim=-1)  # -> (out, in / g)
        scales = (high - low) / (2**bits - 1)  # (out, in / g)
        scales = torch.where(scales > 0, scales, torch.ones_like(scales))
        codes = ((W - low[..., None]) / scales[..., None]).round().clamp(0, 2**bits - 1)  # (out, in / g, g)
        levels = torch.arange(2**bits, dtype=torch.float32, device=weight.device)
        self.register_buffer("table", lookup(levels), persistent=False)
        self.register_buffer("codes", pack(codes.to(torch.uint8).flatten(), bits))
        self.register_buffer("scales", scales.view(torch.int32))
        self.register_buffer("offsets", low.contiguous().view(torch.int32))
        self.register_buffer("like", weight.detach().new_empty(0), persistent=False)

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes; the table of levels is not counted."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.offsets))

    def forward(self, dtype: torch.dtype) -> torch.Tensor:
        """The (out, in) weight, computed in float32 or wider and rounded once to ``dtype``."""
        wide = torch.promote_types(dtype, torch.float32)
        c = unpack(self.codes, self.table)[: math.prod(self.shape)].to(wide)  # (out in,)
        c = c.view(*self.scales.shape, self.group)  # -> (out, in / g, g)
        s, beta = (t.view(torch.float32).to(wide)[..., None] for t in (self.scales, self.offsets))  # (out, in / g, 1)
        return torch.addcmul(beta, c, s).view(self.shape).to(dtype)  # (out, in / g, g) -> (out, in)

    @torch.no_grad()
    def shift(self, rows: slice, by: torch.Tensor) -> None:
        """Add ``by`` (len(rows), in / g) to the offsets: codes and scales stay as they are."""
        offsets = self.offsets.view(torch.float32)
        offsets[rows] = (offsets[rows].to(by.dtype) + by).float()


class PooledLowRank(LowRank):
    """``forward(x, y) = y + scale * B A dropout(pool(x))``, the mean of every ``group`` neighbouring inputs.

    Shapes, with b rows of t tokens: x (b, t, in), y (b, t, out), A (r, in / g), B (out, r). The update of the weight is
    the same for all inputs of a group.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, group: int, dropout: float = 0.0):
        super().__init__(in_features // group, out_features, rank, scale, dropout)
        self.group = group
        nn.init.xavier_uniform_(self.A)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        pooled = x.unflatten(-1, (-1, self.group)).mean(dim=-1)  # (b, t, in) -> (b, t, in / g)
        Ax = F.linear(cast(self.dropout(pooled), self.A).flatten(0, -2), self.A)  # (b, t, in / g) -> (b t, r)
        return low_rank.update(y, Ax, self.B, self.scale)  # (b t, r) -> (b, t, out)

    def group_delta(self) -> torch.Tensor:
        """The update of every weight of a group, (out, in / g), formed in float32 or wider."""
        return super().delta() / self.group

    def delta(self) -> torch.Tensor:
        """The (out, in) update, formed in float32 or wider."""
        return self.group_delta().repeat_interleave(self.group, dim=1)  # (out, in / g) -> (out, in)


class QALoRA(QuantizedUpdates):
    Config = QALoRAConfig
    learning_rate = 1e-2

    def targets(self, host: Host) -> list[Site]:
        group, sites = self.config.group, super().targets(host)
        for site in sites:
            if site.in_features % group:
                raise TargetError(
                    f"group={group} does not divide the {site.in_features} inputs of {site}; choose a group that does"
                )
        return sites

    def quantize(self, host: Host) -> dict[str, QuantizedLinear]:
        c = self.config
        return quantize_sites(host, c.targets, partial(GroupWeight, bits=c.bits, group=c.group), c.compute)

    def update(self, site: Site) -> PooledLowRank:
        c = self.config
        return PooledLowRank(site.in_features, site.out_features, c.rank, c.alpha / c.rank, c.group, c.dropout)

    def merge(self) -> None:
        if not self.config.keep_quantized:
            return super().merge()
        for site, update in self.updates.items():
            site.module.quantized.shift(site.rows, update.group_delta())
