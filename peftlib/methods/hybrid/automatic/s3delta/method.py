r"""S3Delta: which modules stand where is learned, by gates that compete for a budget of parameters (hybrid, automatic).

.. math:: \hat z_i = \sigma(\operatorname{logit} u_i + \operatorname{logit} p_i), \quad
          p_i = \sigma\Bigl(\frac{\alpha_i - b}{\beta}\Bigr), \quad \sum_i p_i\, n_i = B; \qquad
          \min_\alpha \mathcal L_2\bigl(w^*(\alpha), \alpha\bigr), \ w^*(\alpha) = \arg\min_w \mathcal L_1(w, \alpha)

Candidates i with n_i parameters: LoRA of rank 1 and a trained bias (out) at every linear map of self-attention and
feed-forward block; a trained bias and a trained weight (d) at every norm of the layers and at the final one; an adapter
behind attention and feed-forward block, whose two maps (d to d / 32 and back) have rank 1; d is the hidden size. A
search (:meth:`Adapted.calibrate`) trains all candidates, each scaled by its gate z_i, with the task head on one half of
the training batches and alpha on the other, by second-order DARTS; u_i is uniform, beta a temperature, and b is found
anew at each draw, so that the expected number of parameters is B, a share of the backbone's. Then the candidates are
taken by falling p while they fit into B, and train anew from their start, without gates. Trained: at most B. LoRA,
biases and norms start at zero change, the adapters' maps at random Glorot matrices with a gain of sqrt(2), so a
structure with adapters starts as another function; with ``zero_up`` they too start at zero change. No merge: adapters
are nonlinear.

A search has ``steps`` steps of five passes each. With ``order=1`` alpha's gradient is taken at the weights as they are
(DARTS of first order, Liu et al. 2019, arXiv:1806.09055), and a step costs two passes. ``search_batch_size`` cuts the
training batches into smaller ones: more draws of the gates in the same time. With a file,
``adapted.calibrate(batches, checkpoint=file)``, as runs of :mod:`peftlib.experiments` have one, an interrupted search
goes on. ``strategy="random"`` takes a random structure of the same budget instead.

Source: Hu et al. 2022, arXiv:2206.07382, and its code (S3Delta-M). As there: candidates, alpha at zero, beta, rates of
the gates and their gradients, clipping at 2, soft gates, one draw for the passes of alpha's gradient and another for
the weights, greedy choice, the adapters' start. Where we differ: the structure is taken at the search's end (theirs
where validation was best); halves are of batches (theirs of rows); the passes of a step share their dropout; the task
head trains too (their T5 has none). Chosen here: 100 steps (theirs 15 epochs) at a larger rate of the weights (theirs
3e-4), and 0.1 % of the backbone (theirs 0.014 % of T5-large). Biases and weights of norms train as changes that are
added, as theirs, also where the backbone has no bias; cross-attention has no candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from peftlib.anatomy import Site
from peftlib.errors import LoadError, TargetError
from peftlib.mechanisms.bottleneck import Sequential, check_activation
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import LowRank, check_rank
from peftlib.methods.base import ConfigError, Method, MethodConfig, at_least, between, one_of
from peftlib.methods.hybrid.automatic.s3delta.layer import Gates, LowRankLinear, Shift, Stretch
from peftlib.methods.hybrid.automatic.s3delta.search import S3DeltaSearch, Search, fitting

LINEAR = {"lora": ("B",), "adapter": ("up.B", "up.bias"), "bitfit": ("b",), "lnfit": ("w",)}
"""Kind of candidate -> the parameters in which its change is linear."""
KINDS = tuple(LINEAR)


@dataclass(frozen=True)
class S3DeltaConfig(MethodConfig):
    """``budget``: at most this share of the parameters below the task head trains; ``steps`` of the search, at
    ``search_rate`` of the weights and ``gate_rate`` of alpha, whose gradient is of ``order`` 1 or 2, on batches of at
    most ``search_batch_size`` rows (default: those of the training); ``beta`` of the gates; ``kinds`` of candidates;
    ``rank`` of LoRA and of the adapters' maps; ``scale`` of LoRA; ``reduction`` of the adapters' inner width, and their
    ``activation``, and ``zero_up`` to let them start at zero change; ``strategy``: "search", or "random" for a random
    structure, the one of number ``draw``."""

    budget: float = 0.001
    steps: int = 100
    search_rate: float = 1e-3
    gate_rate: float = 0.1
    order: Literal[1, 2] = 2
    search_batch_size: int | None = None
    beta: float = 1.0
    kinds: tuple[str, ...] = KINDS
    rank: int = 1
    scale: float = 16.0
    reduction: int = 32
    activation: str = "gelu_new"
    zero_up: bool = False
    strategy: Literal["search", "random"] = "search"
    draw: int = 0

    def __post_init__(self):
        between("budget", self.budget, 0, 1)
        for name in ("search_rate", "gate_rate", "beta"):
            between(name, getattr(self, name), 0, float("inf"))
        for name in ("steps", "rank", "reduction"):
            at_least(name, getattr(self, name), 1)
        at_least("draw", self.draw, 0)
        check_activation(self.activation)
        if self.search_batch_size is not None:
            at_least("search_batch_size", self.search_batch_size, 1)
        one_of("order", self.order, (1, 2))
        one_of("strategy", self.strategy, ("search", "random"))
        if not self.kinds:
            raise ConfigError(f"kinds=() leaves no candidates; name some of {', '.join(KINDS)}")
        for kind in self.kinds:
            one_of("kind of candidate", kind, KINDS)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A module that may stand at ``where``: its ``kind``, its ``name`` in the model and its ``size`` in parameters."""

    kind: str
    where: Site | nn.Module
    make: Callable[[], nn.Module]
    name: str = ""
    size: int = 0

    def add(self, host: Host) -> nn.Module:
        return host.after(self.where, self.kind, self.make().to(host.device))


