r"""MOELoRA: low-rank experts that all tasks share, weighted by a gate that sees the task only.

.. math:: y = W x + \frac{\alpha}{r} \sum_{i=1}^{N} \omega_{t,i} B_i A_i x, \qquad
          \omega_t = \operatorname{softmax}(W_g e_t)

Shapes: W (out, in), A_i (r/N, in), B_i (out, r/N), e_t (task_dim,), W_g (N, task_dim). Every B_i starts at zero, so the
start is the identity; A_i at N(0, 0.01^2), e_t at N(0, 1). Trained: r (in + out) a matrix, the tasks' embeddings and
the gate. One gate serves the whole model; with ``shared_gate=False`` each matrix has embeddings and a gate of its own.

A batch's ``task_ids`` say which task each row belongs to; rows without any are of task i inside ``with
adapted.task(i)`` and an error elsewhere. For one task the experts are one update, which merges exactly:

>>> adapted = peftlib.attach(model, "moelora", tasks=3)
>>> peftlib.fit(adapted, peftlib.tasks.mix([a, b, c]), tokenizer=tokenizer)
>>> adapted.method.keep(1)               # this task only: save(), merge() and the model are then its own

Source: Liu et al. 2023, arXiv:2310.18339, and its code, with its settings: r = 16, N = 8, alpha 32, dropout 0.1, all
linear maps of a layer. Its gate of each matrix is a class that its runs do not use; its embedding has a row more than
there are tasks, which nothing reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.anatomy import Site
from peftlib.mechanisms import low_rank
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import LowRank
from peftlib.mechanisms.precision import cast
from peftlib.mechanisms.tasks import Tasks
from peftlib.methods.base import ConfigError, MethodConfig, at_least
from peftlib.methods.bases.low_rank import LowRankUpdates, fit_rank
from peftlib.methods.bases.per_task import PerTask


@dataclass(frozen=True)
class MOELoRAConfig(MethodConfig):
    """``tasks``: how many there are; ``rank`` r of all ``experts`` N together, a multiple of N; ``alpha`` (the update
    is scaled by alpha / r), ``targets`` (site patterns), ``task_dim`` of the tasks' embeddings, ``shared_gate``: one
    for the whole model, ``std`` of A's start, ``dropout`` on the update's input."""

    tasks: int = 1
    rank: int = 16
    experts: int = 8
    alpha: float = 32.0
    targets: tuple[str, ...] | str = "all-linear"
    task_dim: int = 64
    shared_gate: bool = True
    std: float = 0.01
    dropout: float = 0.1

    def __post_init__(self):
        for name in ("tasks", "rank", "experts", "task_dim"):
            at_least(name, getattr(self, name), 1)
        if self.rank % self.experts:
            raise ConfigError(f"rank={self.rank} is not a multiple of experts={self.experts}; it is shared among them")


class TaskGate(nn.Module):
    """``forward(ids) = softmax(W_g e[ids])``: the experts' weights omega (g, N) for task numbers ids (g,).

    Shapes: e is ``embedding`` (tasks, task_dim), which starts at N(0, 1); W_g is ``linear`` (N, task_dim), which starts
    as torch's linear maps do. With one task, every row belongs to it.
    """

    def __init__(self, tasks: int, dim: int, experts: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(tasks, dim))
        self.linear = nn.Linear(dim, experts, bias=False)

    def __len__(self) -> int:
        return len(self.embedding)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weights()[ids if len(self) > 1 else torch.zeros_like(ids)]  # (tasks, N) -> (g, N)

    def weights(self) -> torch.Tensor:
        """The weights of all tasks, (tasks, N)."""
        return self.linear(self.embedding).softmax(dim=-1)  # (tasks, task_dim) -> (tasks, N)

    @torch.no_grad()
    def keep(self, task: int) -> None:
        """Forget every other task."""
        self.embedding = nn.Parameter(self.embedding[task : task + 1].clone(), self.embedding.requires_grad)


class Experts(LowRank):
    """``forward(x, y) = y + scale * sum_i omega_i B_i A_i dropout(x)`` with the weights omega of each row's task.

    Shapes, with b rows of t tokens in g groups of one task each: x (b, t, in), y (b, t, out). A (r, in) and B (out, r)
    hold the N experts one after the other, r / N rows and columns each. ``gate`` may be shared with other updates;
    ``tasks`` knows the tasks of the rows.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        scale: float,
        dropout: float,
        std: float,
        gate: TaskGate,
        tasks: Tasks,
    ):
        super().__init__(in_features, out_features, rank, scale, dropout, partial(nn.init.normal_, std=std))
        self.gate = gate
        self.tasks = tasks

    def _by_rank(self, omega: torch.Tensor) -> torch.Tensor:
        """The weights of the experts (..., N) as weights of the ranks (..., r)."""
        return omega.repeat_interleave(len(self.A) // omega.shape[-1], dim=-1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, ids = self.tasks.grouped(cast(self.dropout(x), self.A))  # (b, t, in) -> (g, n, in), (g,)
        Ax = F.linear(x, self.A)  # (g, n, in) -> (g, n, r)
        Ax = Ax * self._by_rank(self.gate(ids)).to(Ax.dtype)[:, None]  # (g, n, r) * (g, 1, r)
        return low_rank.update(y, Ax.flatten(0, -2), self.B, self.scale)  # (b t, r) -> (b, t, out)

    @torch.no_grad()
    def delta(self, task: int = 0) -> torch.Tensor:
        """The (out, in) update of one task, formed in float32 or wider."""
        A, B, omega = (t.to(self.delta_dtype) for t in (self.A, self.B, self._by_rank(self.gate.weights()[task])))
        return self.scale * (B * omega) @ A  # (out, r) (r, in) -> (out, in)


class MOELoRA(PerTask, LowRankUpdates):
    Config = MOELoRAConfig
    each_task_has = "an update"
    learning_rate = 2e-3
    child = "moelora"

    def targets(self, host: Host) -> list[Site]:
        self.config = fit_rank(self.config, host.anatomy.sites(self.config.targets), self.config.experts)
        return super().targets(host)

    def attach(self, host: Host) -> None:
        host.tasks.count = self.config.tasks
        self.gate = self._gate() if self.config.shared_gate else None
        super().attach(host)

    def _gate(self) -> TaskGate:
        return TaskGate(self.config.tasks, self.config.task_dim, self.config.experts)

    def update(self, site: Site) -> Experts:
        c, gate = self.config, self.gate or self._gate()
        sizes = site.in_features, site.out_features
        return Experts(*sizes, c.rank, c.alpha / c.rank, c.dropout, c.std, gate, self.host.tasks)

    @property
    def gates(self) -> dict[str, TaskGate]:
        """The gates by name in the model: one, or one a matrix."""
        found = {f"{path}.gate": child.gate for path, child in self.named().items()}
        first = {id(gate): name for name, gate in reversed(found.items())}
        return {name: found[name] for name in found if first[id(found[name])] == name}

    @torch.no_grad()
    def weights(self) -> dict[str, torch.Tensor]:
        """Each gate's weights of the experts, (tasks, N)."""
        return {name: gate.weights() for name, gate in self.gates.items()}

    def task_parts(self) -> Iterable[TaskGate]:
        return self.gates.values()

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        stored = {len(tensor) for name, tensor in state.items() if name.endswith("gate.embedding")}
        if stored == {1} and self.tasks > 1:
            self.keep(0)
        self.host.load_state(state)
