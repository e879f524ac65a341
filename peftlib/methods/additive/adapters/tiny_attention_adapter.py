r"""Tiny-attention adapter: an attention with heads of size one over the whole context is added to the hidden state.

.. math:: h_t \leftarrow h_t + b_O + \sum_{j} W_O^{(j)} \sum_{s}
          \operatorname{softmax}_s\bigl(q_t^{(j)} \cdot k_s^{(j)} / \sqrt{p}\bigr)\, v_s^{(j)}

Shapes, with b rows of n tokens: h (b, n, d); q, k, v (b, H, n, p) for H heads j of size p, from h by maps (H p, d) with
biases; W_O (d, H p). h is the output of the attention block before the residual sum, or with ``place="parallel"`` the
block's input, and the sum is with its output. s runs over the positions that the block itself attends to: no padding,
in decoders none that come later. W_O starts at zero, so the start is the identity. Trained: 4dHp + 3Hp + d a layer. No
merge: it depends on the context.

``adapted.method.average_heads()`` makes the heads one for inference, whose cost is that of a single head: the mean of
their query, key and value weights and, as equal heads should give the same output, the sum of their W_O. With unequal
heads it changes the output. ``average_heads(False)`` undoes it; it is not stored, and training uses all heads.

Source: Zhao et al. 2022, arXiv:2211.01979: tiny heads as experts to be averaged, both places. No code is known, and
what its abstract does not say is chosen here: the place before the residual sum, sequential as default, biases, the
start, four heads. The reported 0.05 % of RoBERTa-large lies between one and two heads of this form (0.035 and 0.062 %).
Position biases and rotations of the backbone do not enter. Decoders keep its keys and values in the backbone's own
cache, which must be a dynamic one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.anatomy import Layer
from peftlib.errors import UnknownNameError
from peftlib.mechanisms import attention, cache
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.positions import by_name, names
from peftlib.mechanisms.precision import cast
from peftlib.methods.base import Method, MethodConfig, at_least

PLACES = ("sequential", "parallel")


@dataclass(frozen=True)
class TinyAttentionAdapterConfig(MethodConfig):
    """``heads`` H of size ``head_dim`` p; ``place``: "sequential", behind the attention block, or "parallel" to it."""

    heads: int = 4
    head_dim: int = 1
    place: Literal["sequential", "parallel"] = "sequential"

    def __post_init__(self):
        at_least("heads", self.heads, 1)
        at_least("head_dim", self.head_dim, 1)
        if self.place not in PLACES:
            raise UnknownNameError("place", self.place, PLACES)


class Context(nn.Module):
    """In the backbone's attention: keeps for the tiny one what a query may see, ``mask`` (b or 1, 1 or H, n, k) or
    None, whether None means a causal mask, and ``past``, the call's cache or None."""

    mask: torch.Tensor | None = None
    causal = False
    past: Any = None

    def forward(self, inputs: attention.Inputs) -> attention.Inputs:
        self.mask, self.causal = inputs.mask, inputs.causal
        return inputs

    def take(self) -> tuple[torch.Tensor | None, bool, Any]:
        """Mask, whether it is causal, and the cache; once, so that nothing is held longer than a call."""
        mask, self.mask = self.mask, None
        past, self.past = self.past, None
        return mask, self.causal, past


