r"""Ladder side-tuning: a slim transformer beside the backbone, fed by gated ladders; no gradient enters the backbone.

.. math:: s_\ell = \mathrm{Side}_\ell\bigl(g_\ell\, s_{\ell-1} + (1 - g_\ell)(W_\ell h_\ell + b_\ell)\bigr), \qquad
          g_\ell = \sigma(\alpha_\ell / T)

Shapes, with b rows of t tokens: h (b, t, d), the output of backbone layer l; s (b, t, d/r); W (d/r, d). Side layers are
of the backbone's class with hidden, inner and head sizes divided by r and the same number of heads. s_0 is a projection
of the embeddings; the last state, behind a slim final norm where the family has one, is projected back to d and given
to the frozen head in the place of the backbone's own. alpha starts at 0, so g at 1/2: the start is not the backbone's
output. Trained: side layers, projections, gates. No merge: it is a network of its own.

``init="fisher"`` fills the side layers with the backbone's most important rows and columns by squared gradients of
``samples`` training rows (in :func:`calibrate`), "magnitude" by the weights' size, "random" not at all.

Source: Sung et al. 2022, arXiv:2206.06522, and its code: r = 8, T = 0.1, 1,024 samples; on T5-base side layers 0, 4 and
8 of each stack are dropped (``dropped_layers``; here none by default). Theirs picks the rows of queries, keys and
values across heads; here each head keeps its own most important ones, which grouped keys need and which keeps heads
whole. Gradients are those of the whole model's loss with the task head as it is. An encoder hands its side state to the
decoder's side layers as additional columns of its output. Keys and values of side layers live in the same cache as the
backbone's, which must be a dynamic one. ``output_hidden_states`` lists the side layers' states too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from peftlib.anatomy import Anatomy, Layer, Site
from peftlib.errors import TargetError, UnknownNameError, UnsupportedError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.importance import per_example
from peftlib.methods.additive.others.ladder_side_tuning.layer import (
    Ladder,
    check_reduction,
    detach,
    largest_reduction,
    record,
    replace,
    split,
)
from peftlib.methods.base import ConfigError, Method, MethodConfig, at_least, fitted, is_default

INITS = ("fisher", "magnitude", "random")


@dataclass(frozen=True)
class LadderSideTuningConfig(MethodConfig):
    """``reduction`` r, ``dropped_layers`` (indices in each stack that get no side layer), ``temperature`` T, ``init``
    and its ``samples`` (rows whose gradients are taken)."""

    reduction: int = 8
    dropped_layers: tuple[int, ...] = ()
    temperature: float = 0.1
    init: Literal["fisher", "magnitude", "random"] = "fisher"
    samples: int = 1024

    def __post_init__(self):
        at_least("reduction", self.reduction, 2)
        at_least("samples", self.samples, 1)
        if not self.temperature > 0:
            raise ConfigError(f"temperature={self.temperature!r} must be above 0")
        if self.init not in INITS:
            raise UnknownNameError("init", self.init, INITS)


class LadderSideTuning(Method):
    Config = LadderSideTuningConfig
    learning_rate = 5e-4

    def __init__(self, config: LadderSideTuningConfig):
        super().__init__(config)
        self.calibrates = config.init == "fisher"

    def attach(self, host: Host) -> None:
        parts, reduction = host.anatomy, self.config.reduction
        if (fit := largest_reduction(parts, reduction)) and fit < reduction and is_default(self.config, "reduction"):
            self.config = fitted(self.config, type(host.model).__name__, reduction=fit)
        c = self.config
        check_reduction(parts, c.reduction)
        if c.init == "fisher":
            host.check_dense(parts.sites())
        self.ladders = {stack: self._attach(host, stack) for stack in parts.stacks}
        if c.init != "random" and not parts.embeddings.weight.is_meta:
            self._prune(Importance())

    def _attach(self, host: Host, stack: str) -> Ladder:
        c, parts = self.config, host.anatomy
        layers = [layer for layer in parts.layers if layer.stack == stack]
        holder = parts.holder(stack)
        if getattr(holder, "layerdrop", 0):
            raise UnsupportedError(
                f"{type(holder).__name__} leaves out layers at random while training (layerdrop "
                f"{holder.layerdrop}), and a ladder needs every layer's output; set the config's layerdrop to 0"
            )
        if not set(range(len(layers))) - set(c.dropped_layers):
            raise TargetError(
                f"dropped_layers={c.dropped_layers!r} leaves no layer of the {stack}'s {len(layers)}; drop fewer"
            )
        ladder = host.add(holder, self.name, Ladder(parts, stack, c.reduction, c.dropped_layers, c.temperature))
        if stack != parts.stacks[0]:
            host.hook(holder, split, ladder, parts.d, before=True)
        host.hook(layers[0].module, detach, ladder, before=True)
        for layer in layers:
            host.hook(layer.module, record, ladder, layer.index)
        host.hook(parts.end(stack), replace, ladder)
        return ladder

    def calibrate(self, batches: Iterable[dict[str, torch.Tensor]], checkpoint: Path | None = None) -> None:
        parameters = scored_parameters(self.host.anatomy)
        for ladder in self.ladders.values():
            ladder.bypassed = True
        try:
            sums = per_example(self.host.model, parameters, batches, self.config.samples)
        finally:
            for ladder in self.ladders.values():
                ladder.bypassed = False
        self._prune(Importance({id(p): total for p, total in zip(parameters, sums)}))

    def _prune(self, importance: Importance) -> None:
        for stack, ladder in self.ladders.items():
            prune_into(ladder, self.host.anatomy, stack, self.config.reduction, importance)


# Structural pruning of the backbone's weights: rows and columns that are kept, as ascending indices


class Importance:
    """How much each entry of a weight matters: its ``scores`` by the parameter's id, or without them its size."""

    def __init__(self, scores: dict[int, torch.Tensor] | None = None):
        self.scores = scores

    def matrix(self, site: Site) -> torch.Tensor:
        """(out, in), in float64: products of squared gradients are too small for float32."""
        if self.scores is None:
            return self.of(site.weight)
        scores = self.of(site.module.weight)
        return (scores.T if site.transposed else scores)[site.rows]

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        return (parameter.detach().abs() if self.scores is None else self.scores[id(parameter)]).double()


