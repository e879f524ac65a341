"""Adapters whose weights a network makes from embeddings of task, layer and place."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from peftlib.mechanisms.host import Tasks
from peftlib.mechanisms.precision import cast


class Made(NamedTuple):
    """The weights of one adapter for each of n tasks: W_down (n, r, d), W_up (n, d, r), biases, and the scale and shift
    of the norm behind it, (n, d)."""

    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor

    def delta(self, y: torch.Tensor, activation: nn.Module) -> torch.Tensor:
        """``norm(W_up act(W_down y + b_down) + b_up)`` for y (n, tokens, d), each task's adapter on its own rows."""
        inner = activation(torch.baddbmm(self.down_bias[:, None], y, self.down.mT))
        z = torch.baddbmm(self.up_bias[:, None], inner, self.up.mT)
        return F.layer_norm(z, z.shape[-1:]) * self.scale[:, None] + self.shift[:, None]


class HyperNetwork(nn.Module):
    """Makes the adapters of one stack from ``[task; layer; place]`` embeddings of width ``dim``.

    The three are joined, mapped to ``hidden`` units (ReLU), to ``dim`` numbers and normed; six linear maps make the
    weights from these. Embeddings start at N(0, 1), linear maps at N(0, std) with zero biases. ``task`` may be shared
    with other stacks.
    """

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

    def forward(self, tasks: torch.Tensor, layer: torch.Tensor, place: int) -> Made:
        """The adapters of tasks (n,) for a layer's embedding (dim,) and a place's number."""
        task = self.task(tasks)
        parts = [task, *(e.expand_as(task) for e in (layer, self.place.weight[place]))]
        code = self.norm(self.join(torch.cat(parts, dim=-1)))
        made = Made(*(self.makers[name](code) for name in Made._fields))
        d, r = self.sizes
        return made._replace(down=made.down.unflatten(-1, (r, d)), up=made.up.unflatten(-1, (d, r)))

    def layer_embedding(self, index: float) -> torch.Tensor:
        """The embedding (dim,) of a layer; of an index that has none, on the line through those of its two nearest
        neighbours."""
        table = self.layer.weight
        if (index == int(index) and 0 <= index < len(table)) or len(table) == 1:
            return table[min(max(int(index), 0), len(table) - 1)]
        low = min(max(int(index // 1), 0), len(table) - 2)
        return torch.lerp(table[low], table[low + 1], index - low)


class HyperAdapter(nn.Module):
    """``forward(x, y) = y + delta(y)`` with the adapter that the network makes for each row's task, this layer and this
    place; for ``host.after``."""

    def __init__(self, network: HyperNetwork, tasks: Tasks, layer: float, place: int, activation: str):
        super().__init__()
        self.network = network
        self.tasks = tasks
        self.layer, self.place = layer, place
        self.activation = ACT2FN[activation]

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        grouped, ids = self.tasks.grouped(y)
        made = self.network(ids, self.network.layer_embedding(self.layer), self.place)
        delta = made.delta(cast(grouped, self.network.layer.weight), self.activation)
        return y + delta.to(y.dtype).view(y.shape)
