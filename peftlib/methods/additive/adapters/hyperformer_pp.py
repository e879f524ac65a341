r"""Hyperformer++: one network generates the adapters of all tasks and layers from embeddings of task, layer and place.

.. math:: y \leftarrow y + \gamma \odot \operatorname{norm}\bigl(W_{up}\, \sigma(W_{down} y + b_{down}) + b_{up}\bigr)
          + \beta, \qquad (W_{down}, b_{down}, W_{up}, b_{up}, \gamma, \beta) = \mathcal H([e_t; e_\ell; e_p])

Shapes, with b rows of t tokens: y (b, t, d), the output of a layer's self-attention (p = 1) or feed-forward block
(p = 0), before the residual sum; W_down (r, d), W_up (d, r), r = d / reduction; embeddings (e,) with e = 64. H maps
them to 128 units (ReLU) and to 64, norms these, and generates each of the six tensors with a linear map. All maps start
at N(0, 0.01^2); the norm gives even a small adapter a scale, so the start is not the identity. Encoder and decoder have
a network each and share the tasks' embeddings; no adapter is behind cross-attention. All norms of the backbone train
too. No merge: the nonlinearity stands between.

A batch's ``task_ids`` say which task its rows belong to, ``with adapted.task(i)`` does for rows without, which
are an error otherwise. Layers share the network, so it generates adapters also for a layer that does not exist:

>>> adapted.method.make(task=2, layer=5.5, place="ffn")

Source: Karimi Mahabadi et al. 2021, arXiv:2106.04489, and its code with its T5 settings (tasks sampled at temperature
10, :func:`peftlib.tasks.mix`; learning rate 3e-4). There a batch is of one task, here its rows may differ. The paper
names no way to embed a layer index that has no embedding; here it lies on the line through its two nearest neighbours'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from peftlib.errors import TargetError, UnknownNameError
from peftlib.mechanisms.bottleneck import check_activation
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.precision import cast
from peftlib.mechanisms.tasks import Tasks
from peftlib.methods.base import Method, MethodConfig, at_least, between

PLACES = {"ffn": "ffn.down", "attention": "attention.output"}
"""Name of a place -> its site; the order is that of the places' embeddings."""


@dataclass(frozen=True)
class HyperformerPPConfig(MethodConfig):
    """``tasks``: how many there are; ``embedding`` e of tasks, layers and places, with ``hidden`` units behind; the
    adapters' bottleneck is d // ``reduction``; ``activation`` (a name of transformers), ``std`` of the linear maps'
    start, ``train_norms`` of the backbone."""

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


class AdapterWeights(NamedTuple):
    """The weights of one adapter for each of g tasks: W_down (g, r, d), W_up (g, d, r), biases (g, r) and (g, d), and
    gamma and beta of the norm behind it, (g, d)."""

    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor

    def delta(self, y: torch.Tensor, activation: nn.Module) -> torch.Tensor:
        """``gamma * norm(W_up act(W_down y + b_down) + b_up) + beta`` for y (g, s, d), s tokens of each task."""
        inner = activation(torch.baddbmm(self.down_bias[:, None], y, self.down.mT))  # (g, s, d) -> (g, s, r)
        z = torch.baddbmm(self.up_bias[:, None], inner, self.up.mT)  # (g, s, r) -> (g, s, d)
        return F.layer_norm(z, z.shape[-1:]) * self.scale[:, None] + self.shift[:, None]  # (g, s, d)


class HyperNetwork(nn.Module):
    """H, which generates the adapters of one stack. Embeddings start at N(0, 1), linear maps at N(0, std) with zero
    biases. ``task``, the tasks' embeddings, may be shared with other stacks."""

    def __init__(
        self, task: nn.Embedding, layers: int, places: int, dim: int, hidden: int, d: int, bottleneck: int, std: float
    ):
        super().__init__()
        self.sizes = d, bottleneck
        self.task = task
        self.layer = nn.Embedding(layers, dim)
        self.place = nn.Embedding(places, dim)
        self.join = nn.Sequential(nn.Linear(3 * dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        sizes = {"down": bottleneck * d, "down_bias": bottleneck, "up": d * bottleneck}
        sizes |= {"up_bias": d, "scale": d, "shift": d}
        self.makers = nn.ModuleDict({name: nn.Linear(dim, size) for name, size in sizes.items()})
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def forward(self, tasks: torch.Tensor, e_l: torch.Tensor, place: int) -> AdapterWeights:
        """The adapters of tasks (g,) for a layer's embedding e_l (e,) and a place's number."""
        e_t = self.task(tasks)  # (g,) -> (g, e)
        e_l, e_p = (e.expand_as(e_t) for e in (e_l, self.place.weight[place]))  # each (e,) -> (g, e)
        code = self.norm(self.join(torch.cat([e_t, e_l, e_p], dim=-1)))  # (g, 3 e) -> (g, e)
        w = AdapterWeights(*(self.makers[name](code) for name in AdapterWeights._fields))  # each (g, e) -> (g, size)
        d, r = self.sizes
        return w._replace(
            down=w.down.unflatten(-1, (r, d)),  # (g, r d) -> (g, r, d)
            up=w.up.unflatten(-1, (d, r)),  # (g, d r) -> (g, d, r)
        )

    def layer_embedding(self, index: float) -> torch.Tensor:
        """e_l (e,) of a layer; of an index that has none, on the line through those of its two nearest neighbours."""
        table = self.layer.weight
        if (index == int(index) and 0 <= index < len(table)) or len(table) == 1:
            return table[min(max(int(index), 0), len(table) - 1)]
        low = min(max(int(index // 1), 0), len(table) - 2)
        return torch.lerp(table[low], table[low + 1], index - low)


class HyperAdapter(nn.Module):
    """``forward(x, y) = y + delta(y)`` with the adapter that the network generates for each row's task, this layer and
    this place; for ``host.after``."""

    def __init__(self, network: HyperNetwork, tasks: Tasks, layer: float, place: int, activation: str):
        super().__init__()
        self.network = network
        self.tasks = tasks
        self.layer, self.place = layer, place
        self.activation = ACT2FN[activation]

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        rows, ids = self.tasks.grouped(y)  # (b, t, d) -> (g, s, d), with the task of each group, (g,)
        weights = self.network(ids, self.network.layer_embedding(self.layer), self.place)
        delta = weights.delta(cast(rows, self.network.layer.weight), self.activation)  # (g, s, d)
        return y + delta.to(y.dtype).view(y.shape)  # (g, s, d) -> (b, t, d)


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
    def make(self, task: int, layer: float, place: str, stack: str | None = None) -> AdapterWeights:
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
