r"""Compacter: adapters whose weights are sums of Kronecker products, with one factor shared by all layers (hybrid).

.. math:: h \leftarrow h + W_{up}\, \sigma(W_{down} h + b_{down}) + b_{up}, \qquad
          W = \sum_{i=1}^{n} A_i \otimes (s_i t_i^\top)

Shapes: A_i (n, n), shared by every W of the model; for W_down s_i (r/n, R), t_i (d/n, R), for W_up s_i (d/n, R),
t_i (r/n, R); rank R. The adapters stand where the sequential adapter's do, behind both blocks of a layer (with
``plus_plus`` behind the feed-forward block only), and the norms of all blocks train too. The A_i start at
N(0, 0.0001^2) and s, t Glorot-uniform, so the start is near the identity. Trained: n^3 in all, 2 R (d + r) + r + d an
adapter, 4d of norms a layer. No W is formed where its factors alone are cheaper. No merge: the nonlinearity stands
between.

Source: Karimi Mahabadi et al. 2021, arXiv:2106.04647, and the settings of its code: n = 4, R = 1, a bottleneck of 1/32
of T5-base's and BERT-base's d, learning rate 3e-3; like it, decoders have no adapter behind cross-attention.
``adapters`` 1.3 with the same weights (BERT, two layers, float32) gives logits that differ by at most 1.5e-7; it trains
no norms.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from peftlib.mechanisms.bottleneck import Sequential, check_activation
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.hypercomplex import Hypercomplex, Rules
from peftlib.methods.base import Method, MethodConfig, at_least, between


@dataclass(frozen=True)
class CompacterConfig(MethodConfig):
    """``bottleneck`` r; ``divisions`` n, which must divide r and d; ``rank`` R of the layers' own factors;
    ``plus_plus``: adapters behind the feed-forward block only; ``activation`` (a name of transformers); ``std`` of the
    shared matrices' start; ``train_norms`` of all blocks; ``dropout`` on the inner activation."""

    bottleneck: int = 24
    divisions: int = 4
    rank: int = 1
    plus_plus: bool = False
    activation: str = "gelu_new"
    std: float = 1e-4
    train_norms: bool = True
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("bottleneck", "divisions", "rank"):
            at_least(name, getattr(self, name), 1)
        between("std", self.std, 0, float("inf"))
        check_activation(self.activation)


class Compacter(Method):
    Config = CompacterConfig
    learning_rate = 2e-3

    def attach(self, host: Host) -> None:
        c = self.config
        make = partial(Hypercomplex, Rules(c.divisions, c.std), rank=c.rank)
        for layer in host.anatomy.layers:
            for name in ("ffn.down",) if c.plus_plus else ("attention.output", "ffn.down"):
                adapter = Sequential(host.anatomy.d, c.bottleneck, c.activation, dropout=c.dropout, linear=make)
                host.after(layer.sites[name], "compacter", adapter)
        if c.train_norms:
            host.train(p for norm in host.anatomy.norms() for p in norm.parameters())