class S3Delta(Method):
    Config = S3DeltaConfig
    learning_rate = 2e-3
    calibrates = True
    structure_search = S3DeltaSearch

    def attach(self, host: Host) -> None:
        self.seed = int(torch.randint(2**31, (), device="cpu"))
        self.budget = int(self.config.budget * host.size)
        self.candidates = self._candidates(host)
        self.chosen: list[Candidate] | None = None
        self.probabilities: dict[str, float] = {}
        """Name of a candidate -> p at the end of the search."""
        smallest = min(c.size for c in self.candidates)
        if smallest > self.budget:
            raise TargetError(
                f"budget={self.config.budget} is {self.budget:,} parameters of {type(host.model).__name__}, and the "
                f"smallest candidate has {smallest:,}; choose a larger budget"
            )

    def _candidates(self, host: Host) -> list[Candidate]:
        c, parts = self.config, host.anatomy
        found = []
        for layer in parts.layers:
            for site in (s for n, s in layer.sites.items() if n.startswith(("attention.", "ffn."))):
                if "lora" in c.kinds:
                    check_rank(c.rank, site)
                lora = partial(LowRank, site.in_features, site.out_features, c.rank, c.scale)
                found += [Candidate("lora", site, lora), Candidate("bitfit", site, partial(Shift, site.out_features))]
                if site.name in ("attention.output", "ffn.down"):
                    found.append(Candidate("adapter", site, partial(self._adapter, parts.d)))
        for norm in (*(n for layer in parts.layers for n in layer.norms.values()), *parts.final_norms()):
            found += [
                Candidate("lnfit", norm, partial(Stretch, norm)),
                Candidate("bitfit", norm, partial(Shift, parts.d)),
            ]
        return self._measured(host, [candidate for candidate in found if candidate.kind in c.kinds])

    def _adapter(self, d: int) -> nn.Module:
        c = self.config
        inner = max(1, d // c.reduction)
        adapter = Sequential(d, inner, c.activation, linear=partial(LowRankLinear, rank=c.rank))
        if c.zero_up:
            nn.init.zeros_(adapter.up.B)
        return adapter

    def _measured(self, host: Host, candidates: list[Candidate]) -> list[Candidate]:
        dry_run, paths = host.dry_run(), {m: n for n, m in host.model.named_modules()}
        for candidate in candidates:
            candidate.add(dry_run)
        return [
            Candidate(
                candidate.kind,
                candidate.where,
                candidate.make,
                f"{paths[module]}.{name}",
                sum(p.numel() for p in child.parameters()),
            )
            for candidate, (module, name, child) in zip(candidates, dry_run.children)
        ]

    def pending(self) -> tuple[int, int, int]:
        return self.budget, self.budget, 4 * self.budget

    def calibrate(self, batches: Iterable[dict[str, torch.Tensor]], checkpoint: Path | None = None) -> None:
        sizes, device = [c.size for c in self.candidates], self.host.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            if sum(sizes) <= self.budget:
                order = range(len(sizes))
            elif self.config.strategy == "random":
                drawn = torch.Generator().manual_seed(self.seed + self.config.draw)
                order = torch.randperm(len(sizes), generator=drawn).tolist()
            else:
                order = self._search(sizes, batches, checkpoint)
            self._keep([self.candidates[i] for i in fitting(order, sizes, self.budget)])

    def _search(
        self, sizes: list[int], batches: Iterable[dict[str, torch.Tensor]], checkpoint: Path | None
    ) -> list[int]:
        """The candidates by falling probability; among equals the first ones win."""
        c = self.config
        gates = Gates(sizes, self.budget, c.beta, self.host.device)
        head = [p for p in self.host.anatomy.head.values() if p.requires_grad]
        starts = [p.detach().clone() for p in head]
        try:
            with self.host.temporary() as host:
                children = [candidate.add(host) for candidate in self.candidates]
                for i, (candidate, child) in enumerate(zip(self.candidates, children)):
                    gates.guard(i, child, LINEAR[candidate.kind])
                Search(
                    self.host.model,
                    gates,
                    [*(p for child in children for p in child.parameters()), *head],
                    steps=c.steps,
                    rate=c.search_rate,
                    gate_rate=c.gate_rate,
                    order=c.order,
                    batch_size=c.search_batch_size,
                    seed=self.seed,
                    what="s3delta: searching a structure",
                    checkpoint=checkpoint,
                ).run(batches)
        finally:
            with torch.no_grad():
                for parameter, start in zip(head, starts):
                    parameter.copy_(start)
        p = gates.probabilities().detach()
        self.probabilities = {candidate.name: float(x) for candidate, x in zip(self.candidates, p)}
        return p.argsort(descending=True, stable=True).tolist()

    def _keep(self, chosen: list[Candidate]) -> None:
        self.chosen = chosen
        for candidate in chosen:
            candidate.add(self.host)

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        if self.chosen is None:
            there = {name.rpartition(".")[0] for name in state}
            chosen = [c for c in self.candidates if any(f"{n}.".startswith(f"{c.name}.") for n in there)]
            if not chosen:
                raise LoadError(f"the file has none of the {len(self.candidates)} modules that s3delta chooses among")
            self._keep(chosen)
        super().load_state(state)
