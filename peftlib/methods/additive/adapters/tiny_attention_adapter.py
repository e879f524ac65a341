r"""Tiny-attention adapter: an attention with heads of size one over the whole context is added to the hidden state.

.. math:: h_t \leftarrow h_t + b_O + \sum_{j} W_O^{(j)} \sum_{s}
          \operatorname{softmax}_s\bigl(q_t^{(j)} \cdot k_s^{(j)} / \sqrt{p}\bigr)\, v_s^{(j)}

Shapes: q, k, v (p,) for each head j and position, from h by maps (p, d) with biases; W_O (d, p). h is the output of the
attention block before the residual sum, or with ``place="parallel"`` the block's input, and the sum is with its output.
s runs over the positions that the block itself attends to: no padding, in decoders none that come later. W_O starts at
zero, so the start is the identity. Trained: 4dHp + 3Hp + d a layer for H heads. No merge: it depends on the context.

``adapted.method.average_heads()`` makes the heads one for inference, whose cost is that of a single head: the mean of
their query, key and value weights and, as equal heads should give the same output, the sum of their W_O. With unequal
heads it changes the output. ``average_heads(False)`` undoes it; it is not stored, and training uses all heads.

Source: Zhao et al. 2022, arXiv:2211.01979: tiny heads as experts to be averaged, both places. No code is known, and
what its abstract does not say is chosen here: the place before the residual sum, sequential as default, biases, the
start, four heads. The reported 0.05 % of RoBERTa-large lies between one and two heads of this form (0.035 and 0.062 %).
Position biases and rotations of the backbone do not enter. Decoders keep its keys and values in the backbone's own
cache, which must be a dynamic one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peftlib.errors import UnknownNameError
from peftlib.mechanisms import tiny_attention
from peftlib.mechanisms.host import Host
from peftlib.methods.base import Method, MethodConfig, at_least

PLACES = ("sequential", "parallel")


@dataclass(frozen=True)
class TinyAttentionAdapterConfig(MethodConfig):
    """``heads`` H of size ``head_dim`` p; ``place``: "sequential", behind the attention block, or "parallel" to it."""

    heads: int = 4
    head_dim: int = 1
    place: Literal["sequential", "parallel"] = "sequential"

    def __post_init__(self):
        at_least("heads", self.heads, 1)
        at_least("head_dim", self.head_dim, 1)
        if self.place not in PLACES:
            raise UnknownNameError("place", self.place, PLACES)


class TinyAttentionAdapter(Method):
    Config = TinyAttentionAdapterConfig
    learning_rate = 1e-2

    def attach(self, host: Host) -> None:
        c = self.config
        self.adapters = [
            tiny_attention.attach(host, layer, self.name, c.heads, c.head_dim, c.place == "parallel")
            for layer in host.anatomy.layers
        ]

    def average_heads(self, averaged: bool = True) -> None:
        """Let each layer's heads be one, their average, in evaluation mode; or all of them again."""
        for adapter in self.adapters:
            adapter.averaged = averaged
