r"""LoRA: a low-rank update beside frozen linear maps.

.. math:: y = W x + \frac{\alpha}{r} B A x

The layer is :class:`peftlib.mechanisms.low_rank.LowRank`, which other methods use too.

Shapes: W (out, in), A (r, in), B (out, r). A starts Kaiming-uniform and B at zero, so the start is the identity. The
update is linear, so it merges exactly: :math:`W \leftarrow W + \frac{\alpha}{r} B A`, rounded once to W's dtype. The
logits then move by at most 1e-12 (float64), 1e-5 (float32) or 0.05 (bfloat16, its own rounding) of the largest.
Trained: r (in + out) a matrix.

Source: Hu et al. 2022, arXiv:2106.09685. ``rank_stabilized`` divides alpha by sqrt(r) instead (Kalajdzievski 2023,
arXiv:2312.03732). Dropout is off, as in the original's GLUE runs; those of GPT-2 have 0.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from peftlib.anatomy import Site
from peftlib.errors import TargetError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import LowRank, Pattern, at, check_rank, pairs
from peftlib.methods.base import MethodConfig, at_least
from peftlib.methods.bases import hf_peft
from peftlib.methods.bases.low_rank import LowRankUpdates


@dataclass(frozen=True)
class LoRAConfig(MethodConfig):
    """``rank`` r, ``alpha`` (the update is scaled by alpha / r), ``targets`` (site patterns), ``dropout`` on the
    update's input, ``rank_stabilized`` scaling by alpha / sqrt(r). ``rank_pattern`` and ``alpha_pattern``: another rank
    or alpha for the targets that a pattern matches, ``{"ffn.*": 4}``; the first match counts."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | str = ("*attention.query", "*attention.value")
    dropout: float = 0.0
    rank_stabilized: bool = False
    rank_pattern: Pattern = ()
    alpha_pattern: Pattern = ()

    def __post_init__(self):
        at_least("rank", self.rank, 1)
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, pairs(getattr(self, name)))
        for pattern, rank in self.rank_pattern:
            at_least(f"rank_pattern[{pattern!r}]", rank, 1)

    def rank_at(self, site: Site) -> int:
        """The rank r of the update beside a map."""
        return at(site, self.rank_pattern, self.rank)

    def scale_at(self, site: Site) -> float:
        """By which the update of a map is scaled."""
        rank = self.rank_at(site)
        return at(site, self.alpha_pattern, self.alpha) / (math.sqrt(rank) if self.rank_stabilized else rank)


class LoRA(LowRankUpdates):
    Config = LoRAConfig
    learning_rate = 2e-3
    hf_peft = hf_peft.LowRank(by_pattern=True)

    def targets(self, host: Host) -> list[Site]:
        c = self.config
        sites = host.anatomy.sites(c.targets) if c.rank_pattern else super().targets(host)
        for site in sites if c.rank_pattern else ():
            check_rank(c.rank_at(site), site)
        for pattern, _ in (*c.rank_pattern, *c.alpha_pattern):
            if not set(host.anatomy.sites(pattern)) & set(sites):
                raise TargetError(f"pattern {pattern!r} of rank_pattern or alpha_pattern matches none of the targets")
        return sites

    def update(self, site: Site) -> LowRank:
        c = self.config
        return LowRank(site.in_features, site.out_features, c.rank_at(site), c.scale_at(site), c.dropout)
