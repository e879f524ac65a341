"""The seam at single tokens: vectors added to the hidden states of the tokens that have certain ids.

A layer sees hidden states and no ids. So :func:`attach` looks at the ids once a forward, where they enter the first
stack (the encoder of encoder-decoder models), and the layers' children take the places from there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.errors import UnsupportedError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.positions import by_name, names, past_length


class Places(nn.Module):
    """Where the tokens of ``ids`` stand in the input that is going through: ``now`` (B, n) is k at the k-th of them in
    a row, counted from 1 up to ``count``, and 0 at all other tokens and at padding. None between two forwards."""

    def __init__(self, ids: tuple[int, ...], count: int):
        super().__init__()
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        self.count = count
        self.now: torch.Tensor | None = None

    def find(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        chosen = torch.isin(input_ids, self.ids)
        if mask is not None:
            chosen = chosen & mask.bool()
        place = chosen.long().cumsum(dim=1) * chosen
        return place * (place <= self.count)


class TokenVectors(nn.Module):
    """``vectors`` (count, d), of which the k-th is added, through ``dropout``, where the place is k. N(0, std) at the
    start. Hidden states (B, n, d) at place 0 stay as they are, bit for bit."""

    def __init__(self, count: int, d: int, std: float, dropout: float):
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(count, d).normal_(std=std))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        added = self.dropout(F.embedding(place, F.pad(self.vectors, (0, 0, 1, 0))))
        return torch.where(place[..., None] > 0, (hidden + added).to(hidden.dtype), hidden)


def attach(host: Host, name: str, ids: tuple[int, ...], count: int, std: float, dropout: float) -> None:
    """Add trained vectors at the input of every layer of the first stack, at the first ``count`` tokens of each text
    whose id is one of ``ids``.

    With a cache they act on the tokens of its first call. When the model is called, an input without ids, or one that
    something else has made longer, is an UnsupportedError.
    """
    parts = host.anatomy
    stack = parts.stacks[0]
    module = parts.stack_inputs(stack)
    places = host.add(module, f"{name}_places", Places(ids, count))
    host.hook(module, _find, places, names(module), before=True)
    for layer in parts.layers:
        if layer.stack == stack:
            child = host.add(layer.module, name, TokenVectors(count, parts.d, std, dropout))
            host.hook(layer.module, _add, child, places, before=True)
    host.hook(module, _forget, places)


def _find(places: Places, order: tuple[str, ...], module: nn.Module, args: tuple, kwargs: dict) -> None:
    call = by_name(order, args, kwargs)
    ids, mask = call.get("input_ids"), call.get("attention_mask")
    if ids is None:
        raise UnsupportedError(
            "vectors for special tokens are placed by the tokens' ids, and the model was given embeddings without ids; "
            "call it with input_ids"
        )
    if past_length(call) > 0:
        places.now = torch.zeros_like(ids)
    else:
        places.now = places.find(ids, mask if isinstance(mask, torch.Tensor) and mask.shape == ids.shape else None)


def _add(child: TokenVectors, places: Places, module: nn.Module, args: tuple, kwargs: dict):
    hidden, *others = args
    if hidden.shape[:2] != places.now.shape:
        raise UnsupportedError(
            f"special tokens were found among {places.now.shape[1]} tokens, and the layers get {hidden.shape[1]}: "
            "something else adds positions to the input, which does not go with vectors for special tokens"
        )
    return (child(hidden, places.now), *others), kwargs


def _forget(places: Places, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
    places.now = None
