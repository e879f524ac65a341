r"""BitFit: the bias terms of the backbone train, and nothing else.

.. math:: y = W x + b, \qquad W \text{ frozen}, \quad b \text{ trained}

Shapes: b (out), one for each linear map, and one (d) for each layer norm: every bias below the task head, the
embeddings' norm's and the pooler's included. Trained: 7d + f a layer, d for the embeddings' norm and d for a pooler
(102,144 on RoBERTa-base). Nothing is added, so the start is the identity and there is nothing to fold in a merge.

Source: Ben Zaken et al. 2022, arXiv:2106.10199, and its code. ``queries_and_inner`` is the paper's smaller variant:
only the biases of the queries and of the feed-forward block's first map and, as in the code, a pooler's. A backbone
without biases (LLaMA, Mistral, T5) cannot host it; Qwen2 has some, on queries, keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from peftlib.anatomy import Site
from peftlib.errors import UnsupportedError
from peftlib.mechanisms.host import Host
from peftlib.methods.base import Method, MethodConfig


@dataclass(frozen=True)
class BitFitConfig(MethodConfig):
    """``queries_and_inner``: only the biases of ``attention.query`` and ``ffn.up``, and a pooler's."""

    queries_and_inner: bool = False


class BitFit(Method):
    Config = BitFitConfig
    learning_rate = 2e-3

    def attach(self, host: Host) -> None:
        if self.config.queries_and_inner:
            biases = _some_biases(host)
        else:
            biases = list(host.anatomy.biases.values())
        if not biases:
            raise UnsupportedError(
                f"bitfit trains biases, and {type(host.model).__name__} (family {host.anatomy.family.name}) has none "
                "that it could train. Methods of about this size that need no biases: ia3, lora with a small rank."
            )
        host.train(biases)


def _some_biases(host: Host) -> list[nn.Parameter]:
    sites: list[Site] = host.anatomy.sites(("attention.query", "ffn.up"))
    if fused := next((s for s in sites if s.part and s.bias is not None), None):
        raise UnsupportedError(
            f"queries_and_inner trains the queries' biases alone, and {fused} is one projection for queries, keys and "
            "values; use queries_and_inner=False"
        )
    pooler = [b for name, b in host.anatomy.biases.items() if ".pooler." in f".{name}"]
    return [s.module.bias for s in sites if s.bias is not None] + pooler
