"""CODA's layer: a router sends k of n tokens through a frozen layer, and an adapter beside it serves all of them.

Shapes: B rows of n tokens, of which a row chooses at most K; d hidden size; H heads of size p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.anatomy import Layer
from peftlib.mechanisms import attention
from peftlib.mechanisms.bottleneck import Bottleneck
from peftlib.mechanisms.call import Handed
from peftlib.mechanisms.outputs import state_of, with_state
from peftlib.mechanisms.positions import by_name
from peftlib.mechanisms.precision import without_autocast


@dataclass(frozen=True)
class Temperature:
    """The soft top-k's ``epsilon``: reached from ``first``, times ``decay`` at each of ``steps`` steps."""

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
    s = scores.masked_fill(~real, -torch.inf)  # (B, n)
    b = torch.zeros_like(scores)  # (B, n)
    epsilon = max(temperature.first, temperature.epsilon)
    for step in range(temperature.steps):
        if step:
            epsilon = max(temperature.decay * epsilon, temperature.epsilon)
        a = epsilon * (k.log() - ((s + b) / epsilon).logsumexp(-1, keepdim=True))  # (B, n) -> (B, 1)
        b = -(scores + a).relu()  # (B, n)
    weights = ((scores + a + b) / epsilon).exp()  # (B, n)
    count = real.sum(-1, keepdim=True)  # (B, n) -> (B, 1)
    return torch.where(k < count, weights, 1.0).masked_fill(~real, 0.0)  # (B, n)


@dataclass
class Chosen:
    """The tokens S that a layer gets: ``index`` (B, K) and their ``gate`` lambda (B, K), zero where a token is not
    ``valid`` because its row chooses fewer than K. ``columns`` (B, K or n) are the positions of the keys; where those
    are not the chosen tokens' alone, ``rest`` are keys and values (B, H, n - K, p) of the others."""

    index: torch.Tensor
    gate: torch.Tensor
    valid: torch.Tensor
    columns: torch.Tensor
    rest: tuple[torch.Tensor, torch.Tensor] | None = None

    def pick(self, h: torch.Tensor) -> torch.Tensor:
        """h_S, the chosen tokens of h."""
        return h.gather(1, self.index[..., None].expand(-1, -1, h.shape[-1]))  # (B, n, d) -> (B, K, d)


class Conditional(nn.Module):
    """``h <- h + adapter(h_bar) + lambda * (Layer(h_S) - h_S)``: lambda is zero for all but the k chosen of n tokens,
    which alone pass the layer. Without a ``reduction`` there is no router: all tokens pass, and lambda is one.

    ``router`` w (d,) starts at N(0, 1/d), so that scores of normed states have a variance of one. k is the part
    ``1 / reduction`` of a row's real tokens, rounded up. The chosen tokens attend to each other, or ``to_all``. With
    ``keeps_first`` a row's first token is one of the k whatever its score, and its gate is one.
    """

    def __init__(
        self,
        adapter: Bottleneck,
        d: int,
        reduction: float | None,
        to_all: bool,
        keeps_first: bool,
        temperature: Temperature,
    ):
        super().__init__()
        self.adapter = adapter
        self.router = None if reduction is None else nn.Parameter(torch.randn(d) / math.sqrt(d))
        self.reduction, self.to_all, self.keeps_first, self.temperature = reduction, to_all, keeps_first, temperature
        self.state = Handed()  # h and h_bar, both (B, n, d), and the tokens chosen

    def choose(self, h_bar: torch.Tensor, mask: torch.Tensor | None) -> Chosen | None:
        """The tokens of the normed input h_bar (B, n, d) that pass the layer; None for all."""
        n = h_bar.shape[1]
        most = n if self.router is None else math.ceil(n / self.reduction)
        if most == n:
            return None
        real = _real(mask, h_bar)  # (B, n)
        with without_autocast(h_bar):
            scores = F.linear(h_bar.to(self.router.dtype), self.router[None]).squeeze(-1)  # (B, n, d) -> (B, n)
            k = (real.sum(-1, keepdim=True).double() / self.reduction).ceil().clamp(min=1)  # (B, n) -> (B, 1)
            first = real & (real.cumsum(-1) == 1) & self.keeps_first  # (B, n)
            others = (k - first.sum(-1, keepdim=True)).to(scores.dtype)  # (B, 1), how many are left to choose
            # Of a row of one token its weight is computed, and not used.
            among = torch.where((real & ~first).any(-1, keepdim=True), real & ~first, real)  # (B, n)
            weights = soft_top_k(scores, others.clamp(min=1), among, self.temperature)  # (B, n)
            weights = torch.where(others > 0, weights, 0.0).masked_fill(first, 1.0)  # (B, n)
        # The largest weights are those of the largest scores, which have no ties.
        ranks = scores.detach().masked_fill(~real, -torch.inf).masked_fill(first, torch.inf)  # (B, n)
        order = ranks.argsort(dim=-1, descending=True)  # (B, n)
        index = order[:, :most]  # (B, n) -> (B, K)
        valid = torch.arange(most, device=k.device) < k  # (B, K)
        gate = weights.gather(1, index) * valid  # (B, n) -> (B, K)
        return Chosen(index, gate, valid, order if self.to_all else index)

    def enter(self, h: torch.Tensor, h_bar: torch.Tensor, mask: torch.Tensor | None) -> Chosen | None:
        """Before the layer: which tokens of its input h (B, n, d) it gets; None for all."""
        chosen = self.choose(h_bar, mask)
        self.state.value = h, h_bar, chosen
        return chosen

    def leave(self, output: torch.Tensor) -> torch.Tensor:
        """Behind the layer: all tokens (B, n, d), from its output for those that it got, (B, K, d) or (B, n, d)."""
        h, h_bar, chosen = self.state.take()
        added = self.adapter.delta(h_bar)  # (B, n, d)
        if chosen is None:
            return output + added.to(output.dtype)  # (B, n, d)
        change = chosen.gate[..., None] * (output - chosen.pick(h))  # (B, K, d)
        h = h + added.to(h.dtype)  # (B, n, d)
        return h.scatter_add(1, chosen.index[..., None].expand_as(change), change.to(h.dtype))  # (B, n, d)


