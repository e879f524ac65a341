r"""Parallel adapter: a scaled bottleneck network beside the feed-forward block.

.. math:: y = \mathrm{FFN}(x) + s\,(W_{up}\, \mathrm{ReLU}(W_{down} x + b_{down}) + b_{up})

Shapes, with b rows of t tokens: x, y (b, t, d); W_down (r, d), W_up (d, r). W_up and the biases start at zero and
W_down as in LoRA, so the start is the identity. Trained: 2dr + r + d a layer. No merge: the nonlinearity stands between
the two matrices.

Source: He et al. 2022, arXiv:2110.04366; the scale of 4 and the start are their repository's. With
``place="attention"`` it stands beside the attention blocks, cross-attention included. In families whose norms stand
before the block, x is the block's own input, behind the norm; with a gated feed-forward block it is the input of both
inner projections. Their other options (a learned scale, a norm of its own) are not here. On BERT ``adapters``
1.3 with the same weights gives the same states (``tests/golden``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from peftlib.errors import UnknownNameError
from peftlib.mechanisms.bottleneck import Bottleneck, check_activation
from peftlib.mechanisms.host import Host
from peftlib.methods.base import Method, MethodConfig, at_least

PLACES = {
    "ffn": (("ffn.up", "ffn.down"),),
    "attention": (("attention.query", "attention.output"), ("cross_attention.query", "cross_attention.output")),
}


@dataclass(frozen=True)
class ParallelAdapterConfig(MethodConfig):
    """``bottleneck`` r, ``scale`` s, ``place`` ("ffn" or "attention"), ``activation`` (a name of transformers),
    ``dropout`` on the inner activation."""

    bottleneck: int = 64
    scale: float = 4.0
    place: Literal["ffn", "attention"] = "ffn"
    activation: str = "relu"
    dropout: float = 0.0

    def __post_init__(self):
        at_least("bottleneck", self.bottleneck, 1)
        check_activation(self.activation)
        if self.place not in PLACES:
            raise UnknownNameError("place", self.place, PLACES)


class Parallel(Bottleneck):
    """Beside a block: ``forward(x, y) = y + delta(x)`` for the block's input x and output y."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + self.delta(x).to(y.dtype)  # (b, t, d)


class ParallelAdapter(Method):
    Config = ParallelAdapterConfig
    learning_rate = 5e-4

    def attach(self, host: Host) -> None:
        c = self.config
        for layer in host.anatomy.layers:
            for first, last in PLACES[c.place]:
                if first in layer.sites:
                    adapter = Parallel(host.anatomy.d, c.bottleneck, c.activation, c.scale, c.dropout)
                    host.connect(layer.sites[first], layer.sites[last], "parallel_adapter", adapter)
