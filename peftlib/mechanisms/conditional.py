"""Conditional layers: a router sends k of n tokens through a frozen layer, and a small network serves all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.anatomy import Layer
from peftlib.mechanisms import attention
from peftlib.mechanisms.bottleneck import Bottleneck
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.outputs import state_of, with_state
from peftlib.mechanisms.positions import by_name, names
from peftlib.mechanisms.precision import without_autocast

Keys = Literal["k", "all"]


@dataclass(frozen=True)
class Temperature:
    """Soft top-k's ``epsilon``, and how it gets there: from ``first``, times ``decay`` at each of ``steps`` steps."""

    epsilon: float = 1.0
    first: float = 4.0
    decay: float = 0.7
    steps: int = 20


def soft_top_k(scores: torch.Tensor, k: torch.Tensor, real: torch.Tensor, temperature: Temperature) -> torch.Tensor:
    """Weights (B, n) in [0, 1] that approach a sum of k a row, by coordinate ascent on the dual of
    ``max <s, w> + epsilon H(w)``; gradients run through the steps.

    ``scores`` (B, n); ``k`` (B, 1), at least 1; ``real`` (B, n) boolean: other entries get 0. Where k is all of a row's
    real entries, their weights are 1, which the steps would reach only in the limit.
    """
    s = scores.masked_fill(~real, -torch.inf)
    b = torch.zeros_like(scores)
    epsilon = max(temperature.first, temperature.epsilon)
    for step in range(temperature.steps):
        if step:
            epsilon = max(temperature.decay * epsilon, temperature.epsilon)
        a = epsilon * (k.log() - ((s + b) / epsilon).logsumexp(-1, keepdim=True))
        b = -(scores + a).relu()
    weights = ((scores + a + b) / epsilon).exp()
    count = real.sum(-1, keepdim=True)
    return torch.where(k < count, weights, 1.0).masked_fill(~real, 0.0)


@dataclass
class Chosen:
    """Which tokens a layer gets: ``index`` (B, K) and their ``gate`` (B, K), zero where they are not ``valid`` because
    a row chooses fewer than K. ``columns`` (B, K or n) are the positions of the keys; where those are not the chosen
    tokens' alone, ``rest`` are keys and values (B, H, n - K, p) of the others."""

    index: torch.Tensor
    gate: torch.Tensor
    valid: torch.Tensor
    columns: torch.Tensor
    rest: tuple[torch.Tensor, torch.Tensor] | None = None

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        """The chosen ones of x (B, n, d)."""
        return x.gather(1, self.index[..., None].expand(-1, -1, x.shape[-1]))


class Columns(nn.Module):
    """Lets the attention of a layer that is given the :class:`Chosen` tokens alone use their own mask and position
    biases, and the other tokens' keys and values where there are some."""

    def forward(self, inputs: attention.Inputs) -> attention.Inputs:
        chosen = inputs.given
        if chosen is None:
            return inputs
        mask, bias = inputs.mask, inputs.position_bias
        if bias is not None:
            bias = _take(bias, chosen)
        if mask is not None:
            mask = _take(mask, chosen)
        if chosen.rest is None:
            own = chosen.valid[:, None, None]
            if mask is None:
                mask = own
            elif mask.dtype == torch.bool:
                mask = mask & own
            else:
                mask = mask.masked_fill(~own, torch.finfo(mask.dtype).min)
            return replace(inputs, mask=mask, position_bias=bias)
        key, value = (
            torch.cat([mine, others.to(mine.dtype)], dim=2)
            for mine, others in zip((inputs.key, inputs.value), chosen.rest)
        )
        return replace(inputs, key=key, value=value, mask=mask, position_bias=bias)


def _take(full: torch.Tensor, chosen: Chosen) -> torch.Tensor:
    """The chosen rows and the keys' columns of (B or 1, H or 1, n or 1, n)."""
    rows, columns = chosen.index, chosen.columns
    full = full.expand(len(rows), -1, -1, -1)
    if full.shape[2] > 1:
        full = full.gather(2, rows[:, None, :, None].expand(-1, full.shape[1], -1, full.shape[3]))
    return full.gather(3, columns[:, None, None, :].expand(-1, full.shape[1], full.shape[2], -1))


