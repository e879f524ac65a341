r"""LoReFT: a low-rank edit of the hidden states behind the layers, at the first and last tokens of the prompt.

.. math:: h \leftarrow h + R^\top (W h + b - R h)

Shapes: h (d,), a layer's output at one token; R (r, d) with orthonormal rows, W (r, d), b (r,). The ``form`` is the
paper's or one of its ablations: ``direft`` h + R^T (W h + b); ``consreft`` h + R^T (b - R h); ``lobireft`` h + R^T b;
``noreft`` and ``nodireft`` are LoReFT and DiReFT with any matrix R. R starts random and W and b as a linear layer, or b
alone in [0, 1), so the start is not the identity. No merge: a weight acts on all tokens. Trained: 2 r d + r a layer,
twice that without ``tied`` (one edit for the first and one for the last tokens), r d + r where there is no W.

The prompt is the input without padding. While a causal language model generates, with or without a cache, it is what
generate() was given; where its labels leave out (-100) the tokens in front, as in training on answers alone, it is
those. Of n tokens the first min(``first``, n // 2) and the last min(``last``, n // 2) are edited. Encoder-decoder
models have their prompt, and so the edits, in the encoder.

Source: Wu et al. 2024, arXiv:2404.03592, and their code: r = 8, 7 and 7 tokens, all layers, tied, for LLaMA on
commonsense; r = 1 and the first token for GLUE; r = 4, 5 and 5 tokens, 4 layers, not tied, for instructions.

Where we differ: R^T is the first columns of r Householder reflections H_1 ... H_r. Their torch parametrization turns
these by a random (d, d) matrix, which every layer keeps. Here there is none: a file holds the reflections and loads
exactly, weight decay does no harm, and R moves about half as far for the same step. W and b are float32, theirs have
the backbone's dtype. Where a prompt is short, they also edit a padding token in front of it, which nothing sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from peftlib.errors import ConfigError, TargetError, UnsupportedError
from peftlib.mechanisms.call import Local
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.positions import by_name, names, past_length, refuse_packed
from peftlib.mechanisms.precision import cast, without_autocast
from peftlib.methods.base import Method, MethodConfig, at_least, one_of

FORMS = {
    "loreft": (True, True, True),
    "direft": (True, True, False),
    "noreft": (False, True, True),
    "nodireft": (False, True, False),
    "consreft": (True, False, True),
    "lobireft": (True, False, False),
}
"""Whether R is orthonormal, whether there is a W, and whether R h is taken away."""


@dataclass(frozen=True)
class LoReFTConfig(MethodConfig):
    """``rank`` r, how many of the ``first`` and ``last`` tokens, ``layers`` (all for None), ``tied``, ``form``,
    ``dropout`` on the edited states."""

    rank: int = 8
    first: int = 7
    last: int = 7
    layers: tuple[int, ...] | None = None
    tied: bool = True
    form: str = "loreft"
    dropout: float = 0.0

    def __post_init__(self):
        at_least("rank", self.rank, 1)
        at_least("first", self.first, 0)
        at_least("last", self.last, 0 if self.first else 1)
        one_of("form", self.form, FORMS)
        if self.layers is not None and not self.layers:
            raise ConfigError("layers is empty; name at least one, or None for all")


class Orthonormal(nn.Module):
    """``forward() = R`` (r, d) with orthonormal rows: R^T is the first r columns of H_1 ... H_r, the reflections
    I - 2 v v^T / |v|^2. ``V`` (r, d) has their vectors v as rows, to the right of a diagonal of ones."""

    def __init__(self, r: int, d: int):
        super().__init__()
        # The reflections that a QR decomposition of a random normal (d, r) matrix has: R starts uniformly distributed.
        x = torch.randn(r, d).triu()
        corner = x.diagonal() + x.diagonal().sign() * x.norm(dim=1)
        self.V = nn.Parameter(x.triu(1) / corner[:, None])

    def forward(self) -> torch.Tensor:
        V = self.V.to(torch.promote_types(self.V.dtype, torch.float32))
        r, one = len(V), torch.eye(*V.shape, dtype=V.dtype, device=V.device)
        with without_autocast(V):
            V = V.triu(1) + one  # (r, d)
            S = V @ V.T  # (r, r)
            T = S.tril(-1) + torch.diag(S.diagonal() / 2)  # (r, r)
            return one - V[:, :r].T @ torch.linalg.solve_triangular(T, V, upper=False)  # (r, d)


class Free(nn.Module):
    """``forward() = R`` (r, d), any matrix, which starts as a linear layer's."""

    def __init__(self, r: int, d: int):
        super().__init__()
        self.R = nn.Parameter(torch.empty(r, d).uniform_(-1 / math.sqrt(d), 1 / math.sqrt(d)))

    def forward(self) -> torch.Tensor:
        return self.R


class Now(Local):
    """Of the present call: which tokens are edited, ``first`` and ``last`` (b, t, 1), None where a cache holds the
    prompt already; the ``labels``; and how long the inputs are that generate() was given, ``prompt``."""

    def __init__(self) -> None:
        self.first: torch.Tensor | None = None
        self.last: torch.Tensor | None = None
        self.labels: torch.Tensor | None = None
        self.prompt: int | None = None


