r"""Sequential adapter: a bottleneck network with a skip connection behind each block of a layer.

.. math:: h \leftarrow h + W_{up}\, \sigma(W_{down} h + b_{down}) + b_{up}

Shapes, with b rows of t tokens: h (b, t, d); W_down (r, d), W_up (d, r). It stands behind the attention's output
projection and behind the feed-forward block, before the residual sum and the norm; the norms of both blocks train too.
Both matrices start from N(0, 0.01^2) cut off at two standard deviations and the biases at zero, so the start is near
the identity; with ``zero_up`` it is the identity. Trained: 2 (2dr + r + d) a layer and 4d of norms. No merge: the
nonlinearity stands between the two matrices.

Source: Houlsby et al. 2019, arXiv:1902.00751; GELU and r = 64 are their repository's, whose code starts from 0.001^2
instead of the paper's 0.01^2 and trains the embeddings' norm as well; here that one stays frozen. Their adapter stands
behind the block's dropout, ours before it, which is the same outside training. Encoder-decoder models get the two
adapters in every layer of both stacks and none behind cross-attention (option), as in follow-up work on T5 (Karimi
Mahabadi et al. 2021, arXiv:2106.04489). ``variant="pfeiffer"`` has one adapter a layer, behind the feed-forward block:
it reads what the layer's output would be without it, and adds to the residual sum (Pfeiffer et al. 2021,
arXiv:2005.00247); its start is not cut off, as in their library, where it is N(0, 0.02^2) with ReLU and no norm
trains. ``adapters`` 1.3 with the same weights gives the same states in both variants (``tests/golden``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peftlib.errors import UnknownNameError
from peftlib.mechanisms.bottleneck import Sequential, behind_ffn, check_activation
from peftlib.mechanisms.host import Host
from peftlib.methods.base import Method, MethodConfig, at_least

VARIANTS = ("houlsby", "pfeiffer")


@dataclass(frozen=True)
class SequentialAdapterConfig(MethodConfig):
    """``bottleneck`` r, ``activation`` (a name of transformers), ``init_std``, ``zero_up`` to start at the identity,
    ``train_norms`` of the blocks with an adapter, ``cross_attention`` for adapters there too, ``dropout`` on the inner
    activation; ``variant``: "houlsby" or "pfeiffer"."""

    bottleneck: int = 64
    activation: str = "gelu"
    init_std: float = 1e-2
    zero_up: bool = False
    train_norms: bool = True
    cross_attention: bool = False
    dropout: float = 0.0
    variant: Literal["houlsby", "pfeiffer"] = "houlsby"

    def __post_init__(self):
        at_least("bottleneck", self.bottleneck, 1)
        check_activation(self.activation)
        if self.variant not in VARIANTS:
            raise UnknownNameError("variant of sequential_adapter", self.variant, VARIANTS)


class SequentialAdapter(Method):
    Config = SequentialAdapterConfig
    learning_rate = 2e-3

    def attach(self, host: Host) -> None:
        c = self.config
        places = {"attention": "attention.output", "ffn": "ffn.down"}
        if c.variant == "pfeiffer":
            del places["attention"]
        if c.cross_attention:
            places["cross_attention"] = "cross_attention.output"
        for layer in host.anatomy.layers:
            for site in (layer.sites[name] for name in places.values() if name in layer.sites):
                adapter = self._adapter(host.anatomy.d)
                if c.variant == "pfeiffer" and site.name == "ffn.down":
                    behind_ffn(host, layer, "sequential_adapter", adapter)
                else:
                    host.after(site, "sequential_adapter", adapter)
        if c.train_norms:
            host.train(p for norm in host.anatomy.norms(places) for p in norm.parameters())

    def _adapter(self, d: int) -> Sequential:
        c = self.config
        start = {"init": "truncated" if c.variant == "houlsby" else "normal", "std": c.init_std, "zero_up": c.zero_up}
        return Sequential(d, c.bottleneck, c.activation, dropout=c.dropout, **start)
