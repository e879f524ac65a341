r"""Parallel adapter: a scaled bottleneck network beside the feed-forward block.

.. math:: y = \mathrm{FFN}(x) + s\,(W_{up}\, \mathrm{ReLU}(W_{down} x + b_{down}) + b_{up})

Shapes, with b rows of t tokens: x, y (b, t, d); W_down (r, d), W_up (d, r). W_up and the biases start at zero and
W_down as in LoRA, so the start is the identity. Trained: 2dr + r + d a layer. No merge: the nonlinearity stands between
the two matrices.

Source: He et al. 2022, arXiv:2110.04366, and its code (jxhe/unify-parameter-efficient-tuning), the scaled parallel
adapter of exps/run_xsum.sh: r = 512, s = 4, and the backbone's dropout on the inner activation. x is the residual
stream: where norms stand before their blocks, as in its mBART, the adapter reads what has not passed the norm. What it
adds joins the residual sum behind the block's dropout.

With ``place="attention"`` it stands beside the attention blocks, cross-attention included, and adds to the block's
output, as the paper's table of designs has it. There x is what the block itself reads, behind the norm: their code puts
this adapter inside the attention. Departures: that adapter of theirs has a norm of its own on x, starts from
N(0, 0.02^2), has no scale and adds to the heads' outputs in front of W_o. On BERT ``adapters`` 1.3 with
the same weights gives the same states (``tests/golden``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from peftlib.errors import UnknownNameError
from peftlib.mechanisms import stream
from peftlib.mechanisms.bottleneck import Bottleneck, check_activation
from peftlib.mechanisms.host import Host
from peftlib.methods.base import Method, MethodConfig, at_least

PLACES = ("ffn", "attention")


@dataclass(frozen=True)
class ParallelAdapterConfig(MethodConfig):
    """``bottleneck`` r, ``scale`` s, ``place`` ("ffn" or "attention"), ``activation`` (a name of transformers),
    ``dropout`` on the inner activation."""

    bottleneck: int = 512
    scale: float = 4.0
    place: Literal["ffn", "attention"] = "ffn"
    activation: str = "relu"
    dropout: float = 0.1

    def __post_init__(self):
        at_least("bottleneck", self.bottleneck, 1)
        check_activation(self.activation)
        if self.place not in PLACES:
            raise UnknownNameError("place", self.place, PLACES)


class Parallel(Bottleneck):
    """Beside a block: ``forward(x, y) = y + delta(x)`` for what the adapter reads, x, and the block's output y."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + self.delta(x).to(y.dtype)  # (b, t, d)


class ParallelAdapter(Method):
    Config = ParallelAdapterConfig
    learning_rate = 1e-4

    def attach(self, host: Host) -> None:
        for layer in host.anatomy.layers:
            if self.config.place == "ffn":
                stream.beside_ffn(host, layer, "parallel_adapter", self._adapter(host))
                continue
            for block in ("attention", "cross_attention"):
                if f"{block}.query" in layer.sites:
                    first, last = layer.sites[f"{block}.query"], layer.sites[f"{block}.output"]
                    host.connect(first, last, "parallel_adapter", self._adapter(host))

    def _adapter(self, host: Host) -> Parallel:
        c = self.config
        return Parallel(host.anatomy.d, c.bottleneck, c.activation, c.scale, c.dropout)
