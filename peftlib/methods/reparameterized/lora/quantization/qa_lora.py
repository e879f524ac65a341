r"""QA-LoRA: the update of a group-wise quantized weight is constant within a group, so it folds into the offsets.

.. math:: y = \tilde{W} x + \frac{\alpha}{r} B A \operatorname{pool}_g(x), \qquad
    \tilde{W}_{ij} = s_{i\gamma}\, c_{ij} + \beta_{i\gamma}, \quad \gamma = \lfloor j / g \rfloor

Shapes: codes c (out, in) of 4 or 2 bits, scales s and offsets beta (out, in / g) float32; pool_g means every g inputs;
A (r, in / g) starts Xavier-uniform, B (out, r) at zero, so the start is the quantized backbone, near the original.
Trained: r (in / g + out) a matrix. The merge is exact into the quantized weight: codes and scales stay,
:math:`\beta \leftarrow \beta + \frac{\alpha}{r g} B A`, rounded once to float32. (The zero point of other conventions
is -beta / s: a float that moves by the update over s.)

What ``merge()`` leaves: plain maps that hold the moved weight, in the dtype that they had, as with every other method;
with ``keep_quantized`` the low-bit maps themselves, offsets moved. These compute without LoRA and without peftlib's
hooks, but are peftlib's modules: codes, scales and offsets are in the model's state dict.

Source: Xu et al. 2023, arXiv:2309.14717, and its code: groups of 32, alpha 16, rank 64, the mean as the pool (the
paper's listing sums). Where we differ: the weight is rounded to the nearest of the levels between a group's smallest
and largest entry, without GPTQ's corrections from data; scales and offsets are float32 (6 bits a weight together with
4-bit codes in groups of 32), and 3 bits are not offered. Files hold the factors alone; loading quantizes the backbone
again, with the same result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from peftlib.errors import TargetError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import PooledLowRank, check_rank
from peftlib.mechanisms.quantized import DTYPES, GroupWeight, merge_updates, quantize_sites
from peftlib.methods.base import Method, MethodConfig, at_least, one_of


@dataclass(frozen=True)
class QALoRAConfig(MethodConfig):
    """``rank`` r, ``alpha`` (the update is scaled by alpha / r), ``targets``, the maps that are quantized and adapted
    (site patterns), ``bits`` (4 or 2), ``group`` g of inputs, ``dropout`` on the update's input, ``compute`` dtype of
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


class QALoRA(Method):
    Config = QALoRAConfig
    learning_rate = 1e-2

    def attach(self, host: Host) -> None:
        c = self.config
        self.updates: dict = {}
        for site in host.anatomy.sites(c.targets):
            check_rank(c.rank, site)
            if site.in_features % c.group:
                raise TargetError(
                    f"group={c.group} does not divide the {site.in_features} inputs of {site}; choose a group that does"
                )
        self.quantized = quantize_sites(host, c.targets, partial(GroupWeight, bits=c.bits, group=c.group), c.compute)
        for site in host.anatomy.sites(c.targets):
            update = PooledLowRank(site.in_features, site.out_features, c.rank, c.alpha / c.rank, c.group, c.dropout)
            self.updates[site] = host.after(site, "lora", update)

    def merge(self) -> None:
        if not self.config.keep_quantized:
            return merge_updates(self.host, self.quantized, self.updates)
        for site, update in self.updates.items():
            site.module.quantized.shift(site.rows, update.group_delta())
