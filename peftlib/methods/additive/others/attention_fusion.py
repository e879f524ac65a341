r"""Attention fusion: one trained query attends, token by token, over the outputs of a frozen backbone's layers.

.. math:: z_t = \sum_{\ell=1}^{L} a_{t, \ell}\, h_{\ell, t}, \qquad
          a_t = \mathrm{softmax}_{\ell}\bigl(q^\top h_{\ell, t}\bigr)

Shapes: h (B, n, d), the output of layer l; q (d). The head gets z where it got the last layer's output. No gradient
enters the backbone: of its activations a training step keeps the layers' outputs alone. q starts at zero, so that z is
the mean of the layers: not the backbone's output. Trained: d. The mix depends on the input: no merge.

Source: Cao et al. 2022, Findings of NAACL, 10.18653/v1/2022.findings-naacl.64, of which only the abstract could be
read: attention over each token's layer outputs, decoupled from the backbone, 0.0009 % of the parameters, which is one
vector of 768. No code was published. Not confirmed, so chosen here: neither projections of keys and values nor a
scale; q starts at zero; the embeddings are no layer (``with_embeddings`` makes them one); the fused [CLS] goes through
BERT's frozen pooler; backbones with a norm behind their last layer have it on every layer's output; of
encoder-decoder backbones the decoder's layers are fused.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftlib.mechanisms import fusion
from peftlib.mechanisms.host import Host
from peftlib.methods.base import Method, MethodConfig


@dataclass(frozen=True)
class AttentionFusionConfig(MethodConfig):
    """``with_embeddings``: whether the first layer's input counts as a layer."""

    with_embeddings: bool = False


class AttentionFusion(Method):
    Config = AttentionFusionConfig
    learning_rate = 1e-2
    exceptions = {  # noqa: RUF012
        "overfits": "The check keeps the head frozen. A query alone only weighs states that the frozen layers give, "
        "and between them a random head has no room for eight texts; the method trains query and head together."
    }

    def attach(self, host: Host) -> None:
        fusion.attach(host, self.name, self.config.with_embeddings)
