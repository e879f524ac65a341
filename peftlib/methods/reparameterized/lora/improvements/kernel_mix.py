r"""Kernel-mix: in attention, a low-rank update of each head's own beside one that all heads share.

.. math::
    Q_h \mathrel{+}= B_h A_h x + b_h + [\bar B \bar A x]_h, \qquad
    V_h \mathrel{+}= B'_h A'_h k_h + b'_h + [\bar B' \bar A' x]_h, \qquad
    O \mathrel{+}= \textstyle\sum_h B''_h A''_h o_h + b'' + \bar B'' \bar A'' o

Shapes, with p numbers a head: x (d,) the block's input, k_h (p,) the head's key, o_h (p,) its output, o all heads';
A_h (r_q, d), B_h (p, r_q); A'_h (r_v, p), B'_h (p, r_v); A''_h (r_v, p), B''_h (d, r_v); barred, for all heads: ranks
s_q, s_v and s_v. Keys stay as they are and nothing is shared between the three maps. All factors and biases start from
a normal distribution of 0.01, cut off at twice that, so the start is near the identity (``init="zero"``: every B and
bias at zero, and it is the identity). Merge: exact; all maps are linear, and the value's update goes through the key's
weight: :math:`W_V \mathrel{+}= \operatorname{diag}_h(B'_h A'_h) W_K` and likewise with its bias.
Trained: d (H (r_q + r_v) + r_q + 3 r_v + 3 + 2 s_q + 4 s_v) a layer.

Source: Chen et al. 2022, arXiv:2205.03720, and its code, which gives the maps and starts; ranks r_q, r_v, s_q, s_v are
1, 2, 2, 4 for RoBERTa, 3, 8, 12, 8 for GPT-2, dropout 0.1 for both. Where we differ: a bias is trained only where the
map has one, else it could not be merged (T5, LLaMA); with grouped keys the value's heads are the key's; a rotary
embedding is applied after the key that is used. The paper's lite forms, for queries and values or for all three, have
no name in the code: ``maps`` chooses the maps and a rank of 0 leaves a part out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.anatomy import Site
from peftlib.errors import TargetError, UnknownNameError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import LowRank, add_to_weight, check_rank, kaiming
from peftlib.mechanisms.precision import cast
from peftlib.methods.base import ConfigError, Method, MethodConfig, at_least

MAPS, INITS = ("query", "value", "output"), ("normal", "zero")


@dataclass(frozen=True)
class KernelMixConfig(MethodConfig):
    """``rank_query`` r_q and ``rank_value`` r_v (values and outputs) of each head, ``shared_rank_query`` s_q and
    ``shared_rank_value`` s_v of what the heads share; ``maps`` that are updated; ``init`` "normal" or "zero";
    ``dropout`` on the updates' inputs."""

    rank_query: int = 1
    rank_value: int = 2
    shared_rank_query: int = 2
    shared_rank_value: int = 4
    maps: tuple[str, ...] = MAPS
    init: str = "normal"
    dropout: float = 0.1

    def __post_init__(self):
        for name in ("rank_query", "rank_value", "shared_rank_query", "shared_rank_value"):
            at_least(name, getattr(self, name), 0)
        for name in self.maps:
            if name not in MAPS:
                raise UnknownNameError("map", name, MAPS)
        if self.init not in INITS:
            raise UnknownNameError("init", self.init, INITS)
        if not self.maps or not any(sum(self.ranks(name)) for name in self.maps):
            raise ConfigError(
                f"maps={self.maps!r} with these ranks has nothing to train; give a map and a rank above 0"
            )

    def ranks(self, name: str) -> tuple[int, int]:
        """The ranks of a map's heads and of what they share."""
        if name == "query":
            return self.rank_query, self.shared_rank_query
        return self.rank_value, self.shared_rank_value