def _real(mask: torch.Tensor | None, h: torch.Tensor) -> torch.Tensor:
    """Which tokens any other attends to, (B, n), by the layer's own mask."""
    if mask is None:
        return torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)  # (B, n)
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    return seen.flatten(1, -2).any(1).expand(len(h), -1)  # (B or 1, H or 1, n or 1, n) -> (B, n)


def enter(child: Conditional, layer: Layer, order: tuple[str, ...], head_dim: int, module, args: tuple, kwargs: dict):
    """The hook before a layer. Where its norms stand behind the blocks, its input is normed already."""
    call = by_name(order, args, kwargs)
    h = call.pop("hidden_states")
    h_bar = layer.norms["attention"].forward(h) if layer.pre_norm else h  # (B, n, d)
    chosen = child.enter(h, h_bar, call.get("attention_mask"))
    if chosen is None:
        return (h,), call
    if call.get("position_bias") is None and getattr(layer.attention, "has_relative_attention_bias", False):
        # T5's first layer computes the biases for all layers, from the number of tokens that it sees.
        call["position_bias"] = layer.attention.compute_bias(h.shape[1], h.shape[1], device=h.device)  # (1, H, n, n)
    if child.to_all:
        rest = chosen.columns[:, chosen.index.shape[1] :]  # (B, n) -> (B, n - K)
        others = h_bar.gather(1, rest[..., None].expand(-1, -1, h_bar.shape[-1]))  # (B, n, d) -> (B, n - K, d)
        chosen.rest = tuple(
            layer.sites[f"attention.{part}"].module(others).unflatten(-1, (-1, head_dim)).transpose(1, 2)
            for part in ("key", "value")
        )  # each (B, n - K, d) -> (B, H, n - K, p)
    return (chosen.pick(h),), call | {attention.GIVEN: chosen}


def leave(child: Conditional, module: nn.Module, args: tuple, kwargs: dict, output):
    """The hook behind a layer."""
    return with_state(output, child.leave(state_of(output)))


class Columns(nn.Module):
    """In the attention of a layer that got the :class:`Chosen` tokens alone: their mask and position biases, and the
    other tokens' keys and values where there are some."""

    def forward(self, inputs: attention.Inputs) -> attention.Inputs:
        chosen = inputs.given
        if chosen is None:
            return inputs
        mask, bias = inputs.mask, inputs.position_bias
        if bias is not None:
            bias = _take(bias, chosen)  # (1 or B, H, n, n) -> (B, H, K, K or n)
        if mask is not None:
            mask = _take(mask, chosen)  # (1 or B, 1 or H, 1 or n, n) -> (B, 1 or H, 1 or K, K or n)
        if chosen.rest is None:
            own = chosen.valid[:, None, None]  # (B, 1, 1, K)
            if mask is None:
                mask = own
            elif mask.dtype == torch.bool:
                mask = mask & own  # (B, 1 or H, 1 or K, K)
            else:
                mask = mask.masked_fill(~own, torch.finfo(mask.dtype).min)  # (B, 1 or H, 1 or K, K)
            return replace(inputs, mask=mask, position_bias=bias)
        key, value = (
            torch.cat([mine, others.to(mine.dtype)], dim=2)
            for mine, others in zip((inputs.key, inputs.value), chosen.rest)
        )  # each (B, H, K, p) -> (B, H, n, p)
        return replace(inputs, key=key, value=value, mask=mask, position_bias=bias)


def _take(full: torch.Tensor, chosen: Chosen) -> torch.Tensor:
    """The chosen rows and the keys' columns of (B or 1, H or 1, n or 1, n)."""
    rows, columns = chosen.index, chosen.columns
    full = full.expand(len(rows), -1, -1, -1)
    if full.shape[2] > 1:
        full = full.gather(2, rows[:, None, :, None].expand(-1, full.shape[1], -1, full.shape[3]))
    return full.gather(3, columns[:, None, None, :].expand(-1, full.shape[1], full.shape[2], -1))
