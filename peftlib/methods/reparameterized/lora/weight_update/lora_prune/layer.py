"""Pruning heads and inner channels of a backbone: a mask while it trains, smaller weights afterwards.

A unit is pruned as a whole: an inner channel of a feed-forward block, or a head of an attention block. Where queries
are grouped, a head of keys and values is one unit with the queries' heads that read it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from peftlib.anatomy import Layer, Site
from peftlib.mechanisms import attention
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import LowRank, thin

NAME = "units"
"""Of the mask before the map out of a block, and of what chooses the rows of a position bias."""

_PARTS = (
    ("attention", ("query", "key", "value"), "output"),
    ("cross_attention", ("query", "key", "value"), "output"),
    ("ffn", ("gate", "up"), "down"),
)


class Units(nn.Module):
    """``forward(x) = x * kept``: zeros in the place of the pruned units, before the map out of a block.

    Shapes, with b rows of t tokens: x (b, t, units width), ``kept`` (units,) boolean. After the cut x has the kept
    units only and passes as it is; ``kept`` still tells which of all units they are.
    """

    def __init__(self, units: int, width: int):
        super().__init__()
        self.register_buffer("kept", torch.ones(units, dtype=torch.bool))
        self.width = width
        self.cut = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.cut else x * self.kept.repeat_interleave(self.width)  # (b, t, units width)


@dataclass(frozen=True, eq=False)
class Block:
    """An attention or feed-forward block: the maps ``into`` its units and the map ``out`` of them, which holds the mask
    ``units``. ``kind`` is "attention", "cross_attention" or "ffn"."""

    layer: Layer
    kind: str
    into: tuple[Site, ...]
    out: Site
    units: Units

    @property
    def name(self) -> str:
        return f"{self.layer.stack}.{self.layer.index}.{self.kind}"

    @property
    def kept(self) -> torch.Tensor:
        return self.units.kept

    @property
    def gone(self) -> list[int]:
        """The pruned units, masked or cut."""
        return (~self.kept).nonzero().flatten().tolist()

    def sums(self, site: Site, matrix: torch.Tensor) -> torch.Tensor:
        """Sums (units,) over the rows or columns of each unit in a whole (out, in) matrix of one of the sites."""
        return (matrix.sum(0) if site is self.out else matrix.sum(1)).view(len(self.kept), -1).sum(1)

    def indices(self, site: Site) -> torch.Tensor:
        """Before the cut: the kept inputs of the map out of the block, or the kept outputs of a map into it."""
        size = site.in_features if site is self.out else site.out_features
        return self.kept.repeat_interleave(size // len(self.kept)).nonzero().flatten()


def blocks(host: Host, layers: Iterable[Layer]) -> list[Block]:
    """The layers' blocks, each with a mask of its units before the map out of it."""
    found = []
    for layer in layers:
        for kind, into, out in _PARTS:
            if f"{kind}.{out}" not in layer.sites:
                continue
            last = layer.sites[f"{kind}.{out}"]
            sites = tuple(layer.sites[f"{kind}.{n}"] for n in into if f"{kind}.{n}" in layer.sites)
            if kind == "ffn":
                units = last.in_features
            else:
                size = host.anatomy.head_size(getattr(layer, kind))
                units = layer.sites[f"{kind}.key"].out_features // size
            mask = host.before(last, NAME, Units(units, last.in_features // units))
            found.append(Block(layer, kind, sites, last, mask))
    return found


@torch.no_grad()
def cut(host: Host, block: Block) -> None:
    """Replace the block's weights by those of its kept units."""
    block.units.cut = True
    if bool(block.kept.all()):
        return
    stack = host.anatomy.family.stacks[block.layer.stack]
    rows: dict[nn.Module, list[torch.Tensor]] = {}
    for site in block.into:
        rows.setdefault(site.module, []).append(block.indices(site) + site.rows.start)
    columns = block.indices(block.out)
    for module, parts in rows.items():
        site = next(s for s in block.into if s.module is module)
        _select(host, site, torch.cat(parts), inputs=False)
    _select(host, block.out, columns, inputs=True)
    if block.kind == "ffn":
        return
    module = getattr(block.layer, block.kind)
    if stack.shares_bias:
        heads = block.kept.repeat_interleave(block.units.width // host.anatomy.head_size(module))
        attention.keep_heads_of_bias(host, module, NAME, heads.nonzero().flatten())
    for size in stack.sizes:
        host.set(module, size, getattr(module, size) * int(block.kept.sum()) // len(block.kept))


def select(update: LowRank, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None) -> None:
    """Keep these outputs (rows) or inputs (columns) of an update only. An optimizer from before knows the old
    factors."""
    if rows is not None:
        B = thin(len(rows), update.B.shape[1]).to(update.B).copy_(update.B.detach()[rows])
        update.B = nn.Parameter(B, requires_grad=update.B.requires_grad)
    if columns is not None:
        update.A = nn.Parameter(update.A.detach()[:, columns], requires_grad=update.A.requires_grad)


def _select(host: Host, site: Site, index: torch.Tensor, inputs: bool) -> None:
    """Keep some inputs or outputs of the module that a site is or is a part of."""
    module = site.module
    host.swap(module, "weight", module.weight.index_select(int(inputs != site.transposed), index))
    if not inputs and getattr(module, "bias", None) is not None:
        host.swap(module, "bias", module.bias[index])
    sizes = ("nf", "nx") if site.transposed else ("out_features", "in_features")
    host.set(module, sizes[inputs], len(index))


def fit_config(host: Host) -> bool:
    """Write the layers' sizes into the model's config, so that transformers can build the model from it; False, and
    nothing written, where it has no names for them or the layers differ."""
    parts = host.anatomy
    config = parts.config
    attentions = {
        tuple(
            layer.sites[f"{kind}.{n}"].out_features // parts.head_size(getattr(layer, kind)) for n in ("query", "key")
        )
        for layer in parts.layers
        for kind in ("attention", "cross_attention")
        if f"{kind}.query" in layer.sites
    }
    inner = {layer.sites["ffn.down"].in_features for layer in parts.layers}
    if len(attentions) > 1 or len(inner) > 1:
        return False
    heads, kv_heads = attentions.pop()
    if heads != parts.heads:
        shares_bias = any(stack.shares_bias for stack in parts.family.stacks.values())
        # transformers' configs ask that the heads divide the hidden size, also where they do not span it.
        if shares_bias or getattr(config, "head_dim", None) is None or config.hidden_size % heads:
            return False
        config.num_attention_heads, config.num_key_value_heads = heads, kv_heads
    size = inner.pop()
    for name in (parts.family.inner, "decoder_ffn_dim"):
        if hasattr(config, name):
            setattr(config, name, size)
    return True
