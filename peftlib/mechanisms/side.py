"""A slim network beside the backbone: its layers are the backbone's own classes, r times narrower, fed by ladders.

No gradient enters the backbone: its layers run on detached inputs and build no graph, and their outputs go to the side
network alone. When a stack has run, the side network runs on what each layer was given and what it gave, and its
result takes the place of the stack's.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftlib.anatomy import Anatomy, Layer, Site
from peftlib.errors import StateError, TargetError, UnsupportedError
from peftlib.mechanisms.cache import grow
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.outputs import state_of, with_state
from peftlib.mechanisms.precision import cast

# Slim layers


def check_reduction(anatomy: Anatomy, r: int) -> None:
    """Raise TargetError when the backbone's sizes cannot be divided by r, the number of heads staying as it is."""
    rotary = hasattr(anatomy.base, "rotary_emb")

    def fits(r: int) -> bool:
        whole = all(size % r == 0 for size in (anatomy.d, anatomy.f, anatomy.head_dim))
        return whole and (not rotary or anatomy.head_dim // r % 2 == 0)

    if not fits(r):
        possible = [str(n) for n in range(2, anatomy.head_dim + 1) if fits(n)]
        raise TargetError(
            f"reduction {r} does not divide this backbone (hidden size {anatomy.d}, inner size {anatomy.f}, head size "
            f"{anatomy.head_dim}{', whose part must be even for rotary positions' if rotary else ''}); "
            + (f"choose {' or '.join(possible)}" if possible else "no reduction does")
        )


def slim_config(anatomy: Anatomy, layer: Layer, r: int):
    """The layer's config with hidden, inner and head sizes divided by r."""
    before = layer.attention.config
    config = copy.deepcopy(before)
    config.hidden_size = anatomy.d // r
    setattr(config, anatomy.family.inner, anatomy.f // r)
    for name in ("decoder_ffn_dim", "head_dim", "d_kv"):
        # From the original: one of these names may be another's alias.
        if getattr(before, name, None):
            setattr(config, name, getattr(before, name) // r)
    return config


def slim_layer(layer: Layer, config: Any, first: bool, cache_index: int) -> nn.Module:
    """A new layer of the same class for a slim config. ``first`` of its stack, it owns relative position biases where
    the family has them; its keys and values are the ``cache_index``-th of a cache."""
    cls = type(layer.module)
    known = inspect.signature(cls.__init__).parameters
    options = {"layer_idx": layer.index, "has_relative_attention_bias": first}
    slim = cls(config, **{n: v for n, v in options.items() if n in known})
    for module in slim.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = cache_index
    return slim


def slim_norm(norm: nn.Module, size: int) -> nn.Module:
    """A new norm of the same class and settings over ``size`` features."""
    slim = copy.deepcopy(norm)
    for name, _ in list(slim.named_parameters()):
        setattr(slim, name, nn.Parameter(torch.ones(size) if name == "weight" else torch.zeros(size)))
    if hasattr(slim, "normalized_shape"):
        slim.normalized_shape = (size,)
    return slim


# The ladder of one stack


@dataclass
class Call:
    """How a backbone layer was called, and what it gave."""

    args: tuple
    kwargs: dict[str, Any]
    output: torch.Tensor


class Ladder(nn.Module):
    """The side network of one stack.

    Before side layer i its state s is mixed with the output h of backbone layer i:
    ``s <- g s + (1 - g) (W_i h + b_i)``, ``g = sigmoid(gates[i] / temperature)``. The first state is a projection of
    the stack's input. Shapes: h (B, n, d), s (B, n, d / r). ``blocks``, ``downs`` and ``gates`` are those of the kept
    layers.
    """

    def __init__(self, anatomy: Anatomy, stack: str, r: int, dropped: tuple[int, ...], temperature: float):
        super().__init__()
        layers = [layer for layer in anatomy.layers if layer.stack == stack]
        self.kept = tuple(layer.index for layer in layers if layer.index not in dropped)
        self.temperature = temperature
        self.bypassed = False
        self.calls: dict[int, Call] = {}
        self.encoder_state: torch.Tensor | None = None
        d, size = anatomy.d, anatomy.d // r
        config = slim_config(anatomy, layers[0], r)
        self.blocks = nn.ModuleList(
            slim_layer(layers[index], config, place == 0, len(layers) + place) for place, index in enumerate(self.kept)
        )
        self.first = nn.Linear(d, size)
        self.downs = nn.ModuleList(nn.Linear(d, size) for _ in self.kept)
        self.gates = nn.Parameter(torch.zeros(len(self.kept)))
        norm = anatomy.final_norm(stack)
        self.norm = nn.Identity() if norm is None else slim_norm(norm, size)
        self.up = nn.Linear(size, d) if stack == anatomy.stacks[-1] else None
        rotary = getattr(anatomy.base, "rotary_emb", None)
        self.rotary = None if rotary is None else type(rotary)(config)
        self._names = tuple(inspect.signature(layers[0].module.forward).parameters)
        self._cached_layers = len(layers) + len(self.kept)

    def forward(self) -> torch.Tensor:
        """The last side state (B, n, d / r) for the calls that the backbone's layers have just had."""
        calls, self.calls = self.calls, {}
        encoder, self.encoder_state = self.encoder_state, None
        state = self.first(cast(calls[0].args[0], self.first.weight))
        shared = {"position_bias": None, "encoder_decoder_position_bias": None}
        for place, (index, block, down) in enumerate(zip(self.kept, self.blocks, self.downs)):
            gate = torch.sigmoid(self.gates[place] / self.temperature)
            ladder = down(cast(calls[index].output, down.weight))
            own = {"encoder_hidden_states": encoder, **shared}
            args, kwargs = self._arguments(calls[index], gate * state + (1 - gate) * ladder, own)
            state = block(*args, **kwargs)
            if isinstance(state, tuple):
                # T5: the first layer makes the position biases, the others get them from it.
                state, shared["position_bias"], shared["encoder_decoder_position_bias"] = state
        return self.norm(state)

    def _arguments(self, call: Call, state: torch.Tensor, own: dict[str, Any]) -> tuple[list, dict[str, Any]]:
        """The backbone layer's arguments, with the side network's ``own`` where they depend on width."""
        values = dict(zip(self._names, call.args)) | call.kwargs
        own[self._names[0]] = state
        if values.get("position_embeddings") is not None:
            own["position_embeddings"] = self.rotary(state, values["position_ids"])
        if values.get("past_key_values") is not None:
            grow(values["past_key_values"], self._cached_layers)
        values |= {name: value for name, value in own.items() if name in values}
        return [values[n] for n in self._names[: len(call.args)]], {n: values[n] for n in call.kwargs}


# The seams


def attach(host: Host, name: str, r: int, dropped: tuple[int, ...], temperature: float) -> dict[str, Ladder]:
    """A ladder beside each stack of the host, by the stack's name; r divides its sizes, ``dropped`` are the layers
    without a side layer."""
    anatomy = host.anatomy
    check_reduction(anatomy, r)
    ladders = {}
    for stack in anatomy.stacks:
        layers = [layer for layer in anatomy.layers if layer.stack == stack]
        holder = anatomy.holder(stack)
        if getattr(holder, "layerdrop", 0):
            raise UnsupportedError(
                f"{type(holder).__name__} leaves out layers at random while training (layerdrop "
                f"{holder.layerdrop}), and a ladder needs every layer's output; set the config's layerdrop to 0"
            )
        if not set(range(len(layers))) - set(dropped):
            raise TargetError(f"dropped_layers={dropped!r} leaves no layer of the {stack}'s {len(layers)}; drop fewer")
        ladder = host.add(holder, name, Ladder(anatomy, stack, r, dropped, temperature))
        ladders[stack] = ladder
        if len(ladders) == 2:
            host.hook(holder, _split, ladder, anatomy.d, before=True)
        host.hook(layers[0].module, _detach, ladder, before=True)
        for layer in layers:
            host.hook(layer.module, _record, ladder, layer.index)
        host.hook(anatomy.final_norm(stack) or holder, _replace, ladder)
    return ladders


def _detach(ladder: Ladder, module: nn.Module, args: tuple, kwargs: dict):
    if ladder.bypassed:
        return None
    ladder.calls = {}
    return (args[0].detach(), *args[1:]), kwargs


def _record(ladder: Ladder, index: int, module: nn.Module, args: tuple, kwargs: dict, output):
    if not ladder.bypassed:
        ladder.calls[index] = Call(args, kwargs, state_of(output).detach())


def _replace(ladder: Ladder, module: nn.Module, args: tuple, kwargs: dict, output):
    """The stack's result becomes the side network's. An encoder's keeps the backbone's and carries the side state in
    additional columns, so that whatever repeats or reorders it on the way to the decoder does it to both."""
    if ladder.bypassed:
        return None
    before = state_of(output)
    state = ladder()
    if ladder.up is None:
        state = torch.cat([before.detach(), state.to(before.dtype)], dim=-1)
    else:
        state = ladder.up(state).to(before.dtype)
    return with_state(output, state)


def _split(ladder: Ladder, d: int, module: nn.Module, args: tuple, kwargs: dict):
    """Take the encoder's result apart for the two decoders."""
    both = kwargs.get("encoder_hidden_states")
    if ladder.bypassed or both is None:
        return None
    size = ladder.first.out_features
    if both.shape[-1] != d + size:
        raise StateError(
            f"the decoder was given an encoder output of width {both.shape[-1]}; with a side network it must come from "
            f"this model's own encoder, whose output is {d} + {size} wide"
        )
    ladder.encoder_state = cast(both[..., d:], ladder.first.weight)
    return args, kwargs | {"encoder_hidden_states": both[..., :d].detach()}


# Structural pruning of the backbone's weights


class Importance:
    """How much each entry of a weight matters: its size, or what ``scores`` says of the parameter (by id)."""

    def __init__(self, scores: dict[int, torch.Tensor] | None = None):
        self.scores = scores

    def matrix(self, site: Site) -> torch.Tensor:
        """(out, in), in float64: products of squared gradients are too small for float32."""
        scores = self.of(site.module.weight)
        return (scores.T if site.transposed else scores)[site.rows]

    def of(self, parameter: nn.Parameter) -> torch.Tensor:
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
        state = _top(importance.of(embedding).sum(0), size)
    else:
        state = _top(importance.matrix(layers[0].sites["attention.query"]).sum(0), size)
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
                _copy_norm(slim, layer, block, state)
            if block == "ffn":
                state = _prune_ffn(slim, layer, state, r, importance)
            else:
                state = _prune_attention(slim, layer, block, state, anatomy.head_dim, r, importance)
            if not layer.pre_norm:
                _copy_norm(slim, layer, block, state)
    if (norm := anatomy.final_norm(stack)) is not None:
        _select(ladder.norm, norm, state)


def _prune_attention(
    slim: Layer | None, layer: Layer, block: str, state: torch.Tensor, p: int, r: int, importance: Importance
) -> torch.Tensor:
    """Prune one attention block with heads of size p; gives the kept rows of its output. ``slim`` of None: only choose
    them."""
    query, key, value, output = (layer.sites[f"{block}.{n}"] for n in ("query", "key", "value", "output"))
    groups = key.out_features // p
    scores = importance.matrix(query)[:, state].view(groups, -1, p, len(state)).mean(1)
    for site in (key, value):
        scores = scores * importance.matrix(site)[:, state].view(groups, p, len(state))
    inside = scores.sum(-1).topk(p // r).indices.sort().values
    rows_kv = (inside + p * torch.arange(groups, device=inside.device)[:, None]).flatten()
    heads = query.out_features // p
    inside = inside.repeat_interleave(heads // groups, dim=0)
    rows_q = (inside + p * torch.arange(heads, device=inside.device)[:, None]).flatten()
    rows = _top(importance.matrix(output)[:, rows_q].sum(1), output.out_features // r)
    for site, kept in ((query, rows_q), (key, rows_kv), (value, rows_kv)):
        _copy_site(slim, site, kept, state)
    _copy_site(slim, output, rows, rows_q)
    return rows


def _prune_ffn(slim: Layer | None, layer: Layer, state: torch.Tensor, r: int, importance: Importance) -> torch.Tensor:
    into = [layer.sites[n] for n in ("ffn.up", "ffn.gate") if n in layer.sites]
    down = layer.sites["ffn.down"]
    scores = importance.matrix(into[0])[:, state]
    for site in into[1:]:
        scores = scores * importance.matrix(site)[:, state]
    inner = _top(scores.sum(1), down.in_features // r)
    rows = _top(importance.matrix(down)[:, inner].sum(1), down.out_features // r)
    for site in into:
        _copy_site(slim, site, inner, state)
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


def _copy_norm(slim: Layer | None, layer: Layer, block: str, state: torch.Tensor) -> None:
    if slim is not None:
        _select(slim.norms[block], layer.norms[block], state)


def _select(target: nn.Module, norm: nn.Module, state: torch.Tensor) -> None:
    for mine, its in zip(target.parameters(), norm.parameters()):
        mine.copy_(its[state])


def _copy_others(slim: Layer, others: dict[str, nn.Parameter]) -> None:
    """What does not depend on the width, T5's relative position biases, stays whole."""
    for name, parameter in slim.module.named_parameters():
        if name in others and others[name].shape == parameter.shape:
            parameter.copy_(others[name])
