"""A small attention of its own beside or behind a backbone's self-attention, over the same positions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.anatomy import Layer
from peftlib.mechanisms import attention, cache
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.positions import by_name, names
from peftlib.mechanisms.precision import cast


class Context(nn.Module):
    """What an attention's queries may see, kept from its function for whoever attends over the same positions:
    ``mask`` (B or 1, 1 or H, q, k) or None, and whether None means a causal one; ``past``: the call's cache or None."""

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
    """``forward(x, y) = y + delta(y)``, or with ``parallel`` ``y + delta(x)``, for the input x and the output y of an
    attention block; ``delta(z) = W_O [softmax(q_j k_j^T / sqrt(p)) v_j]_j + b_O`` with heads j of size p.

    Shapes: z (B, n, d); query, key and value maps (heads p, d), W_O (d, heads p), all with biases. W_O and b_O start at
    zero, the other maps as torch's linear layers do. While ``averaged`` is set and the module is in evaluation mode,
    the heads are one: queries, keys and values have the mean of their weights, and W_O the sum over the heads, so that
    equal heads give the same output.
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
        return y + self.delta(x if self.parallel else y).to(y.dtype)

    def delta(self, z: torch.Tensor) -> torch.Tensor:
        one = self.averaged and not self.training
        z = cast(z, self.query.weight)
        q, k, v = (self._split(self._map(z, linear, one)) for linear in (self.query, self.key, self.value))
        mask, causal, past = self.context.take()
        if past is not None:
            k, v = past.update(k, v, self.cache_index)
        mixed = F.scaled_dot_product_attention(q, k, v, _mask(mask, causal, q, k))
        mixed = mixed.transpose(1, 2).flatten(2)
        if one:
            return F.linear(mixed, self.output.weight.unflatten(1, (self.heads, -1)).sum(1), self.output.bias)
        return self.output(mixed)

    def _map(self, z: torch.Tensor, linear: nn.Linear, one: bool) -> torch.Tensor:
        if not one:
            return linear(z)
        weight, bias = (t.unflatten(0, (self.heads, -1)).mean(0) for t in (linear.weight, linear.bias))
        return F.linear(z, weight, bias)

    def _split(self, z: torch.Tensor) -> torch.Tensor:
        return z.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _mask(mask: torch.Tensor | None, causal: bool, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    rows, columns = q.shape[2], k.shape[2]
    if mask is not None:
        # The last columns: what others put in front of the keys is not here.
        mask = mask[..., -columns:]
        return mask if mask.dtype == torch.bool else mask.to(q.dtype)
    if causal and rows > 1:
        return torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
    return None


def attach(host: Host, layer: Layer, name: str, heads: int, head_dim: int, parallel: bool = False) -> TinyAttention:
    """Put a tiny attention behind the self-attention's output projection of a layer, or beside the whole block. In
    a decoder its keys and values have a place behind the backbone's in the same cache."""
    layers = sum(other.stack == layer.stack for other in host.anatomy.layers)
    context = attention.attach(host, layer.attention, f"{name}_context", Context())
    host.hook(layer.attention, partial(_see_cache, names(layer.attention), layers), context, before=True)
    tiny = TinyAttention(host.anatomy.d, heads, head_dim, context, layers + layer.index, parallel)
    if parallel:
        return host.connect(layer.sites["attention.query"], layer.sites["attention.output"], name, tiny)
    return host.after(layer.sites["attention.output"], name, tiny)


def _see_cache(order: tuple[str, ...], layers: int, context: Context, module: nn.Module, args: tuple, kwargs: dict):
    past = by_name(order, args, kwargs).get("past_key_values")
    if past is not None:
        cache.grow(past, 2 * layers)
        past = getattr(past, "self_attention_cache", past)
    context.past = past
