r"""MOELoRA: low-rank experts that all tasks share, weighted by a gate that sees the task only.

.. math:: y = W x + \frac{\alpha}{r} \sum_{i=1}^{N} \omega_{t,i} B_i A_i x, \qquad
          \omega_t = \operatorname{softmax}(W_g e_t)

Shapes: W (out, in), A_i (r/N, in), B_i (out, r/N), e_t (task_dim,), W_g (N, task_dim). Every B_i starts at zero, so the
start is the identity; A_i at N(0, 0.01^2), e_t at N(0, 1). Trained: r (in + out) a matrix, the tasks' embeddings and
the gate. One gate serves the whole model; with ``shared_gate=False`` each matrix has embeddings and a gate of its own.

A batch's ``task_ids`` say which task its rows belong to, ``with adapted.task(i)`` does for rows without (as in
``generate()``); otherwise they are of task 0. For one task the experts are one update, which merges exactly:

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

import torch

from peftlib.mechanisms.experts import Experts, TaskGate
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import add_to_weight, check_rank
from peftlib.methods.base import ConfigError, MethodConfig, at_least
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


class MOELoRA(PerTask):
    Config = MOELoRAConfig
    each_task_has = "an update"
    learning_rate = 2e-3

    def attach(self, host: Host) -> None:
        c = self.config
        host.tasks.count = c.tasks
        gate = self._gate() if c.shared_gate else None
        self.updates: dict = {}
        for site in host.anatomy.sites(c.targets):
            check_rank(c.rank, site)
            sizes = site.in_features, site.out_features
            update = Experts(*sizes, c.rank, c.alpha / c.rank, c.dropout, c.std, gate or self._gate())
            self.updates[site] = host.after(site, "moelora", update.watch(host.tasks))

    def _gate(self) -> TaskGate:
        return TaskGate(self.config.tasks, self.config.task_dim, self.config.experts)

    @property
    def gates(self) -> dict[str, TaskGate]:
        """The gates by name in the model: one, or one a matrix."""
        found = {f"{path}.gate": child.gate for path, child in self.host.paths().items()}
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

    def merge(self) -> None:
        for site, update in self.updates.items():
            add_to_weight(site, update.delta())