def scored_parameters(anatomy: Anatomy) -> list[nn.Parameter]:
    """The matrices whose importance pruning asks for."""
    weights = [site.module.weight for site in anatomy.sites()]
    return list({id(p): p for p in [anatomy.embeddings.weight, *weights]}.values())


@torch.no_grad()
def prune_into(ladder: Ladder, anatomy: Anatomy, stack: str, r: int, importance: Importance) -> None:
    """Fill the ladder's layers and norm with the most important rows and columns of the backbone's.

    The rows that a map keeps are the columns that the next one keeps. Queries, keys and values (of one head) keep the
    same rows, by the summed product of their importances; so do the two maps into a gated feed-forward block.
    """
    size = anatomy.d // r
    layers = [layer for layer in anatomy.layers if layer.stack == stack]
    embedding = anatomy.embeddings.weight
    if embedding.shape[1] == anatomy.d:
        columns = _top(importance.of(embedding).sum(0), size)
    else:
        columns = _top(importance.matrix(layers[0].sites["attention.query"]).sum(0), size)
    others = dict(layers[0].module.named_parameters())
    for layer in layers:
        slim = None
        if layer.index in ladder.kept:
            slim = anatomy.like(layer, ladder.blocks[ladder.kept.index(layer.index)])
            _copy_others(slim, others)
        for block in ("attention", "cross_attention", "ffn"):
            if block not in layer.norms:
                continue
            if layer.pre_norm:
                _copy_norm(slim, layer, block, columns)
            if block == "ffn":
                columns = _prune_ffn(slim, layer, columns, r, importance)
            else:
                size = anatomy.head_size(layer.attention)
                columns = _prune_attention(slim, layer, block, columns, size, r, importance)
            if not layer.pre_norm:
                _copy_norm(slim, layer, block, columns)
    if (norm := anatomy.final_norm(stack)) is not None:
        _select(ladder.norm, norm, columns)


