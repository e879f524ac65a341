r"""Tiny-attention adapter: an attention of size one over the whole context, behind that of each layer (additive).

.. math:: h_t \leftarrow h_t + W_2\, W_O \sum_{s} \operatorname{softmax}_s\bigl(q_t \cdot k_s / \sqrt{p}\bigr)\,
          v_s, \qquad (q, k, v) = \operatorname{diag}(W_Q, W_K, W_V)\, W_1 \operatorname{LN}(h)

Shapes, with b rows of n tokens: h (b, n, d); W_1 (3p, d), W_Q, W_K, W_V, W_O (p, p), W_2 (d, p), all with biases; q,
k, v (b, n, p). LN is a norm of its own, with scale and shift. h is the hidden state behind the attention block, its
residual sum and, where one follows there, its norm; with ``place="parallel"`` the attention reads the state in front of
the block. s runs over the positions that the block itself attends to: no padding, in decoders none that come later.
Start: as torch's layers, and W_2 and its bias a hundredth of that, so the output is near the backbone's. Trained:
4dp + 3d + 4p^2 + 7p a layer for each head. No merge: it depends on the context.

``heads`` M are M such attentions, one after the other, each reading what the one before gave and adding 1 / M of its
output. ``adapted.method.start_heads(state)`` starts all of them from a trained adapter of one head, ``state()`` of an
adapted model, apart by noise of 1e-6 in W_1. For deployment ``average_heads()`` makes them one, the mean of all their
parameters, whose cost is that of a single head; it changes the output. ``average_heads(False)`` undoes it; it is not
stored, and training uses all heads.

Source: Zhao et al. 2022, arXiv:2211.01979, and its code (cindermond/tiny-attn: model/tiny_attn.py, roberta_bl.py with
the structures m0 and s0, roberta_ada.py, run/train_ada.py). As there: p = 1, dropout of 0.1 on the attention weights
and none in the frozen layers while it trains, M = 4 where there are several. RoBERTa-large trains 172,296 parameters,
the paper's 0.05 %. The start is that of the code's modules; transformers 4.19, which it asks for, draws new linear maps
anew from N(0, 0.02^2) when a model is loaded, so their runs may have started there. Departures: their script starts and
averages all but the norms of its heads, ours those too; their GPT-2 code has one map for q, k and v and no causal mask.
Encoder-decoder models have it behind self-attention in both stacks. Position biases and rotations of the backbone do
not enter. Decoders keep its keys and values in the backbone's own cache, which must be a dynamic one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.anatomy import Layer
from peftlib.errors import LoadError, UnknownNameError
from peftlib.mechanisms import attention, cache, dropout, stream
from peftlib.mechanisms.call import Local
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.positions import by_name, names
from peftlib.mechanisms.precision import cast
from peftlib.methods.base import ConfigError, Method, MethodConfig, at_least

PLACES = ("sequential", "parallel")


@dataclass(frozen=True)
class TinyAttentionAdapterConfig(MethodConfig):
    """``heads`` M of size ``head_dim`` p, one after the other; ``place``: "sequential", behind the attention block, or
    "parallel" to it; ``dropout`` of the attention weights; ``backbone_dropout``: the frozen layers keep theirs while
    it trains."""

    heads: int = 1
    head_dim: int = 1
    place: Literal["sequential", "parallel"] = "sequential"
    dropout: float = 0.1
    backbone_dropout: bool = False

    def __post_init__(self):
        at_least("heads", self.heads, 1)
        at_least("head_dim", self.head_dim, 1)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout!r} is no rate; it must be at least 0 and below 1")
        if self.place not in PLACES:
            raise UnknownNameError("place", self.place, PLACES)


class Seen(Local):
    """What a query of the present call may see: ``mask`` (b or 1, 1 or H, n, k) or None, whether None means a causal
    mask, and ``past``, the call's cache or None."""

    def __init__(self) -> None:
        self.mask: torch.Tensor | None = None
        self.causal = False
        self.past: Any = None


class Context(nn.Module):
    """In the backbone's attention: keeps for the tiny one what a query may see."""

    def __init__(self) -> None:
        super().__init__()
        self.now = Seen()

    def forward(self, inputs: attention.Inputs) -> attention.Inputs:
        self.now.mask, self.now.causal = inputs.mask, inputs.causal
        return inputs

    def take(self) -> tuple[torch.Tensor | None, bool, Any]:
        """Mask, whether it is causal, and the cache; once, so that nothing is held longer than a call."""
        now = self.now
        mask, past = now.mask, now.past
        now.mask = now.past = None
        return mask, now.causal, past


