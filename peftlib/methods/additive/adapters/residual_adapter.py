r"""Residual adapter: a bottleneck network with a norm of its own at the end of each layer.

.. math:: h \leftarrow h + W_{up}\, \mathrm{ReLU}(W_{down}\, \mathrm{LN}(h) + b_{down}) + b_{up}

Shapes: h (..., d), the layer's output; W_down (r, d), W_up (d, r). The layer norm is a new one with scale and shift
(d,). Both matrices start from N(0, 0.02^2) and the biases at zero, so the start is near the identity; with ``zero_up``
it is the identity. Trained: 2dr + r + d + 2d a layer. No merge: the nonlinearity stands between the two matrices.

Source: Lin et al. 2020, arXiv:2004.03829; start and place, behind the residual sum of GPT-2's feed-forward block, are
their repository's. There r differs by task (10, 100 or 300) and the learning rate is 5e-4; r = 64 is chosen here, as
for the other adapters. Where a layer ends with a norm, the adapter stands behind it. Encoder-decoder models have one in
every layer of both stacks. Their task embeddings, a weighted copy mechanism and distillation are not here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from peftlib.mechanisms.bottleneck import Residual, check_activation
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


class ResidualAdapter(Method):
    Config = ResidualAdapterConfig
    learning_rate = 5e-4

    def attach(self, host: Host) -> None:
        c = self.config
        for layer in host.anatomy.layers:
            adapter = Residual(
                host.anatomy.d, c.bottleneck, c.activation, dropout=c.dropout, zero_up=c.zero_up, norm=True
            )
            nn.init.normal_(adapter.down.weight, std=c.init_std)
            if not c.zero_up:
                nn.init.normal_(adapter.up.weight, std=c.init_std)
            host.after_layer(layer.module, "residual_adapter", adapter)