class Conditional(nn.Module):
    """``h <- h + adapter(norm(h)) + gate * (layer(h) - h)`` with a gate of zero for all but k of n tokens, which alone
    pass the layer; without a router all do, and the gate is one.

    ``router`` (d,) starts at N(0, 1/d), so that scores of normed states have a variance of one. k is the part
    ``1 / reduction`` of a row's real tokens, rounded up.
    """

    def __init__(self, adapter: Bottleneck, d: int, reduction: float | None, keys: Keys, temperature: Temperature):
        super().__init__()
        self.adapter = adapter
        self.router = None if reduction is None else nn.Parameter(torch.randn(d) / math.sqrt(d))
        self.reduction, self.keys, self.temperature = reduction, keys, temperature
        self.state: tuple[torch.Tensor, torch.Tensor, Chosen | None] | None = None

    def choose(self, normed: torch.Tensor, mask: torch.Tensor | None) -> Chosen | None:
        """The tokens of a layer's normed input (B, n, d) that pass it; None for all."""
        n = normed.shape[1]
        most = n if self.router is None else math.ceil(n / self.reduction)
        if most == n:
            return None
        real = _real(mask, normed)
        with without_autocast(normed):
            scores = F.linear(normed.to(self.router.dtype), self.router[None]).squeeze(-1)
            k = (real.sum(-1, keepdim=True).double() / self.reduction).ceil().clamp(min=1)
            weights = soft_top_k(scores, k.to(scores.dtype), real, self.temperature)
        # The largest weights are those of the largest scores, which have no ties.
        order = scores.detach().masked_fill(~real, -torch.inf).argsort(dim=-1, descending=True)
        index = order[:, :most]
        valid = torch.arange(most, device=k.device) < k
        return Chosen(index, weights.gather(1, index) * valid, valid, order if self.keys == "all" else index)

    def enter(self, x: torch.Tensor, normed: torch.Tensor, mask: torch.Tensor | None) -> Chosen | None:
        """Before the layer: what it gets instead of its input x; None for all of it."""
        chosen = self.choose(normed, mask)
        self.state = x, normed, chosen
        return chosen

    def leave(self, output: torch.Tensor) -> torch.Tensor:
        """All tokens behind the layer, from what it gives for the chosen ones."""
        (x, normed, chosen), self.state = self.state, None
        added = self.adapter.delta(normed)
        if chosen is None:
            return output + added.to(output.dtype)
        heavy = chosen.gate[..., None] * (output - chosen.pick(x))
        y = x + added.to(x.dtype)
        return y.scatter_add(1, chosen.index[..., None].expand_as(heavy), heavy.to(y.dtype))


def _real(mask: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Which tokens any other attends to, (B, n), by the layer's own mask."""
    if mask is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    return seen.flatten(1, -2).any(1).expand(len(x), -1)


def attach(host: Host, layer: Layer, name: str, child: Conditional) -> Conditional:
    """Make a layer conditional. Norms are those that stand before its blocks; where they stand behind them, the layer's
    input is normed already."""
    host.add(layer.module, name, child)
    if child.router is not None:
        attention.attach(host, layer.attention, f"{name}_columns", Columns())
    host.hook(layer.module, _enter, child, layer, names(layer.module), host.anatomy.head_dim, before=True)
    host.hook(layer.module, _leave, child)
    return child


def _enter(child: Conditional, layer: Layer, order: tuple[str, ...], head_dim: int, module, args: tuple, kwargs: dict):
    call = by_name(order, args, kwargs)
    x = call.pop("hidden_states")
    normed = layer.norms["attention"].forward(x) if layer.pre_norm else x
    chosen = child.enter(x, normed, call.get("attention_mask"))
    if chosen is None:
        return (x,), call
    if call.get("position_bias") is None and getattr(layer.attention, "has_relative_attention_bias", False):
        # T5's first layer makes the biases for all layers, from the number of tokens that it sees.
        call["position_bias"] = layer.attention.compute_bias(x.shape[1], x.shape[1], device=x.device)
    if child.keys == "all":
        rest = chosen.columns[:, chosen.index.shape[1] :]
        others = normed.gather(1, rest[..., None].expand(-1, -1, normed.shape[-1]))
        chosen.rest = tuple(
            layer.sites[f"attention.{part}"].module(others).unflatten(-1, (-1, head_dim)).transpose(1, 2)
            for part in ("key", "value")
        )
    return (chosen.pick(x),), call | {attention.GIVEN: chosen}


def _leave(child: Conditional, module: nn.Module, args: tuple, kwargs: dict, output):
    return with_state(output, child.leave(state_of(output)))
