r"""CODA, conditional adapters: each frozen layer computes k of n tokens only, and a parallel adapter serves them all.

.. math:: h \leftarrow h + W_{up}\, \mathrm{ReLU}(W_{down}\, \bar h + b_{down}) + b_{up}
          + \lambda \odot \bigl(\mathrm{Layer}(h_{\mathcal{S}}) - h_{\mathcal{S}}\bigr), \qquad
          \lambda, \mathcal{S} = \operatorname{soft\,top}_k(\bar h\, w)

Shapes: h (n, d), the layer's input with n tokens of hidden size d, and its norm's output \bar h; w (d,), the router;
W_down (r, d), W_up (d, r). S are the k = n / ``reduction`` (rounded up) real tokens with the largest weights. All
others skip the layer, whose computation falls to k/n, and lambda, in [0, 1], gates what it changes. Padding is never
chosen, and k is taken of each row's own length. The chosen tokens attend to all (``attention="k-to-all"``, which
computes keys and values of all) or to each other ("k-to-k"). With k = n all gates are one and it is a bottleneck beside
each layer.

Soft top-k: a = eps ln k - eps LSE((s + b) / eps), b = min(-s - a, 0), 20 times from b = 0; lambda = exp((s + a + b) /
eps), with eps falling from 4 by 0.7 a step to ``epsilon``. W_up and the biases start at zero, W_down as in LoRA, w at
N(0, 1/d). With k < n the start is another network than the backbone. Trained: d + 2dr + r + d a layer, and as in the
paper the layers' norms. No merge, because routing depends on the input.

Only encoders are routed: the choice among n tokens looks at all of them, which a decoder that generates one by one
cannot. Decoders of encoder-decoder models have the adapter alone, and decoder-only models are refused.

In the paper a light phase of pre-training on C4 turns the dense model into a routed one before any task.
:func:`peftlib.convert` does it once for a backbone, and keeps the result: CODA is attached to a copy and trained on
unlabelled text, with the backbone's own objective where its files have the head for it (masked tokens; spans for T5)
and else, as for sentence encoders, to give every layer's states as they were without it
(:mod:`peftlib.training.objectives`). Runs of :mod:`peftlib.experiments` start from it by themselves:

>>> converted = peftlib.convert("minilm-l6", "coda", texts)
>>> adapted = peftlib.attach(classifier, "coda")
>>> adapted.start_from(converted)

Encoders alone have heads that read the first token, [CLS], whose state says nothing of a text while no layer gets it:
there it is always one of the k (``keep_first``). The paper's models, T5's kind, have no such token.

Source: Lei et al. 2023, arXiv:2304.04947. No code is known; the soft top-k is taken from a re-implementation, its
schedule from another one's notes. Chosen here, because the text could not be read whole: the backbone stays frozen in
the conversion, so that what it gives is an adapter of that backbone (theirs may train it); epsilon (theirs differs by
task, 0.02 to 1), the start of w, the first token, decoders, k-to-all (with k-to-k the conversion leaves twice the error
at [CLS]), and in families whose norms stand behind the blocks \bar h = h, the layer's own change being Layer(h) - h as
a whole. Reduction 3 is that of their MNLI row (3.2 times as fast).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from peftlib.errors import LoadError, UnknownNameError, UnsupportedError
from peftlib.mechanisms import attention
from peftlib.mechanisms.bottleneck import Bottleneck, check_activation
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.positions import names
from peftlib.methods.additive.adapters.coda.layer import Columns, Conditional, Temperature, enter, leave
from peftlib.methods.base import ConfigError, Method, MethodConfig, SavedAdapter, at_least, between

ATTENTION = ("k-to-k", "k-to-all")


@dataclass(frozen=True)
class CODAConfig(MethodConfig):
    """``reduction`` n/k; ``attention``: "k-to-k" or "k-to-all"; ``keep_first``: whether a row's first token is always
    chosen (None: in models that are an encoder alone); ``epsilon`` of the soft top-k and its ``iterations``;
    ``bottleneck`` r and ``activation`` (a name of transformers) of the adapter; ``train_norms`` of the layers."""

    reduction: float = 3.0
    attention: Literal["k-to-k", "k-to-all"] = "k-to-all"
    keep_first: bool | None = None
    epsilon: float = 1.0
    iterations: int = 20
    bottleneck: int = 64
    activation: str = "relu"
    train_norms: bool = True

    def __post_init__(self):
        at_least("reduction", self.reduction, 1)
        between("epsilon", self.epsilon, 0, float("inf"))
        at_least("iterations", self.iterations, 1)
        at_least("bottleneck", self.bottleneck, 1)
        check_activation(self.activation)
        if self.attention not in ATTENTION:
            raise UnknownNameError("attention of coda", self.attention, ATTENTION)


class CODA(Method):
    Config = CODAConfig
    learning_rate = 5e-4
    converts = True
    converted: dict[str, Any] | None = None

    def attach(self, host: Host) -> None:
        c, parts = self.config, host.anatomy
        if "encoder" not in parts.stacks:
            raise UnsupportedError(
                f"coda chooses the k best of all n tokens, later ones included, and {type(host.model).__name__} is a "
                "decoder, which must not look at them; use an encoder, or an encoder-decoder model, whose encoder it "
                "routes"
            )
        temperature = Temperature(c.epsilon, steps=c.iterations)
        keeps_first = parts.stacks == ("encoder",) if c.keep_first is None else c.keep_first
        for layer in parts.layers:
            reduction = c.reduction if layer.stack == "encoder" else None
            adapter = Bottleneck(parts.d, c.bottleneck, c.activation)
            child = Conditional(adapter, parts.d, reduction, c.attention == "k-to-all", keeps_first, temperature)
            host.add(layer.module, "coda", child)
            if child.router is not None:
                attention.attach(host, layer.attention, "coda_columns", Columns())
            host.hook(layer.module, enter, child, layer, names(layer.module), parts.head_dim, before=True)
            host.hook(layer.module, leave, child)
        if c.train_norms:
            host.train(p for norm in parts.norms() for p in norm.parameters())

    @torch.no_grad()
    def start_from(self, source: SavedAdapter) -> None:
        """Take routers, adapters and norms from a CODA adapter of this backbone under another head, the result of the
        conversion phase. Raises ConfigError for another method's adapter, LoadError where names or shapes do not
        fit."""
        if source.config.method != "coda":
            raise ConfigError(f"{source.name!r} is an adapter of {source.config.method}; start from one of coda")
        mine = {n: t for n, t in self.host.state().items() if n not in self.host.anatomy.head}
        found = {}
        for name, tensor in mine.items():
            # The base model has another name, or none, under another head.
            short = name.removeprefix(f"{self.host.anatomy.model.base_model_prefix}.")
            (found[name],) = [t for n, t in source.state.items() if n == short or n.endswith(f".{short}")] or [None]
            if found[name] is None or found[name].shape != tensor.shape:
                raise LoadError(
                    f"{source.name!r} has no {short} of shape {tuple(tensor.shape)}; convert this backbone with the "
                    "same bottleneck and train_norms"
                )
        for name, tensor in mine.items():
            tensor.copy_(found[name])
        self.converted = source.notes.get("conversion", {"adapter": source.name})

    def notes(self) -> dict[str, Any]:
        return {} if self.converted is None else {"conversion": self.converted}
