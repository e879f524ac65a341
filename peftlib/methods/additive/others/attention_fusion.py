r"""Attention fusion: one trained query attends, token by token, over the outputs of a frozen backbone's layers.

.. math:: z_t = \sum_{\ell=1}^{L} a_{t, \ell}\, h_{\ell, t}, \qquad
          a_t = \mathrm{softmax}_{\ell}\bigl(q^\top h_{\ell, t}\bigr)

Shapes, with b rows of n tokens: h (b, n, d), the output of layer l, L of them; q (d). The head gets z where it got the
last layer's output. No gradient enters the backbone: its layers run on detached inputs, and of its activations a
training step keeps the layers' outputs alone. q starts at zero, so that z is the mean of the layers: not the backbone's
output. Trained: d. The mix depends on the input: no merge.

Source: Cao et al. 2022, Findings of NAACL, 10.18653/v1/2022.findings-naacl.64, of which only the abstract could be
read: attention over each token's layer outputs, decoupled from the backbone, 0.0009 % of the parameters, which is one
vector of 768. No code was published. Not confirmed, so chosen here: neither projections of keys and values nor a
scale; q starts at zero; the embeddings are no layer (``with_embeddings`` makes them one); the fused [CLS] goes through
BERT's frozen pooler; backbones with a norm behind their last layer have it on every layer's output, which is then what
the head would get if the stack ended there; of encoder-decoder backbones the decoder's layers are fused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftlib.errors import UnsupportedError
from peftlib.mechanisms.call import Handed
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.outputs import state_of, with_state
from peftlib.mechanisms.precision import cast
from peftlib.methods.base import Method, MethodConfig


@dataclass(frozen=True)
class AttentionFusionConfig(MethodConfig):
    """``with_embeddings``: whether the first layer's input counts as a layer."""

    with_embeddings: bool = False


class LayerAttention(nn.Module):
    """One query q (d) over the layers. ``run.value`` are the outputs h_l (b, n, d) of those that have run in a
    forward."""

    def __init__(self, d: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(d))
        self.run = Handed()

    def forward(self, states: list[torch.Tensor]) -> torch.Tensor:
        h = cast(torch.stack(states, dim=-2), self.query)  # L of (b, n, d) -> (b, n, L, d)
        a = torch.softmax(h @ self.query, dim=-1)  # (b, n, L, d) -> (b, n, L)
        return (a[..., None, :].to(h.dtype) @ h)[..., 0, :]  # (b, n, L, d) -> (b, n, d)


class AttentionFusion(Method):
    Config = AttentionFusionConfig
    learning_rate = 1e-2

    def attach(self, host: Host) -> None:
        parts = host.anatomy
        last = parts.stacks[-1]
        holder = parts.holder(last)
        count = sum(layer.stack == last for layer in parts.layers) + self.config.with_embeddings
        if count < 2:
            raise UnsupportedError(
                f"the query chooses among the layers of a stack, and the {last} of this {type(host.model).__name__} "
                "has one; add the embeddings with with_embeddings=True, or use another method"
            )
        fusion = host.add(holder, self.name, LayerAttention(parts.d))
        for stack in parts.stacks:
            layers = [layer.module for layer in parts.layers if layer.stack == stack]
            host.hook(layers[0], _begin, fusion, stack == last and self.config.with_embeddings, before=True)
            if stack == last:
                for layer in layers:
                    host.hook(layer, _record, fusion)
        end = parts.end(last)
        host.hook(end, _fuse, fusion, end is parts.final_norm(last))


def _begin(fusion: LayerAttention, record: bool, module: nn.Module, args: tuple, kwargs: dict):
    """Before the first layer of a stack."""
    h = args[0].detach()
    fusion.run.value = [h] if record else []
    return (h, *args[1:]), kwargs


def _record(fusion: LayerAttention, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    """Behind each layer of the last stack."""
    fusion.run.value.append(state_of(output).detach())


def _fuse(fusion: LayerAttention, is_norm: bool, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """Behind the last stack, or the norm that ends it: the mix replaces its output."""
    states = fusion.run.take()
    if is_norm:
        # The norm behind the last layer; by its forward alone, as this is its own hook.
        with torch.no_grad():
            states = [module.forward(h) for h in states]
    return with_state(output, fusion(states).to(state_of(output).dtype))  # L of (b, n, d) -> (b, n, d)
