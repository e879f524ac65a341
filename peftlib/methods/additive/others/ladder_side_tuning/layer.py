"""The side network of one stack: its layers are of the backbone's own class, r times narrower, and fed by ladders.

No gradient enters the backbone: its layers run on detached inputs and build no graph. When a stack has run, the side
network runs on the inputs and outputs of its layers, and its result replaces the stack's.

Shapes: b rows of t tokens; d hidden size of the backbone, d / r of the side network.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftlib.anatomy import Anatomy, Layer
from peftlib.errors import StateError, TargetError
from peftlib.mechanisms.cache import grow
from peftlib.mechanisms.call import Local
from peftlib.mechanisms.outputs import state_of, with_state
from peftlib.mechanisms.precision import cast

# Slim layers


def _reductions(anatomy: Anatomy) -> list[int]:
    """By what the backbone's sizes can be divided, the number of heads staying as it is."""
    rotary = hasattr(anatomy.base, "rotary_emb")
    heads = {anatomy.head_size(layer.attention) for layer in anatomy.layers}
    sizes = {anatomy.d, anatomy.f} | heads
    return [
        r
        for r in range(2, min(heads) + 1)
        if all(size % r == 0 for size in sizes) and not (rotary and any(p // r % 2 for p in heads))
    ]


def largest_reduction(anatomy: Anatomy, most: int) -> int | None:
    """The largest that is at most so large, None where there is none."""
    return max((r for r in _reductions(anatomy) if r <= most), default=None)


def check_reduction(anatomy: Anatomy, r: int) -> None:
    """Raise TargetError when the backbone's sizes cannot be divided by r."""
    rotary, possible = hasattr(anatomy.base, "rotary_emb"), _reductions(anatomy)
    if r not in possible:
        raise TargetError(
            f"reduction {r} does not divide this backbone (hidden size {anatomy.d}, inner size {anatomy.f}, head size "
            f"{anatomy.head_dim}{', whose part must be even for rotary positions' if rotary else ''}); "
            + (f"choose {' or '.join(map(str, possible))}" if possible else "no reduction does")
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
    """The arguments of a backbone layer, and its output h (b, t, d)."""

    args: tuple
    kwargs: dict[str, Any]
    output: torch.Tensor


class Run(Local):
    """The present forward of a stack: the ``calls`` of its layers by their index, and the side state of the encoder."""

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}
        self.encoder_state: torch.Tensor | None = None

    def take(self) -> tuple[dict[int, Call], torch.Tensor | None]:
        calls, encoder = self.calls, self.encoder_state
        self.calls, self.encoder_state = {}, None
        return calls, encoder


class Ladder(nn.Module):
    """The side network of one stack: ``s <- block_i(g_i s + (1 - g_i) (W_i h_i + b_i))``, ``g_i = sigmoid(gates[i] /
    temperature)``, for the output h_i of backbone layer i. The first s is a projection of the stack's input.

    ``blocks``, ``downs`` (W and b) and ``gates`` are those of the layers that are not ``dropped``.
    """

    def __init__(self, anatomy: Anatomy, stack: str, r: int, dropped: tuple[int, ...], temperature: float):
        super().__init__()
        layers = [layer for layer in anatomy.layers if layer.stack == stack]
        self.kept = tuple(layer.index for layer in layers if layer.index not in dropped)
        self.temperature = temperature
        self.bypassed = False
        self.now = Run()
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
        """The last side state (b, t, d / r), from the last calls of the backbone's layers."""
        calls, encoder = self.now.take()
        s = self.first(cast(calls[0].args[0], self.first.weight))  # (b, t, d) -> (b, t, d / r)
        shared = {"position_bias": None, "encoder_decoder_position_bias": None}
        for place, (index, block, down) in enumerate(zip(self.kept, self.blocks, self.downs)):
            g = torch.sigmoid(self.gates[place] / self.temperature)  # ()
            Wh = down(cast(calls[index].output, down.weight))  # (b, t, d) -> (b, t, d / r)
            own = {"encoder_hidden_states": encoder, **shared}
            args, kwargs = self._arguments(calls[index], g * s + (1 - g) * Wh, own)
            s = block(*args, **kwargs)  # (b, t, d / r)
            if isinstance(s, tuple):
                # T5: the first layer computes the position biases, the others get them from it.
                s, shared["position_bias"], shared["encoder_decoder_position_bias"] = s
        return self.norm(s)  # (b, t, d / r)

    def _arguments(self, call: Call, s: torch.Tensor, own: dict[str, Any]) -> tuple[list, dict[str, Any]]:
        """The backbone layer's arguments, with the side network's ``own`` where they depend on width."""
        values = dict(zip(self._names, call.args)) | call.kwargs
        own[self._names[0]] = s
        if values.get("position_embeddings") is not None:
            own["position_embeddings"] = self.rotary(s, values["position_ids"])
        if values.get("past_key_values") is not None:
            grow(values["past_key_values"], self._cached_layers)
        values |= {name: value for name, value in own.items() if name in values}
        return [values[n] for n in self._names[: len(call.args)]], {n: values[n] for n in call.kwargs}


# The hooks on the backbone


def detach(ladder: Ladder, module: nn.Module, args: tuple, kwargs: dict):
    """Before the first layer of a stack."""
    if ladder.bypassed:
        return None
    ladder.now.calls = {}
    return (args[0].detach(), *args[1:]), kwargs


def record(ladder: Ladder, index: int, module: nn.Module, args: tuple, kwargs: dict, output):
    """Behind each layer."""
    if not ladder.bypassed:
        ladder.now.calls[index] = Call(args, kwargs, state_of(output).detach())


def replace(ladder: Ladder, module: nn.Module, args: tuple, kwargs: dict, output):
    """Behind a stack: its result becomes the side network's. An encoder's keeps the backbone's and carries the side
    state in additional columns, so that whatever repeats or reorders it on the way to the decoder does it to both."""
    if ladder.bypassed:
        return None
    h = state_of(output)  # (b, t, d)
    s = ladder()  # (b, t, d / r)
    if ladder.up is None:
        return with_state(output, torch.cat([h.detach(), s.to(h.dtype)], dim=-1))  # (b, t, d + d / r)
    return with_state(output, ladder.up(s).to(h.dtype))  # (b, t, d / r) -> (b, t, d)


def split(ladder: Ladder, d: int, module: nn.Module, args: tuple, kwargs: dict):
    """Before a decoder that has an encoder: take the encoder's result apart for the backbone and the side network."""
    both = kwargs.get("encoder_hidden_states")
    if ladder.bypassed or both is None:
        return None
    size = ladder.first.out_features
    if both.shape[-1] != d + size:
        raise StateError(
            f"the decoder was given an encoder output of width {both.shape[-1]}; with a side network it must come from "
            f"this model's own encoder, whose output is {d} + {size} wide"
        )
    ladder.now.encoder_state = cast(both[..., d:], ladder.first.weight)  # (b, t, d + d / r) -> (b, t, d / r)
    return args, kwargs | {"encoder_hidden_states": both[..., :d].detach()}  # (b, t, d + d / r) -> (b, t, d)