class HeadLowRank(nn.Module):
    """A low-rank update of each head's own: ``forward(x, y) = y + [B_h A_h x_h] + bias``.

    Shapes, with b rows of t tokens and H heads: x (b, t, in), y (b, t, out); A (H, r, in_h), B (H, out_h, r), bias
    (out,). With ``split_in`` a head sees its own part of x (in_h = in / H), else all of it; with ``split_out`` it
    writes its own part of y (out_h = out / H), else the heads' results add up. Everything starts from :func:`normal`;
    with ``zero_B`` A starts as LoRA's and the rest at zero.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        heads: int,
        rank: int,
        split_in: bool,
        split_out: bool,
        bias: bool = True,
        dropout: float = 0.0,
        zero_B: bool = False,
    ):
        super().__init__()
        self.split_in, self.split_out = split_in, split_out
        self.A = nn.Parameter(torch.empty(heads, rank, in_features // heads if split_in else in_features))
        self.B = nn.Parameter(torch.empty(heads, out_features // heads if split_out else out_features, rank))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        for parameter in self.parameters():
            normal(parameter)
            if zero_B:
                nn.init.zeros_(parameter)
        if zero_B:
            kaiming(self.A.flatten(0, 1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        A, B = self.A, self.B
        x = cast(self.dropout(x), A)  # (b, t, in)
        if self.split_in:
            x = x.unflatten(-1, (len(A), -1))  # (b, t, in) -> (b, t, H, in_h)
            Ax = torch.einsum("...hi,hri->...hr", x, A)  # -> (b, t, H, r)
        else:
            Ax = F.linear(x, A.flatten(0, 1)).unflatten(-1, (len(A), -1))  # (b, t, in) -> (b, t, H, r)
        if self.split_out:
            BAx = torch.einsum("...hr,hor->...ho", Ax, B).flatten(-2)  # -> (b, t, H, out_h) -> (b, t, out)
        else:
            BAx = torch.einsum("...hr,hor->...o", Ax, B)  # -> (b, t, out)
        if self.bias is not None:
            BAx = BAx + self.bias
        return y + BAx.to(y.dtype)  # (b, t, out)

    def delta(self) -> torch.Tensor:
        """The (out, in) matrix of all heads, formed in float32 or wider; the bias is not in it."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        BA = self.B.detach().to(dtype) @ self.A.detach().to(dtype)  # (H, out_h, r) (H, r, in_h) -> (H, out_h, in_h)
        if self.split_in and self.split_out:
            return torch.block_diag(*BA)  # -> (out, in)
        return torch.cat(list(BA), dim=0 if self.split_out else 1)  # -> (out, in)


class KernelMix(Method):
    Config = KernelMixConfig
    learning_rate = 2e-3

    def attach(self, host: Host) -> None:
        self.heads: list[tuple[Site, Site | None, HeadLowRank]] = []
        self.shared: list[tuple[Site, LowRank]] = []
        parts = host.anatomy
        for layer in parts.layers:
            for block in ("attention", "cross_attention"):
                for name in self.config.maps:
                    if site := layer.sites.get(f"{block}.{name}"):
                        key = layer.sites[f"{block}.key"] if name == "value" else None
                        width = site.in_features if name == "output" else site.out_features
                        self._add(host, name, site, key, width // parts.head_size(getattr(layer, block)))

    def _add(self, host: Host, name: str, site: Site, key: Site | None, heads: int) -> None:
        c = self.config
        rank, shared = c.ranks(name)
        zero = c.init == "zero"
        size = (site.in_features if name == "output" else site.out_features) // heads
        if rank > size:
            raise TargetError(
                f"rank {rank} does not fit the heads of {site}, of size {size}; choose one from 0 to {size}"
            )
        if rank:
            source = site.in_features if key is None else key.out_features
            update = HeadLowRank(
                source,
                site.out_features,
                heads,
                rank,
                split_in=name != "query",
                split_out=name != "output",
                bias=site.bias is not None,
                dropout=c.dropout,
                zero_B=zero,
            )
            if key is None:
                host.after(site, "kernel", update)
            else:
                host.connect(key, site, "kernel", update, reads="output")
            self.heads.append((site, key, update))
        if shared:
            check_rank(shared, site)
            starts = (kaiming, nn.init.zeros_) if zero else (normal, normal)
            update = LowRank(site.in_features, site.out_features, shared, 1.0, c.dropout, *starts)
            self.shared.append((site, host.after(site, "shared", update)))

    @torch.no_grad()
    def merge(self) -> None:
        for site, key, update in self.heads:
            delta = update.delta()  # (out, in); for the value, in is the size of all keys
            bias = 0 if update.bias is None else update.bias.to(delta.dtype)  # (out,)
            if key is not None:
                if key.bias is not None:
                    bias = bias + delta @ key.bias.to(delta.dtype)  # (out, keys) (keys,) -> (out,)
                delta = delta @ key.weight.to(delta.dtype)  # (out, keys) (keys, in) -> (out, in)
            add_to_weight(site, delta)
            if site.bias is not None:
                site.bias.copy_((site.bias.to(delta.dtype) + bias).to(site.bias.dtype))
        for site, update in self.shared:
            add_to_weight(site, update.delta())


def normal(tensor: torch.Tensor) -> torch.Tensor:
    """Normal with standard deviation 0.01, cut off at twice that."""
    return nn.init.trunc_normal_(tensor, std=0.01, a=-0.02, b=0.02)
