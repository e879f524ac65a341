"""Low-rank experts beside a linear map, weighted by a gate that sees which task a row belongs to."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.mechanisms.host import Tasks
from peftlib.mechanisms.low_rank import LowRank, update
from peftlib.mechanisms.precision import cast


class TaskGate(nn.Module):
    """``forward(ids) = softmax(W e[ids])``: weights (rows, experts) for task numbers ids (rows,).

    Shapes: e (tasks, dim), which starts at N(0, 1); W (experts, dim), which starts as torch's linear maps do. With one
    task, every row belongs to it.
    """

    def __init__(self, tasks: int, dim: int, experts: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(tasks, dim))
        self.linear = nn.Linear(dim, experts, bias=False)

    def __len__(self) -> int:
        return len(self.embedding)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weights()[ids if len(self) > 1 else torch.zeros_like(ids)]

    def weights(self) -> torch.Tensor:
        """The weights of all tasks, (tasks, experts)."""
        return self.linear(self.embedding).softmax(dim=-1)

    @torch.no_grad()
    def keep(self, task: int) -> None:
        """Forget every other task."""
        self.embedding = nn.Parameter(self.embedding[task : task + 1].clone(), self.embedding.requires_grad)


class Experts(LowRank):
    """``forward(x, y) = y + scale * sum_i w_i B_i A_i dropout(x)`` with the weights w of each row's task.

    Shapes: x (rows, ..., in), y (rows, ..., out); A (rank, in) and B (out, rank) hold the experts one after the other,
    rank / experts of rows and columns each. ``gate`` may be shared with other updates.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, scale: float, dropout: float, std: float, gate: TaskGate
    ):
        super().__init__(in_features, out_features, rank, scale, dropout, partial(nn.init.normal_, std=std))
        self.gate = gate

    def watch(self, tasks: Tasks) -> Experts:
        """Ask these tasks whose the rows are."""
        self.tasks = tasks
        return self

    def _by_rank(self, weights: torch.Tensor) -> torch.Tensor:
        """The experts' weights (..., experts) as weights of the ranks (..., rank)."""
        return weights.repeat_interleave(len(self.A) // weights.shape[-1], dim=-1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        grouped, ids = self.tasks.grouped(cast(self.dropout(x), self.A))
        down = F.linear(grouped, self.A)
        down = down * self._by_rank(self.gate(ids)).to(down.dtype)[:, None]
        return update(y, down.flatten(0, -2), self.B, self.scale)

    @torch.no_grad()
    def delta(self, task: int = 0) -> torch.Tensor:
        """The (out, in) update of one task, formed in float32 or wider."""
        A, B, weights = (t.to(self.delta_dtype) for t in (self.A, self.B, self._by_rank(self.gate.weights()[task])))
        return self.scale * (B * weights) @ A
