r"""PiSSA: LoRA that trains the principal singular components of a weight and freezes what is left of it.

.. math:: y = \bigl(W - s B_0 A_0\bigr) x + s B A x, \qquad W = U \Sigma V^\top, \quad
    B_0 = U_r \sqrt{\Sigma_r / s}, \quad A_0 = \sqrt{\Sigma_r / s}\, V_r^\top, \quad s = \frac{\alpha}{r}

Shapes: W (out, in), A (r, in), B (out, r), Sigma_r the r largest singular values. A and B start as A_0 and B_0, so the
start is the identity up to rounding: 1e-6 of the logits in float32, bfloat16's own rounding on such a backbone; with
dropout on, training does not begin at it. The decomposition is in float32 or wider. Merge: exact, the weight that is
left plus s B A, rounded once. Trained: r (in + out) a matrix; stored: twice as many, because a file holds A_0 and B_0
too, so that any machine takes the same off the weight when it loads it. ``detach()`` gives back W bit for bit.

Source: Meng et al. 2024, arXiv:2404.02948, and its code: every linear map of the layers, r = 128 and alpha = r (the
default of ``alpha`` None), no dropout, learning rate 2e-5. ``niter`` takes the code's fast decomposition, which is
random, with so many iterations (4 to 16 there); ``rank_stabilized`` scales by alpha / sqrt(r). Where we differ: each of
a fused map's parts has a decomposition of its own. A quantized weight cannot be rewritten and is refused.

Files for HF peft are written in the form of its own conversion: LoRA of rank 2 r with [A; A_0] and [B, -B_0], whose
product is what training changed. HF peft loads them onto the original backbone without a decomposition, beside other
adapters if need be. Its "pissa" files hold A and B alone, and whoever loads them decomposes the backbone again. They
are read, except those of "pissa_niter": a random decomposition cannot be repeated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

from peftlib.anatomy import Anatomy, Site
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import LowRank
from peftlib.methods.base import Method, MethodConfig, at_least
from peftlib.methods.bases import hf_peft
from peftlib.methods.bases.low_rank import LowRankUpdates


@dataclass(frozen=True)
class PiSSAConfig(MethodConfig):
    """``rank`` r, ``alpha`` (the product is scaled by alpha / r; None: r), ``targets`` (site patterns), ``dropout`` on
    the product's input, ``niter``: iterations of the fast decomposition (None: the exact one), ``rank_stabilized``
    scaling by alpha / sqrt(r)."""

    rank: int = 128
    alpha: float | None = None
    targets: tuple[str, ...] | str = "all-linear"
    dropout: float = 0.0
    niter: int | None = None
    rank_stabilized: bool = False

    def __post_init__(self):
        at_least("rank", self.rank, 1)
        if self.niter is not None:
            at_least("niter", self.niter, 0)

    @property
    def scale(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


class Principal(LowRank):
    """``forward(x, y) = y + s B A x`` beside W - s B_0 A_0; A_0 and B_0 are kept."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, dropout: float):
        super().__init__(in_features, out_features, rank, scale, dropout)
        self.register_buffer("A_0", torch.zeros_like(self.A))
        self.register_buffer("B_0", torch.zeros_like(self.B))

    def taken(self) -> torch.Tensor:
        """s B_0 A_0 (out, in), in float32 or wider."""
        return self.scale * (self.B_0.to(self.delta_dtype) @ self.A_0.to(self.delta_dtype))

    @torch.no_grad()
    def as_lora(self) -> LowRank:
        """LoRA of rank 2 r beside W: s [B, -B_0] [A; A_0] = s (B A - B_0 A_0)."""
        lora = LowRank(self.A.shape[1], len(self.B), 2 * len(self.A), self.scale)
        lora.A.copy_(torch.cat([self.A, self.A_0]))
        lora.B.copy_(torch.cat([self.B, -self.B_0], dim=1))
        return lora


class _Files(hf_peft.LowRank):
    """Reads LoRA's files with "pissa", writes plain LoRA's."""

    def read(self, settings: dict, tensors: dict, parts: Anatomy, folder: object) -> tuple[dict, hf_peft.Fill]:
        options, fill = super().read(settings, tensors, parts, folder)

        def split_and_fill(method: Method) -> None:
            method.split_whole_maps()
            fill(method)

        return options, split_and_fill

    def write(self, method: Method) -> tuple[dict, dict]:
        updates = {site: update.as_lora() for site, update in method.updates.items()}
        config = replace(method.config, rank_stabilized=False)
        return super().write(SimpleNamespace(host=method.host, updates=updates, config=config))

    def parts(self, sites: list[Site], whole: dict[str, torch.Tensor]) -> hf_peft.Values:
        """HF peft decomposes a map in one, so all its parts have all of A."""
        return hf_peft.Updates.parts(self, sites, whole)


class PiSSA(LowRankUpdates):
    Config = PiSSAConfig
    learning_rate = 1e-4
    child = "pissa"
    hf_peft = _Files(
        marks={"init_lora_weights": lambda start: str(start).startswith("pissa")},
        starts=("pissa",),
    )

    def targets(self, host: Host) -> list[Site]:
        sites = super().targets(host)
        host.check_dense(sites)
        return sites

    def update(self, site: Site) -> Principal:
        c = self.config
        return Principal(site.in_features, site.out_features, c.rank, c.scale, c.dropout)

    def attach(self, host: Host) -> None:
        super().attach(host)
        self.originals = {site: host.write(site) for site in self.updates}
        for site in self.updates:
            if not site.weight.is_meta:
                self.split({site: site.weight})

    @torch.no_grad()
    def split(self, weights: dict[Site, torch.Tensor]) -> None:
        """Take the principal components of these (out, in) weights, one below the other, off them into the factors."""
        c = self.config
        W = torch.cat(list(weights.values()))
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        if c.niter is None:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        else:
            U, S, V = torch.svd_lowrank(W, q=c.rank, niter=c.niter)
            Vh = V.T
        root = (S[: c.rank] / c.scale).sqrt()
        A_0, B_0 = root[:, None] * Vh[: c.rank], U[:, : c.rank] * root
        sizes = [len(weight) for weight in weights.values()]
        for (site, weight), rows in zip(weights.items(), B_0.split(sizes)):
            update = self.updates[site]
            for factor, value in ((update.A, A_0), (update.A_0, A_0), (update.B, rows), (update.B_0, rows)):
                factor.copy_(value)
            self.rewrite(site, weight)

    def split_whole_maps(self) -> None:
        """Decompose a map that is taken in parts as one, as HF peft does."""
        for updates in hf_peft.by_module(self.updates).values():
            if len(updates) > 1:
                self.split({site: self.original(site) for site in updates})

    def original(self, site: Site) -> torch.Tensor:
        """W (out, in), or without a kept copy what it was but for rounding."""
        kept = self.originals[site]
        return site.weight + self.updates[site].taken() if kept is None else kept.to(site.weight.device)

    @torch.no_grad()
    def rewrite(self, site: Site, original: torch.Tensor) -> None:
        """``W <- W - s B_0 A_0``, rounded once."""
        site.weight.copy_(original - self.updates[site].taken())

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        originals = {site: self.original(site) for site in self.updates}
        self.host.load_state(state)
        for site, original in originals.items():
            self.rewrite(site, original)