def _prune_attention(
    slim: Layer | None, layer: Layer, block: str, columns: torch.Tensor, p: int, r: int, importance: Importance
) -> torch.Tensor:
    """Fill one attention block, with H heads of size p and G heads of keys, from kept ``columns`` (d / r,) of its
    input; gives the kept rows (d / r,) of its output. Without a ``slim`` layer the rows are only chosen."""
    query, key, value, output = (layer.sites[f"{block}.{n}"] for n in ("query", "key", "value", "output"))
    H, G = query.out_features // p, key.out_features // p
    scores = importance.matrix(query)[:, columns].view(G, -1, p, len(columns)).mean(1)  # (H p, d) -> (G, p, d / r)
    for site in (key, value):
        scores = scores * importance.matrix(site)[:, columns].view(G, p, len(columns))  # (G, p, d / r)
    inside = scores.sum(-1).topk(p // r).indices.sort().values  # (G, p, d / r) -> (G, p / r)
    rows_kv = (inside + p * torch.arange(G, device=inside.device)[:, None]).flatten()  # (G p / r,)
    inside = inside.repeat_interleave(H // G, dim=0)  # (G, p / r) -> (H, p / r)
    rows_q = (inside + p * torch.arange(H, device=inside.device)[:, None]).flatten()  # (H p / r,)
    rows = _top(importance.matrix(output)[:, rows_q].sum(1), output.out_features // r)  # (d, H p) -> (d / r,)
    for site, kept in ((query, rows_q), (key, rows_kv), (value, rows_kv)):
        _copy_site(slim, site, kept, columns)
    _copy_site(slim, output, rows, rows_q)
    return rows


def _prune_ffn(slim: Layer | None, layer: Layer, columns: torch.Tensor, r: int, importance: Importance) -> torch.Tensor:
    """The same for a feed-forward block of inner size f."""
    into = [layer.sites[n] for n in ("ffn.up", "ffn.gate") if n in layer.sites]
    down = layer.sites["ffn.down"]
    scores = importance.matrix(into[0])[:, columns]  # (f, d) -> (f, d / r)
    for site in into[1:]:
        scores = scores * importance.matrix(site)[:, columns]  # (f, d / r)
    inner = _top(scores.sum(1), down.in_features // r)  # (f, d / r) -> (f / r,)
    rows = _top(importance.matrix(down)[:, inner].sum(1), down.out_features // r)  # (d, f) -> (d / r,)
    for site in into:
        _copy_site(slim, site, inner, columns)
    _copy_site(slim, down, rows, inner)
    return rows


def _top(scores: torch.Tensor, count: int) -> torch.Tensor:
    return scores.topk(count).indices.sort().values


def _copy_site(slim: Layer | None, site: Site, rows: torch.Tensor, columns: torch.Tensor) -> None:
    if slim is None:
        return
    target = slim.sites[site.name]
    target.weight.copy_(site.weight[rows][:, columns])
    if site.bias is not None:
        target.bias.copy_(site.bias[rows])


def _copy_norm(slim: Layer | None, layer: Layer, block: str, columns: torch.Tensor) -> None:
    if slim is not None:
        _select(slim.norms[block], layer.norms[block], columns)


def _select(target: nn.Module, norm: nn.Module, columns: torch.Tensor) -> None:
    for mine, its in zip(target.parameters(), norm.parameters()):
        mine.copy_(its[columns])


def _copy_others(slim: Layer, others: dict[str, nn.Parameter]) -> None:
    """Copy whole what does not depend on the width, T5's relative position biases."""
    for name, parameter in slim.module.named_parameters():
        if name in others and others[name].shape == parameter.shape:
            parameter.copy_(others[name])
