r"""Compacter: adapters whose weights are sums of Kronecker products, with one factor shared by all layers (hybrid).

.. math:: h \leftarrow h + W_{up}\, \sigma(W_{down} h + b_{down}) + b_{up}, \qquad
          W = \sum_{i=1}^{n} A_i \otimes (s_i t_i^\top)

Shapes: h (b, t, d) of b rows, t tokens and hidden size d; A_i (n, n), shared by every W of the model; for W_down
s_i (r/n, R), t_i (d/n, R), for W_up s_i (d/n, R), t_i (r/n, R); bottleneck r, rank R. The adapters stand where the
sequential adapter's do, behind both blocks of a layer (with ``plus_plus`` behind the feed-forward block only), and the
norms of all blocks and those behind the last layers train too. The A_i start at N(0, 0.0001^2) and s, t Glorot-uniform
with a gain of sqrt(2), so the start is near the identity. Trained: n^3 in all, 2 R (d + r) + r + d an adapter, the
norms. W is not formed where its factors alone are cheaper. No merge: the nonlinearity stands between the two maps.

Source: Karimi Mahabadi et al. 2021, arXiv:2106.04647, and the settings of its code: n = 4, R = 1, a bottleneck of 1/32
of T5-base's and BERT-base's d, learning rate 3e-3; like it, decoders have no adapter behind cross-attention. Its
T5-base trains 104,704 parameters with ``plus_plus``, the paper's 0.047 %. It is for T5, whose embeddings have no norm;
where they have one, that stays frozen. ``adapters`` 1.3 with the same weights gives the same states on BERT
(``tests/golden``); it trains no norms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.errors import TargetError
from peftlib.mechanisms.bottleneck import Sequential, check_activation
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.precision import cast
from peftlib.methods.base import Method, MethodConfig, at_least, between


@dataclass(frozen=True)
class CompacterConfig(MethodConfig):
    """``bottleneck`` r; ``divisions`` n, which must divide r and d; ``rank`` R of the layers' own factors;
    ``plus_plus``: adapters behind the feed-forward block only; ``activation`` (a name of transformers); ``std`` of the
    shared matrices' start; ``train_norms`` of all blocks and at the stacks' ends; ``dropout`` on the inner
    activation."""

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


class Shared(nn.Module):
    """The matrices that all maps share: ``A`` (n, n, n), the i-th is A[i]; they start at N(0, std^2)."""

    def __init__(self, divisions: int, std: float):
        super().__init__()
        self.A = nn.Parameter(torch.empty(divisions, divisions, divisions).normal_(std=std))


class KroneckerSum(nn.Module):
    """``forward(x) = W x + bias`` with ``W = sum_i A_i kron (s_i t_i^T)``, for x (b, t, in).

    Shapes: s (n, out / n, R), t (n, in / n, R), bias (out). s and t start Glorot-uniform with a gain of sqrt(2), matrix
    by matrix, the bias at zero. W is not formed where its factors alone take fewer multiplications.

    Raises TargetError for a size that n does not divide.
    """

    def __init__(self, shared: Shared, in_features: int, out_features: int, rank: int):
        super().__init__()
        n = len(shared.A)
        for size in (in_features, out_features):
            if size % n:
                raise TargetError(
                    f"divisions={n} does not divide {size}: hidden size and bottleneck must be multiples of it"
                )
        self.rules = shared  # the name that files have
        self.s = nn.Parameter(torch.empty(n, out_features // n, rank))
        self.t = nn.Parameter(torch.empty(n, in_features // n, rank))
        self.bias = nn.Parameter(torch.zeros(out_features))
        for factor in (*self.s, *self.t):
            nn.init.xavier_uniform_(factor, gain=math.sqrt(2))
        self.formed = rank * (n * (in_features + out_features) + n**3) >= in_features * out_features

    def weight(self) -> torch.Tensor:
        """W, (out, in)."""
        A, s, t = self.rules.A, self.s, self.t
        W = torch.einsum("iac,ipr,iqr->apcq", A, s, t)  # (n, out / n, n, in / n)
        return W.reshape(len(self.bias), -1)  # (out, in)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = cast(x, self.bias)  # (b, t, in)
        if self.formed:
            return F.linear(x, self.weight(), self.bias)  # (b, t, in) -> (b, t, out)
        A, s, t = self.rules.A, self.s, self.t
        x = x.unflatten(-1, (len(A), -1))  # (b, t, in) -> (b, t, n, in / n)
        x = torch.einsum("...cq,iqr->...icr", x, t)  # -> (b, t, n, n, R)
        x = torch.einsum("...icr,iac->...air", x, A)  # (b, t, n, n, R)
        x = torch.einsum("...air,ipr->...ap", x, s)  # -> (b, t, n, out / n)
        return x.flatten(-2) + self.bias  # (b, t, out)


class Compacter(Method):
    Config = CompacterConfig
    learning_rate = 2e-3

    def attach(self, host: Host) -> None:
        c = self.config
        linear = partial(KroneckerSum, Shared(c.divisions, c.std), rank=c.rank)
        for layer in host.anatomy.layers:
            for name in ("ffn.down",) if c.plus_plus else ("attention.output", "ffn.down"):
                adapter = Sequential(host.anatomy.d, c.bottleneck, c.activation, dropout=c.dropout, linear=linear)
                host.after(layer.sites[name], "compacter", adapter)
        if c.train_norms:
            host.train(p for norm in (*host.anatomy.norms(), *host.anatomy.final_norms()) for p in norm.parameters())
