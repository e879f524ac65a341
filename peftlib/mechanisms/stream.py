"""The residual stream of a layer: what a block reads of it, and adding to the sum behind a block."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftlib.anatomy import Layer, Site
from peftlib.mechanisms.call import Handed
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.outputs import Args, Kwargs, state_of, with_state

FIRST_MAP = {"attention": "attention.query", "cross_attention": "cross_attention.query", "ffn": "ffn.up"}
"""The first map of each block."""


def source(layer: Layer, block: str) -> Site | nn.Module:
    """What has the stream in front of a block as its input: the block's norm where that stands before it, else the
    block's first map."""
    return layer.norms[block] if layer.pre_norm else layer.sites[FIRST_MAP[block]]


def beside_ffn(host: Host, layer: Layer, name: str, child: nn.Module) -> nn.Module:
    """Add ``child.delta(x)`` to the residual sum behind the feed-forward block, for the stream x in front of it: x has
    not passed the block's norm where norms stand before their blocks. The child lives on the block's last map. Dropout
    of the block's output does not act on what is added."""
    owner, first = layer.sites["ffn.down"].module, source(layer, "ffn")
    child = host.add(owner, name, child)
    gate, kept = host.gate(first, owner, name), Handed()
    host.hook(first.module if isinstance(first, Site) else first, _keep, kept, before=True)
    if layer.pre_norm:
        host.hook(layer.module, _add_to_output, child, gate, kept)
    else:
        host.hook(layer.norms["ffn"], _add_to_input, child, gate, kept, before=True)
    return child


def _keep(kept: Handed, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
    kept.value = args[0]


def _delta(child: Any, gate: nn.Module | None, kept: Handed, like: torch.Tensor) -> torch.Tensor:
    x = kept.take()
    delta = child.delta(x)
    return (delta if gate is None else gate(x) * delta).to(like.dtype).view_as(like)


def _add_to_input(
    child: Any, gate: nn.Module | None, kept: Handed, norm: nn.Module, args: Args, kwargs: Kwargs
) -> tuple[Args, Kwargs]:
    return (args[0] + _delta(child, gate, kept, args[0]), *args[1:]), kwargs


def _add_to_output(
    child: Any, gate: nn.Module | None, kept: Handed, layer: nn.Module, args: Args, kwargs: Kwargs, out: Any
) -> Any:
    h = state_of(out)
    return with_state(out, h + _delta(child, gate, kept, h))


def behind_attention(host: Host, layer: Layer, name: str, child: nn.Module) -> nn.Module:
    """Add ``child.delta(x, h)`` to the stream h behind the self-attention, its residual sum and the norm where one
    follows; x is the stream in front of the attention. The child lives on that norm, or on the layer where norms stand
    before their blocks."""
    owner = layer.module if layer.pre_norm else layer.norms["attention"]
    first = source(layer, "attention")
    child = host.add(owner, name, child)
    gate, kept = host.gate(first, owner, name), Handed()
    host.hook(first.module if isinstance(first, Site) else first, _keep, kept, before=True)
    if not layer.pre_norm:
        host.hook(owner, _add_behind, child, gate, kept)
        return child
    # No module gives the sum: what is added goes into each later norm of the layer, and onto the layer's output.
    later = [layer.norms[block] for block in ("cross_attention", "ffn") if block in layer.norms]
    added = Handed()
    host.hook(later[0], _add_first, child, gate, kept, added, before=True)
    for norm in later[1:]:
        host.hook(norm, _add_again, added, before=True)
    host.hook(owner, _add_at_last, added)
    return child


def _added(child: Any, gate: nn.Module | None, kept: Handed, h: torch.Tensor) -> torch.Tensor:
    x = kept.take()
    added = child.delta(x, h.view_as(x))  # a layer may flatten its rows on the way
    return (added if gate is None else gate(x) * added).to(h.dtype)


def _add_behind(
    child: Any, gate: nn.Module | None, kept: Handed, norm: nn.Module, args: Args, kwargs: Kwargs, h: torch.Tensor
) -> Any:
    return h + _added(child, gate, kept, h)


def _add_first(
    child: Any,
    gate: nn.Module | None,
    kept: Handed,
    added: Handed,
    norm: nn.Module,
    args: Args,
    kwargs: Kwargs,
) -> tuple[Args, Kwargs]:
    added.value = _added(child, gate, kept, args[0])
    return _add_again(added, norm, args, kwargs)


def _add_again(added: Handed, norm: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    return (args[0] + added.value.view_as(args[0]), *args[1:]), kwargs


def _add_at_last(added: Handed, layer: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    return with_state(output, state_of(output) + added.take())