class Tokens(nn.Module):
    """Which tokens of the input in the model are edited: ``first`` and ``last`` of a text at most."""

    def __init__(self, first: int, last: int):
        super().__init__()
        self.counts = first, last
        self.now = Now()

    def see(self, call: dict) -> None:
        """Choose the tokens of this call of the stack."""
        refuse_packed(call, "loreft finds the ends of one text a row")
        now = self.now
        labels, now.labels = now.labels, None
        ids, mask, past = call.get("input_ids"), call.get("attention_mask"), past_length(call)
        given = call["inputs_embeds"] if ids is None else ids
        b, t = given.shape[:2]
        if past and past >= (now.prompt or 0):
            now.first = now.last = None
            return
        if past + t < (now.prompt or 0):
            raise UnsupportedError(
                f"loreft edits the last tokens of a prompt and got the first {past + t} of {now.prompt} alone; "
                "generate without prefill_chunk_size"
            )
        real = torch.ones(b, past + t, dtype=torch.bool, device=given.device) if mask is None else mask.bool()
        if real.dim() != 2:
            raise UnsupportedError(
                f"loreft finds its tokens in an attention mask of shape (batch, tokens), and got {tuple(mask.shape)}"
            )
        if now.prompt is not None:
            real = real & (torch.arange(real.shape[1], device=real.device) < now.prompt)
        if labels is not None and labels.shape == real.shape:
            front = real & ((labels != -100).cumsum(1) == 0)
            real = torch.where(front.any(1, keepdim=True), front, real)
        place = real.cumsum(1)  # (b, past + t), from 1
        n = place[:, -1:]  # (b, 1)
        first, last = ((n // 2).clamp(max=count) for count in self.counts)
        now.first = (real & (place <= first))[:, -t:, None]
        now.last = (real & (place > n - last))[:, -t:, None]

    def places(self, part: str) -> torch.Tensor | None:
        """(b, t, 1) for ``"first"``, ``"last"`` or ``"both"``."""
        first, last = self.now.first, self.now.last
        if part != "both" or first is None:
            return last if part == "last" else first
        return first | last


class Edit(nn.Module):
    """``forward(h)`` for h (b, t, d): the edited states at the tokens of ``part``, h elsewhere."""

    def __init__(self, d: int, rank: int, form: str, dropout: float, tokens: Tokens, part: str):
        super().__init__()
        orthonormal, maps, self.subtracts = FORMS[form]
        self.R = (Orthonormal if orthonormal else Free)(rank, d)
        bound = 1 / math.sqrt(d)
        self.W = nn.Parameter(torch.empty(rank, d).uniform_(-bound, bound)) if maps else None
        self.b = nn.Parameter(torch.empty(rank).uniform_(-bound if maps else 0, bound if maps else 1))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.tokens, self.part = tokens, part

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        places = self.tokens.places(self.part)
        if places is None:
            return h
        R, x = self.R(), cast(h, self.b)
        change = self.b if self.W is None else x @ self.W.T + self.b  # (b, t, d) -> (b, t, r)
        if self.subtracts:
            change = change - x @ R.T  # (b, t, r)
        edited = self.dropout((x + change @ R).to(h.dtype))  # (b, t, r) -> (b, t, d)
        return torch.where(places, edited, h)


class LoReFT(Method):
    Config = LoReFTConfig
    learning_rate = 1e-2

    def attach(self, host: Host) -> None:
        c, parts = self.config, host.anatomy
        layers = [layer for layer in parts.layers if layer.stack == parts.stacks[0]]
        chosen = range(len(layers)) if c.layers is None else c.layers
        if not set(chosen) <= set(range(len(layers))):
            raise TargetError(f"layers={c.layers!r} are not all among the layers 0 to {len(layers) - 1}")
        if c.rank > parts.d:
            raise TargetError(f"rank={c.rank} does not fit hidden states of size {parts.d}")
        stack = parts.stack_inputs(parts.stacks[0])
        tokens = host.add(stack, "loreft_tokens", Tokens(c.first, c.last))
        host.hook(stack, _see_input, tokens, names(stack), before=True)
        if parts.stacks == ("decoder",) and parts.generates:
            host.hook(host.model, _see_labels, tokens, names(host.model), before=True)
            host.around_generate(_generate, tokens)
        edits = ("both",) if c.tied or not (c.first and c.last) else ("first", "last")
        for index in chosen:
            for part in edits:
                name = "loreft" if part == "both" else f"loreft_{part}"
                edit = Edit(parts.d, c.rank, c.form, c.dropout, tokens, part)
                host.after_layer(layers[index].module, name, edit)


def _see_input(tokens: Tokens, order: tuple[str, ...], module: nn.Module, args: tuple, kwargs: dict) -> None:
    tokens.see(by_name(order, args, kwargs))


def _see_labels(tokens: Tokens, order: tuple[str, ...], module: nn.Module, args: tuple, kwargs: dict) -> None:
    tokens.now.labels = by_name(order, args, kwargs).get("labels")


def _generate(tokens: Tokens, generate: Callable, *args, **kwargs):
    if past_length(kwargs) > 0:
        raise UnsupportedError(
            "the cache holds the text of an earlier turn, edited at its own ends; give the whole text without "
            "past_key_values"
        )
    named = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    given = next((x for x in (*args[:1], *named) if x is not None), None)
    tokens.now.prompt = None if given is None else given.shape[1]
    try:
        return generate(*args, **kwargs)
    finally:
        tokens.now.prompt = None
