r"""Hyperformer++: one network makes the adapters of all tasks and layers from embeddings of task, layer and place.

.. math:: y \leftarrow y + \gamma \odot \operatorname{norm}\bigl(W_{up}\, \sigma(W_{down} y + b_{down}) + b_{up}\bigr)
          + \beta, \qquad (W_{down}, b_{down}, W_{up}, b_{up}, \gamma, \beta) = \mathcal H([e_t; e_\ell; e_p])

Shapes: y (..., d), the output of a layer's self-attention (p = 1) or feed-forward block (p = 0), before the residual
sum; W_down (r, d), W_up (d, r), r = d / reduction; embeddings of 64. H maps them to 128 units (ReLU) and to 64, norms
these, and makes each of the six tensors with a linear map. All maps start at N(0, 0.01^2); the norm gives even a small
adapter a scale, so the start is not the identity. Encoder and decoder have a network each and share the tasks'
embeddings; no adapter is behind cross-attention. All norms of the backbone train too. No merge: the nonlinearity stands
between.

A batch's ``task_ids`` say which task its rows belong to, ``with adapted.task(i)`` does for rows without; otherwise they
are of task 0. Layers share the network, so it makes adapters also for one that is not there:

>>> adapted.method.make(task=2, layer=5.5, place="ffn")

Source: Karimi Mahabadi et al. 2021, arXiv:2106.04489, and its code with its T5 settings (tasks sampled at temperature
10, :func:`peftlib.tasks.mix`; learning rate 3e-4). There a batch is of one task, here its rows may differ. For a layer
index without an embedding, the paper names no way; here it lies on the line through its two nearest neighbours'.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from peftlib.errors import TargetError, UnknownNameError
from peftlib.mechanisms.bottleneck import check_activation
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.hypernet import HyperAdapter, HyperNetwork, Made
from peftlib.methods.base import Method, MethodConfig, at_least, between

PLACES = {"ffn": "ffn.down", "attention": "attention.output"}
"""Name of a place -> its site; the order is that of the places' embeddings."""


@dataclass(frozen=True)
class HyperformerPPConfig(MethodConfig):
    """``tasks``: how many there are; ``embedding``: width of the embeddings and of what is made of them; ``hidden``
    units between; the adapters' bottleneck is d // ``reduction``; ``activation`` (a name of transformers), ``std`` of
    the linear maps' start, ``train_norms`` of the backbone."""

    tasks: int = 1
    embedding: int = 64
    hidden: int = 128
    reduction: int = 32
    activation: str = "gelu_new"
    std: float = 0.01
    train_norms: bool = True

    def __post_init__(self):
        for name in ("tasks", "embedding", "hidden", "reduction"):
            at_least(name, getattr(self, name), 1)
        between("std", self.std, 0, float("inf"))
        check_activation(self.activation)


class HyperformerPP(Method):
    Config = HyperformerPPConfig
    learning_rate = 1e-4

    def attach(self, host: Host) -> None:
        c, parts = self.config, host.anatomy
        if parts.d < c.reduction:
            raise TargetError(
                f"reduction={c.reduction} leaves nothing of the hidden size {parts.d}; choose a smaller one"
            )
        host.tasks.count = c.tasks
        task = nn.Embedding(c.tasks, c.embedding)
        self.networks: dict[str, HyperNetwork] = {}
        for stack in parts.stacks:
            layers = sum(layer.stack == stack for layer in parts.layers)
            sizes = c.embedding, c.hidden, parts.d, parts.d // c.reduction
            self.networks[stack] = HyperNetwork(task, layers, len(PLACES), *sizes, c.std)
        for layer in parts.layers:
            for place, name in enumerate(PLACES.values()):
                adapter = HyperAdapter(self.networks[layer.stack], host.tasks, layer.index, place, c.activation)
                host.after(layer.sites[name], "hyperformer", adapter)
        if c.train_norms:
            kinds = tuple({type(norm) for norm in parts.norms()})
            norms = [module for module in parts.base.modules() if isinstance(module, kinds)]
            mine = {id(module) for child in host.paths().values() for module in child.modules()}
            host.train(p for norm in norms if id(norm) not in mine for p in norm.parameters())

    @torch.no_grad()
    def make(self, task: int, layer: float, place: str, stack: str | None = None) -> Made:
        """The adapter (each tensor with a first dimension of 1) of a task for a layer, which need not exist, behind
        its "attention" or "ffn" block; ``stack``: "encoder" or "decoder" where there are both (default: the first)."""
        if place not in PLACES:
            raise UnknownNameError("place of an adapter", place, PLACES)
        stack = stack or next(iter(self.networks))
        if stack not in self.networks:
            raise UnknownNameError("stack", stack, self.networks)
        self.host.tasks.check(task)
        network = self.networks[stack]
        tasks = torch.tensor([task], device=network.layer.weight.device)
        return network(tasks, network.layer_embedding(layer), list(PLACES).index(place))