class TinyAttention(nn.Module):
    """``forward(x, y) = y + delta(y)``, or with ``parallel`` ``y + delta(x)``, for the input x and the output y
    (b, n, d) of an attention block.

    W_O and b_O (``output``) start at zero, the other maps as torch's linear layers do. While ``averaged`` is set and
    the module is in evaluation mode, the heads are one.
    """

    def __init__(self, d: int, heads: int, head_dim: int, context: Context, cache_index: int, parallel: bool):
        super().__init__()
        self.heads, self.head_dim, self.parallel = heads, head_dim, parallel
        self.context, self.cache_index = context, cache_index
        self.averaged = False
        self.query, self.key, self.value = (nn.Linear(d, heads * head_dim) for _ in range(3))
        self.output = nn.Linear(heads * head_dim, d)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + self.delta(x if self.parallel else y).to(y.dtype)  # (b, n, d)

    def delta(self, h: torch.Tensor) -> torch.Tensor:
        """What is added for h, both (b, n, d)."""
        one = self.averaged and not self.training  # then H is 1
        h = cast(h, self.query.weight)  # (b, n, d)
        q, k, v = (self._map(h, linear, one) for linear in (self.query, self.key, self.value))  # each (b, H, n, p)
        mask, causal, past = self.context.take()
        if past is not None:
            k, v = past.update(k, v, self.cache_index)  # (b, H, n, p) -> (b, H, k, p)
        mixed = F.scaled_dot_product_attention(q, k, v, _visible(mask, causal, q, k))  # (b, H, n, p)
        mixed = mixed.transpose(1, 2).flatten(2)  # (b, H, n, p) -> (b, n, H p)
        if one:
            W_O = self.output.weight.unflatten(1, (self.heads, -1)).sum(1)  # (d, H p) -> (d, p)
            return F.linear(mixed, W_O, self.output.bias)  # (b, n, p) -> (b, n, d)
        return self.output(mixed)  # (b, n, H p) -> (b, n, d)

    def _map(self, h: torch.Tensor, linear: nn.Linear, one: bool) -> torch.Tensor:
        """Queries, keys or values of all heads, or of ``one``, their average."""
        if one:
            W, b = (t.unflatten(0, (self.heads, -1)).mean(0) for t in (linear.weight, linear.bias))  # (p, d) and (p,)
            mapped = F.linear(h, W, b)  # (b, n, d) -> (b, n, p)
        else:
            mapped = linear(h)  # (b, n, d) -> (b, n, H p)
        return mapped.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (b, n, H p) -> (b, H, n, p)


class TinyAttentionAdapter(Method):
    Config = TinyAttentionAdapterConfig
    learning_rate = 1e-2

    def attach(self, host: Host) -> None:
        self.adapters = [self._attach(host, layer) for layer in host.anatomy.layers]

    def _attach(self, host: Host, layer: Layer) -> nn.Module:
        c, query, output = self.config, layer.sites["attention.query"], layer.sites["attention.output"]
        layers = sum(other.stack == layer.stack for other in host.anatomy.layers)
        context = attention.attach(host, layer.attention, f"{self.name}_context", Context())
        host.hook(layer.attention, _see_cache, context, names(layer.attention), layers, before=True)
        # In a decoder's cache its keys and values stand behind those of the backbone's layers.
        place, parallel = layers + layer.index, c.place == "parallel"
        tiny = TinyAttention(host.anatomy.d, c.heads, c.head_dim, context, place, parallel)
        return host.connect(query, output, self.name, tiny) if parallel else host.after(output, self.name, tiny)

    def average_heads(self, averaged: bool = True) -> None:
        """Let each layer's heads be one, their average, in evaluation mode; or all of them again."""
        for adapter in self.adapters:
            adapter.averaged = averaged


def _see_cache(context: Context, order: tuple[str, ...], layers: int, module: nn.Module, args: tuple, kwargs: dict):
    past = by_name(order, args, kwargs).get("past_key_values")
    if past is not None:
        cache.grow(past, 2 * layers)
        past = getattr(past, "self_attention_cache", past)
    context.past = past


def _visible(mask: torch.Tensor | None, causal: bool, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """The attention's mask for the tiny keys alone, whose positions are the last ones."""
    rows, columns = q.shape[2], k.shape[2]
    if mask is not None:
        mask = mask[..., -columns:]  # (b or 1, 1 or H, n, more than k) -> (b or 1, 1 or H, n, k)
        return mask if mask.dtype == torch.bool else mask.to(q.dtype)
    if causal and rows > 1:
        return torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)  # (n, k)
    return None