class TinyHead(nn.Module):
    """``forward(h, seen, slot)``: what an attention of size p gives for h, both (b, n, d). ``seen`` is what
    :meth:`Context.take` gives, ``slot`` the place of its keys and values in a cache. ``attention`` holds W_Q, W_K, W_V
    and W_O with torch's start."""

    def __init__(self, d: int, p: int, rate: float):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.project = nn.Linear(d, 3 * p)
        self.attention = nn.MultiheadAttention(p, 1, dropout=rate, batch_first=True)
        self.output = nn.Linear(p, d)
        with torch.no_grad():
            for parameter in self.output.parameters():
                parameter.mul_(0.01)

    def forward(self, h: torch.Tensor, seen: tuple[torch.Tensor | None, bool, Any], slot: int) -> torch.Tensor:
        mask, causal, past = seen
        a = self.attention
        parts = self.project(self.norm(h)).chunk(3, dim=-1)  # (b, n, d) -> 3 (b, n, p)
        weights = zip(parts, a.in_proj_weight.chunk(3), a.in_proj_bias.chunk(3), strict=True)  # (p, p) and (p,) each
        q, k, v = (F.linear(x, W, b)[:, None] for x, W, b in weights)  # (b, n, p) -> (b, 1, n, p)
        if past is not None:
            k, v = past.update(k, v, slot)  # (b, 1, n, p) -> (b, 1, k, p)
        rate = a.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, _visible(mask, causal, q, k), rate)  # (b, 1, n, p)
        return self.output(a.out_proj(mixed[:, 0]))  # (b, n, p) -> (b, n, d)


class TinyAttention(nn.Module):
    """``delta(x, h)``: what ``heads`` heads add to h (b, n, d), one after the other, each reading h as it then is, or
    with ``parallel`` the block's input x. While ``averaged`` is set and the module is in evaluation mode, it is one
    head, the mean of all."""

    def __init__(self, d: int, config: TinyAttentionAdapterConfig, context: Context, slot: int):
        super().__init__()
        self.parallel, self.averaged = config.place == "parallel", False
        self.context, self.slot = context, slot
        self.heads = nn.ModuleList(TinyHead(d, config.head_dim, config.dropout) for _ in range(config.heads))

    def delta(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        seen, M = self.context.take(), len(self.heads)
        source = cast(x if self.parallel else h, self.heads[0].norm.weight)  # (b, n, d)
        if self.averaged and not self.training:
            return torch.func.functional_call(self.heads[0], self.mean(), (source, seen, self.slot))  # (b, n, d)
        total = torch.zeros_like(source)
        for j, head in enumerate(self.heads):
            reads = source if self.parallel else source + total
            total = total + head(reads, seen, self.slot + j) / M  # (b, n, d)
        return total

    def mean(self) -> dict[str, torch.Tensor]:
        """The mean of the heads' parameters, by their names in a head."""
        every = [dict(head.named_parameters()) for head in self.heads]
        return {name: torch.stack([one[name] for one in every]).mean(0) for name in every[0]}


class TinyAttentionAdapter(Method):
    Config = TinyAttentionAdapterConfig
    learning_rate = 1e-2

    def attach(self, host: Host) -> None:
        if not self.config.backbone_dropout:
            dropout.switch_off(host, host.anatomy.base)
        self.adapters = [self._attach(host, layer) for layer in host.anatomy.layers]

    def _attach(self, host: Host, layer: Layer) -> nn.Module:
        layers, M = sum(other.stack == layer.stack for other in host.anatomy.layers), self.config.heads
        context = attention.attach(host, layer.attention, f"{self.name}_context", Context())
        host.hook(layer.attention, _see_cache, context, names(layer.attention), layers * (1 + M), before=True)
        # In a decoder's cache its keys and values stand behind those of the backbone's layers.
        tiny = TinyAttention(host.anatomy.d, self.config, context, layers + layer.index * M)
        return stream.behind_attention(host, layer, self.name, tiny)

    @torch.no_grad()
    def start_heads(self, state: dict[str, torch.Tensor], noise: float = 1e-6) -> None:
        """Start every head from ``state``, that of an adapted model with one head, plus ``noise`` in W_1. Raises
        LoadError where it does not fit."""
        parameters = self.host.trained()
        for path, adapter in ((p, m) for p, m in self.host.paths().items() if isinstance(m, TinyAttention)):
            for j, head in enumerate(adapter.heads):
                for name, parameter in head.named_parameters():
                    given = state.get(f"{path}.heads.0.{name}")
                    if given is None or given.shape != parameter.shape:
                        raise LoadError(f"the state has no {path}.heads.0.{name} of shape {tuple(parameter.shape)}")
                    drawn = torch.randn_like(parameter) * noise if name.startswith("project.") else 0
                    parameters[f"{path}.heads.{j}.{name}"].copy_(given.to(parameter.device) + drawn)

    def average_heads(self, averaged: bool = True) -> None:
        """Let each layer's heads be one, their mean, in evaluation mode; or all of them again."""
        for adapter in self.adapters:
            adapter.averaged = averaged


def _see_cache(context: Context, order: tuple[str, ...], slots: int, module: nn.Module, args: tuple, kwargs: dict):
    past = by_name(order, args, kwargs).get("past_key_values")
    if past is not None:
        cache.grow(past, slots)
        past = getattr(past, "self_attention_cache", past)
    context.now.past = past


def _visible(mask: torch.Tensor | None, causal: bool, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """The attention's mask for the tiny keys alone, whose positions are the last ones."""
    rows, columns = q.shape[2], k.shape[2]
    if mask is not None:
        mask = mask[:, :1, :, -columns:]  # (b or 1, 1 or H, n, more than k) -> (b or 1, 1, n, k)
        return mask if mask.dtype == torch.bool else mask.to(q.dtype)
    if causal and rows > 1:
        return torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)  # (n, k)
    return None
