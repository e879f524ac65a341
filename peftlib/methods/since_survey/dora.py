r"""DoRA: LoRA for the directions of a weight's rows, beside which their lengths train.

.. math:: y = \frac{m}{n} \odot \bigl(W x + s B A x\bigr) + b, \qquad n = \|W + s B A\|_2, \qquad s = \frac{\alpha}{r}

Shapes, with b rows of t tokens: x (b, t, in), y (b, t, out), W (out, in), A (r, in), B (out, r), m and the bias (out,),
n (out,) the norm of each row. The paper calls the norms column-wise; in its code, too, they are those of an output's
weights. n follows A and B but is a constant in the backward pass (section 4.3). B starts at zero and m at the row norms
of W, so the start is the identity. Merge: exact, :math:`W \leftarrow \frac{m}{n} (W + s B A)` row by row, whose rows
then are of length m. The bias is not scaled. Trained: r (in + out) + out a matrix.

Source: Liu et al. 2024, arXiv:2402.09353, and its code: queries, keys, values and both feed-forward maps (without
LLaMA's gate), r = 32 or 16 and alpha = 2 r, dropout 0.05, learning rate 1e-4 to 2e-4. As in the code, what trains sees
the dropped input: of W x the part that m / n - 1 scales, and B A x. ``detach_norm=False`` lets the gradient go through
n, as the paper's first form does. ``rank_stabilized`` divides alpha by sqrt(r) instead. Where we differ: n is formed in
float32 also on a half-precision backbone and under autocast; a row of zeros, which has no direction, stays as it is.
Maps of which m alone trains (section 5.6) are not offered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.anatomy import Site, weights
from peftlib.errors import UnsupportedError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import LowRank
from peftlib.mechanisms.precision import cast, without_autocast
from peftlib.methods.base import Method, MethodConfig, at_least
from peftlib.methods.bases import hf_peft
from peftlib.methods.bases.low_rank import LowRankUpdates


@dataclass(frozen=True)
class DoRAConfig(MethodConfig):
    """``rank`` r, ``alpha`` (the product is scaled by alpha / r), ``targets`` (site patterns), ``dropout`` on the input
    of what trains, ``detach_norm``: no gradient through n, ``rank_stabilized`` scaling by alpha / sqrt(r)."""

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] | str = (
        "*attention.query",
        "*attention.key",
        "*attention.value",
        "ffn.up",
        "ffn.down",
    )
    dropout: float = 0.05
    detach_norm: bool = True
    rank_stabilized: bool = False

    def __post_init__(self):
        at_least("rank", self.rank, 1)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


class WeightDecomposed(LowRank):
    """``forward(x, y) = y + (m / n - 1) W x + m / n s B A x`` for y = W x + b of a site."""

    def __init__(self, site: Site, rank: int, scale: float, dropout: float, detach_norm: bool):
        super().__init__(site.in_features, site.out_features, rank, scale, dropout)
        self.site = site
        self.detach_norm = detach_norm
        self.to(site.weight.device)
        self.m = nn.Parameter(self.norm().detach().to(self.A.dtype))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        dropped = cast(self.dropout(x), self.A)  # (b, t, in)
        Wx = self.frozen(dropped, y)  # (b, t, out)
        BAx = F.linear(F.linear(dropped, self.A), self.B)  # (b, t, in) -> (b, t, r) -> (b, t, out)
        g = self.m / self.norm()  # (out,)
        return y + ((g - 1) * Wx + g * self.scale * BAx).to(y.dtype)  # (b, t, out)

    def frozen(self, dropped: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """W x; of the dropped input where dropout is on, which is not in y."""
        if self.training and isinstance(self.dropout, nn.Dropout):
            W = self.site.weight
            return F.linear(cast(dropped, W), W)  # (b, t, in) -> (b, t, out)
        return y if self.site.bias is None else y - self.site.bias  # (b, t, out)

    def norm(self) -> torch.Tensor:
        """n (out,), in float32 or wider. Of a row of zeros it is not quite zero, so that m / n is 0 and not 0 / 0."""
        W = self.site.weight
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_norm), without_autocast(W):
            BA = self.B.to(self.delta_dtype) @ self.A.to(self.delta_dtype)  # (out, r) (r, in) -> (out, in)
            n = torch.linalg.vector_norm(W + self.scale * BA, dim=1)  # (out, in) -> (out,)
            return n.clamp(min=torch.finfo(n.dtype).tiny)

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """The (out, in) change of W: m / n (W + s B A) - W."""
        W = self.site.weight.to(self.delta_dtype)
        return (self.m / self.norm())[:, None] * (W + super().delta()) - W


@dataclass(frozen=True)
class _Files(hf_peft.LowRank):
    """LoRA's files with ``use_dora`` and the lengths; the product of a map's parts has the rows that each part's has.
    A row of a fused map that no part adapts keeps its own length."""

    def untouched(self, attribute: str, first: Site, rows: int, like: torch.Tensor) -> torch.Tensor:
        weight = weights.of(first.module)
        return torch.linalg.vector_norm(weight.to(like.dtype), dim=1)

    def parts(self, sites: list[Site], whole: dict[str, torch.Tensor]) -> hf_peft.Values:
        found, by_rows = super().parts(sites, whole), hf_peft.Updates.parts(self, sites, whole)
        for site in by_rows.keys() - found.keys():
            m = by_rows[site]["m"]
            if not torch.allclose(m, torch.linalg.vector_norm(site.weight.to(m), dim=1)):
                return by_rows  # without an update in A and B, but with lengths of its own
        return found

    def write(self, method: Method) -> tuple[dict, dict]:
        if not method.config.detach_norm:
            raise UnsupportedError("HF peft's DoRA has no gradient through the norm; detach_norm=False is not written")
        return super().write(method)


class DoRA(LowRankUpdates):
    Config = DoRAConfig
    learning_rate = 5e-4
    child = "dora"
    hf_peft = _Files(
        tensors={"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "m"},
        rows=("B", "m"),
        marks={"use_dora": True},
        used=hf_peft.LowRank().used | {"use_dora": False},
        refused=tuple(name for name in hf_peft.LORA_REFUSED if name != "use_dora"),
    )

    def targets(self, host: Host) -> list[Site]:
        sites = super().targets(host)
        changed = {path.rpartition(".")[0] for path in host.root.paths()}
        for site in sites:
            if site.path in changed:
                raise UnsupportedError(
                    f"another method changes the output of {site}, and dora measures W x there; name dora before it in "
                    "combine()"
                )
        return sites

    def update(self, site: Site) -> WeightDecomposed:
        c = self.config
        return WeightDecomposed(site, c.rank, c.scale, c.dropout, c.detach_norm)
