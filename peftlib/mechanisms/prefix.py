"""Keys and values in front of an attention's own, trained themselves or made by a small network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftlib.mechanisms.attention import Inputs


class Trunk(nn.Module):
    """What several makers share: tanh(W E + b), (m, h), of the trained embeddings E (m, d)."""

    def __init__(self, length: int, d: int, hidden: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(length, d))
        self.linear = nn.Linear(d, hidden)

    def forward(self) -> torch.Tensor:
        return torch.tanh(self.linear(self.embedding))


class Maker(nn.Module):
    """Keys and values from a trunk, beside each other: (m, 2 width)."""

    def __init__(self, trunk: Trunk, width: int):
        super().__init__()
        self.trunk = trunk
        self.linear = nn.Linear(trunk.linear.out_features, 2 * width)

    def forward(self) -> torch.Tensor:
        return self.linear(self.trunk())


class Prefix(nn.Module):
    """m keys and values in front of the others, ``key`` and ``value`` (H_kv, m, p): trained themselves, N(0, std) at
    the start, or those of ``maker() -> (m, 2 H_kv p)`` until :meth:`keep` turns them into parameters.

    ``counted_by``: the attention module that makes its stack's relative position bias, and then makes the prefix's, as
    that of m tokens before the text; without it a prefix has none.
    """

    def __init__(
        self,
        heads: int,
        length: int,
        head_dim: int,
        std: float = 0.02,
        maker: nn.Module | None = None,
        counted_by: nn.Module | None = None,
    ):
        super().__init__()
        self.shape = (heads, length, head_dim)
        self.maker: nn.Module | None = maker
        self._counted_by: tuple[Any] = (counted_by,)  # in a tuple, so that it does not become a part of this module
        if maker is None:
            self.key = nn.Parameter(torch.empty(self.shape).normal_(std=std))
            self.value = nn.Parameter(torch.empty(self.shape).normal_(std=std))

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and the values."""
        if self.maker is None:
            return self.key, self.value
        heads, length, head_dim = self.shape
        return self.maker().view(length, 2, heads, head_dim).permute(1, 2, 0, 3).unbind()

    def keep(self) -> None:
        """Drop the maker and train the keys and values that it makes now."""
        if self.maker is None:
            return
        with torch.no_grad():
            key, value = (t.clone(memory_format=torch.contiguous_format) for t in self.pair())
        self.maker = None
        self.key, self.value = nn.Parameter(key), nn.Parameter(value)

    def forward(self, inputs: Inputs) -> Inputs:
        batch = inputs.query.shape[0]
        key, value = (t.expand(batch, -1, -1, -1) for t in self.pair())
        return inputs.prepend(key, value, self._bias(inputs))

    def _bias(self, inputs: Inputs) -> torch.Tensor | None:
        (owner,) = self._counted_by
        if owner is None:
            return None
        m, q, k = self.shape[1], inputs.query.shape[2], inputs.key.shape[2]
        return owner.compute_bias(q, m + k, inputs.query.device, past_seen_tokens=m + k - q)[..., :m]
