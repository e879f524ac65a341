"""Late fusion: what the head gets is a mix of all layers' outputs, and no gradient enters the backbone.

The layers run on detached inputs and build no graph. When the last stack has run, the mix of what its layers gave takes
the place of its result. Where the family has a norm behind the last layer, the mix is one of normed outputs: each
layer's is seen as the head would see it if the stack ended there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftlib.mechanisms.host import Host
from peftlib.mechanisms.outputs import state_of, with_state
from peftlib.mechanisms.precision import cast


class LayerAttention(nn.Module):
    """One query over the layers, token by token: sum_l a_l h_l with a = softmax_l(query . h_l); ``query`` (d) starts at
    zero, which gives every layer the same weight.

    ``states`` are the outputs (B, n, d) of the layers that have run in the present forward.
    """

    def __init__(self, d: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(d))
        self.states: list[torch.Tensor] = []

    def forward(self, states: list[torch.Tensor]) -> torch.Tensor:
        layers = cast(torch.stack(states, dim=-2), self.query)
        weights = torch.softmax(layers @ self.query, dim=-1)
        return (weights[..., None, :].to(layers.dtype) @ layers)[..., 0, :]


def attach(host: Host, name: str, with_embeddings: bool) -> LayerAttention:
    """Let an attention over the last stack's layers, and with ``with_embeddings`` over the first one's input, make what
    the head gets."""
    parts = host.anatomy
    last = parts.stacks[-1]
    holder = parts.holder(last)
    child = host.add(holder, name, LayerAttention(parts.d))
    for stack in parts.stacks:
        layers = [layer.module for layer in parts.layers if layer.stack == stack]
        host.hook(layers[0], _begin, child, stack == last and with_embeddings, before=True)
        if stack == last:
            for layer in layers:
                host.hook(layer, _record, child)
    host.hook(parts.final_norm(last) or holder, _fuse, child)
    return child


def _begin(child: LayerAttention, record: bool, module: nn.Module, args: tuple, kwargs: dict):
    state = args[0].detach()
    child.states = [state] if record else []
    return (state, *args[1:]), kwargs


def _record(child: LayerAttention, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    child.states.append(state_of(output).detach())


def _fuse(child: LayerAttention, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    states, child.states = child.states, []
    if isinstance(output, torch.Tensor):
        # The norm behind the last layer; by its forward alone, as this is its own hook.
        with torch.no_grad():
            states = [module.forward(state) for state in states]
    return with_state(output, child(states).to(state_of(output).dtype))
