r"""Residual adapter: a bottleneck network with a norm of its own at the end of each layer.

.. math:: h \leftarrow h + W_{up}\, \mathrm{ReLU}(W_{down}\, \mathrm{LN}(h) + b_{down}) + b_{up}

Shapes, with b rows of t tokens: h (b, t, d), the layer's output; W_down (r, d), W_up (d, r). The layer norm LN is a new
one with scale and shift (d,). Both matrices start from N(0, 0.02^2) and the biases at zero, so the start is near the
identity; with ``zero_up`` it is the identity. Trained: 2dr + r + d + 2d a layer. No merge: the nonlinearity stands
between the two matrices.

Source: Lin et al. 2020, arXiv:2004.03829; start and place, behind the residual sum of GPT-2's feed-forward block, are
their repository's. There r differs by task (10, 100 or 300) and the learning rate is 5e-4; r = 64 is chosen here, as
for the other adapters. Where a layer ends with a norm, the adapter stands behind it. Encoder-decoder models have one in
every layer of both stacks. Their task embeddings, a weighted copy mechanism and distillation are not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from peftlib.mechanisms.bottleneck import Bottleneck, check_activation
from peftlib.mechanisms.host import Host
from peftlib.methods.base import Method, MethodConfig, at_least


@dataclass(frozen=True)
class ResidualAdapterConfig(MethodConfig):
    """``bottleneck`` r, ``activation`` (a name of transformers), ``init_std``, ``zero_up`` to start at the identity,
    ``dropout`` on the inner activation."""

    bottleneck: int = 64
    activation: str = "relu"
    init_std: float = 0.02
    zero_up: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        at_least("bottleneck", self.bottleneck, 1)
        at_least("init_std", self.init_std, 0)
        check_activation(self.activation)


class Residual(Bottleneck):
    """On a layer's output: ``forward(h) = h + delta(h)``, of which delta reads LN(h)."""

    def __init__(self, d: int, config: ResidualAdapterConfig):
        super().__init__(d, config.bottleneck, config.activation, dropout=config.dropout)
        self.norm = nn.LayerNorm(d)
        nn.init.normal_(self.down.weight, std=config.init_std)
        if not config.zero_up:
            nn.init.normal_(self.up.weight, std=config.init_std)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.delta(h).to(h.dtype)  # (b, t, d)


class ResidualAdapter(Method):
    Config = ResidualAdapterConfig
    learning_rate = 5e-4

    def attach(self, host: Host) -> None:
        for layer in host.anatomy.layers:
            host.after_layer(layer.module, "residual_adapter", Residual(host.anatomy.d, self.config))
