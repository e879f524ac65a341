r"""PASTA: trained vectors are added to the hidden states of the special tokens at every layer's input.

.. math:: h_{\ell, t} \leftarrow h_{\ell, t} + e(v_{\ell, p(t)}) \quad \text{where } t \text{ is special}

Shapes, with b rows of n tokens: h (b, n, d), v (tokens, d) a layer. p(t) counts a text's special tokens in their order,
so that the vectors are those of [CLS], the first [SEP] and so on; e is dropout. All other hidden states go on bit for
bit. The vectors start at N(0, 0.02), as the reference code's do, so the start is near the backbone; ``std=0`` starts at
it. Trained: tokens d a layer. The addition depends on where the tokens stand: no merge.

A layer sees hidden states and no ids, so the ids are looked at once a forward, where they enter the first stack. What a
cache holds is counted in.

Source: Yang et al. 2023, arXiv:2210.04382, and its code, which is for BERT and has a vector for each special token of a
row: L d 3 for pairs of texts, L d 2 for single ones and for NER. RoBERTa's pairs have four, and so have the paper's
0.029 % of BERT-large (L d 4 of 335 million; L d 3 are 0.022 %). Here ``tokens`` is 4 for every task, so that all
special tokens have theirs; vectors without a token are idle. In the code the ids are BERT's own, here ``token_ids``, by
default the [CLS] and [SEP] of the model's config. Encoder-decoder backbones, which the paper does not have, get vectors
in the encoder. The paper's rate is 2.5e-4 for up to 150 epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.errors import TargetError, UnsupportedError
from peftlib.mechanisms.call import Kept
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.positions import by_name, names, past_length, refuse_packed
from peftlib.methods.base import ConfigError, Method, MethodConfig, at_least


@dataclass(frozen=True)
class PastaConfig(MethodConfig):
    """``tokens``: special tokens of a text that get a vector; ``token_ids``: which ids are special, in any order
    (empty: [CLS] and [SEP] of the model's config); ``std`` of the start; ``dropout`` on what is added."""

    tokens: int = 4
    token_ids: tuple[int, ...] = ()
    std: float = 0.02
    dropout: float = 0.1

    def __post_init__(self):
        at_least("tokens", self.tokens, 1)
        at_least("std", self.std, 0)
        at_least("dropout", self.dropout, 0)
        if self.dropout >= 1:
            raise ConfigError(f"dropout={self.dropout!r} leaves nothing of the vectors; it must be below 1")


class Places(nn.Module):
    """p(t) of the input that is going through, ``now`` (b, n): k at the k-th token of ``ids`` in a row, counted from 1
    up to ``count``, and 0 at all other tokens and at padding."""

    def __init__(self, ids: tuple[int, ...], count: int):
        super().__init__()
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        self.count = count
        self.run = Kept()

    @property
    def now(self) -> torch.Tensor:
        return self.run.get()[0]

    def find(
        self, input_ids: torch.Tensor, mask: torch.Tensor | None, earlier: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """p (b, n), and which tokens are special (b, past + n), the ``earlier`` ones (b, past) included."""
        special = torch.isin(input_ids, self.ids)  # (b, n)
        if mask is not None:
            special = special & mask.bool()  # (b, n)
        p = special.long().cumsum(dim=1)  # (b, n)
        if earlier is not None:
            p = p + earlier.sum(dim=1, keepdim=True)  # (b, n)
        p = p * special  # (b, n)
        return p * (p <= self.count), special if earlier is None else torch.cat([earlier, special], dim=1)


class TokenVectors(nn.Module):
    """``vectors`` v (count, d) of a layer. The k-th is added, through dropout, where p(t) is k; h at p(t) = 0 stays as
    it is, bit for bit. N(0, std) at the start."""

    def __init__(self, count: int, d: int, std: float, dropout: float):
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(count, d).normal_(std=std))
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        v = F.pad(self.vectors, (0, 0, 1, 0))  # (count, d) -> (1 + count, d), zero in front
        added = self.dropout(F.embedding(p, v))  # (b, n) -> (b, n, d)
        return torch.where(p[..., None] > 0, (h + added).to(h.dtype), h)  # (b, n, d)


class Pasta(Method):
    Config = PastaConfig
    learning_rate = 1e-2

    def attach(self, host: Host) -> None:
        c, parts = self.config, host.anatomy
        stack = parts.stacks[0]
        inputs = parts.stack_inputs(stack)
        places = host.add(inputs, f"{self.name}_places", Places(self._ids(host), c.tokens))
        host.hook(inputs, _find, places, names(inputs), before=True)
        if stack == "decoder":
            host.hook(inputs, _remember, places)
        for layer in parts.layers:
            if layer.stack == stack:
                child = host.add(layer.module, self.name, TokenVectors(c.tokens, parts.d, c.std, c.dropout))
                host.hook(layer.module, _add, child, places, before=True)

    def _ids(self, host: Host) -> tuple[int, ...]:
        ids, parts = self.config.token_ids, host.anatomy
        if not ids:
            found = [parts.token_id(role) for role in ("cls", "sep")]
            if None in found:
                raise UnsupportedError(
                    f"pasta acts on [CLS] and [SEP], and the config of this {type(host.model).__name__} names none. "
                    "Where its tokenizer has them, set model.config.cls_token_id and sep_token_id (peftlib.backbones "
                    "does); where its texts have other special tokens, name their ids: token_ids=(...)"
                )
            ids = tuple(found)
        if not 0 <= min(ids) <= max(ids) < parts.vocabulary:
            raise TargetError(
                f"token_ids={tuple(ids)} are not all in the backbone's vocabulary, 0 to {parts.vocabulary - 1}; take "
                "them from its own tokenizer"
            )
        return ids


def _find(places: Places, order: tuple[str, ...], module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Before the stack."""
    call = by_name(order, args, kwargs)
    refuse_packed(call, "the vectors count the special tokens of one text a row")
    ids, mask, cache = (call.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
    if ids is None:
        raise UnsupportedError(
            "vectors for special tokens are placed by the tokens' ids, and the model was given embeddings without ids; "
            "call it with input_ids"
        )
    (b, n), past = ids.shape, int(past_length(call))
    mine = mask[:, -n:] if isinstance(mask, torch.Tensor) and mask.shape == (b, past + n) else None  # (b, n)
    p, special = places.find(ids, mine, _earlier(cache, b, past) if past else None)
    places.run.set((p, special))
    if cache is not None:
        cache.peftlib_special = special


def _earlier(cache: Any, rows: int, past: int) -> torch.Tensor:
    """Which of a cache's tokens are special, (rows, past)."""
    special = getattr(cache, "peftlib_special", None)
    if special is None or rows % len(special):
        raise UnsupportedError(
            "the cache was filled without the vectors, or has other rows than it had; begin with an empty one"
        )
    return special[:, :past].repeat_interleave(rows // len(special), dim=0)


def _remember(places: Places, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    """Behind a decoder, which may have made the cache itself."""
    if (cache := getattr(output, "past_key_values", None)) is not None:
        cache.peftlib_special = places.run.get()[1]


def _add(child: TokenVectors, places: Places, module: nn.Module, args: tuple, kwargs: dict):
    """Before each layer."""
    h, *others = args
    if h.shape[:2] != places.now.shape:
        raise UnsupportedError(
            f"special tokens were found among {places.now.shape[1]} tokens, and the layers get {h.shape[1]}: "
            "something else adds positions to the input, which does not go with vectors for special tokens"
        )
    return (child(h, places.now), *others), kwargs
