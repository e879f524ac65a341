"""Keys and values in front of an attention's own: trained themselves, or from a small network.

Shapes: b rows, q queries, k keys, m positions of the prefix, H_kv heads of keys and values of p numbers each, d the
hidden size, h the network's inner width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftlib.mechanisms.attention import Inputs


class PrefixEmbedding(nn.Module):
    """``forward() = tanh(W E + b)``, (m, h), of the trained embeddings E (m, d). Several encoders share it."""

    def __init__(self, m: int, d: int, h: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(m, d))
        self.linear = nn.Linear(d, h)

    def forward(self) -> torch.Tensor:
        return torch.tanh(self.linear(self.embedding))  # (m, d) -> (m, h)


class PrefixEncoder(nn.Module):
    """``forward() = W_l tanh(W E + b) + b_l``: the keys and values of one attention, side by side (m, 2 width), of the
    shared embedding ``trunk``."""

    def __init__(self, embedding: PrefixEmbedding, width: int):
        super().__init__()
        self.trunk = embedding
        self.linear = nn.Linear(embedding.linear.out_features, 2 * width)

    def forward(self) -> torch.Tensor:
        return self.linear(self.trunk())  # (m, h) -> (m, 2 width)


class Prefix(nn.Module):
    """``forward(inputs)`` has m keys and values in front of the others.

    ``key`` and ``value`` (H_kv, m, p) are trained themselves, N(0, std) at the start, or come from the encoder
    ``maker``, which gives (m, 2 H_kv p), until :meth:`keep` turns them into parameters.

    ``counted_by``: the attention module that makes its stack's relative position bias. It then makes the prefix's too,
    as that of m tokens before the text; without it a prefix has none.
    """

    def __init__(
        self,
        heads: int,
        length: int,
        head_dim: int,
        std: float = 0.02,
        encoder: nn.Module | None = None,
        counted_by: nn.Module | None = None,
    ):
        super().__init__()
        self.shape = (heads, length, head_dim)
        self.maker = encoder
        self._counted_by: tuple[Any] = (counted_by,)  # in a tuple, so that it does not become a part of this module
        if encoder is None:
            self.key = nn.Parameter(torch.empty(self.shape).normal_(std=std))
            self.value = nn.Parameter(torch.empty(self.shape).normal_(std=std))

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """P_K and P_V, (H_kv, m, p) each."""
        if self.maker is None:
            return self.key, self.value
        heads, length, head_dim = self.shape
        both = self.maker().view(length, 2, heads, head_dim)  # (m, 2 H_kv p) -> (m, 2, H_kv, p)
        return both.permute(1, 2, 0, 3).unbind()  # (2, H_kv, m, p) -> 2 times (H_kv, m, p)

    def keep(self) -> None:
        """Drop the encoder and train the keys and values that it gives now."""
        if self.maker is None:
            return
        with torch.no_grad():
            key, value = (t.clone(memory_format=torch.contiguous_format) for t in self.pair())
        self.maker = None
        self.key, self.value = nn.Parameter(key), nn.Parameter(value)

    def forward(self, inputs: Inputs) -> Inputs:
        b = inputs.query.shape[0]
        P_K, P_V = (t.expand(b, -1, -1, -1) for t in self.pair())  # (H_kv, m, p) -> (b, H_kv, m, p)
        return inputs.prepend(P_K, P_V, self._bias(inputs))  # keys and values (b, H_kv, m + k, p)

    def _bias(self, inputs: Inputs) -> torch.Tensor | None:
        (owner,) = self._counted_by
        if owner is None:
            return None
        m, q, k = self.shape[1], inputs.query.shape[2], inputs.key.shape[2]
        bias = owner.compute_bias(q, m + k, inputs.query.device, past_seen_tokens=m + k - q)  # (1, H, q, m + k)
        return bias[..., :m]  # (1, H, q, m)
