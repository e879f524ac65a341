"""S3Delta's search: the gates of candidate modules and the modules train in turn (differentiable architecture search,
DARTS).

Gates train on one half of the data, modules on the other. In the second order a gate's gradient is taken after one more
step of the modules, in the first order at the modules as they are. The expected size equals the budget at every step.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from peftlib.errors import DataError, StateError
from peftlib.mechanisms import importance
from peftlib.mechanisms.importance import Batch
from peftlib.methods.bases.search import ListedStructures
from peftlib.methods.hybrid.automatic.s3delta.layer import Gates

SEARCHING = ("steps", "search_rate", "gate_rate", "order", "search_batch_size", "beta")
"""Options that a random structure does not depend on."""


@dataclass(frozen=True)
class S3DeltaSearch(ListedStructures):
    """One searched structure and random ones of its budget, of which the best on validation data counts. Options of
    the search are not in those: another search stands beside the same random structures."""

    def structures(self, options: dict[str, Any], count: int) -> list[dict[str, Any]]:
        shared = {name: value for name, value in options.items() if name not in SEARCHING}
        random = [{**shared, "strategy": "random", "draw": i} for i in range(count)]
        return [{**options, "strategy": "search"}, *random]


def fitting(order: Iterable[int], sizes: Sequence[int], budget: int) -> list[int]:
    """The positions that are taken in this order, each if it fits into the rest of the budget; ascending."""
    chosen, left = [], budget
    for i in order:
        if sizes[i] <= left:
            chosen.append(i)
            left -= sizes[i]
    return sorted(chosen)


def cut(batches: Iterable[Batch], rows: int) -> Iterator[Batch]:
    """The batches, cut into batches of at most so many rows."""
    for batch in batches:
        names, columns = zip(*((name, v.split(rows)) for name, v in batch.items()))
        yield from (dict(zip(names, piece)) for piece in zip(*columns))


def halves(batches: Iterable[Batch], most: int) -> tuple[list[Batch], list[Batch]]:
    """Of at most ``most`` batches every other one, and the rest; a single batch is cut in the middle. Raises DataError
    for too few rows."""
    kept = list(islice(batches, most))
    if len(kept) > 1:
        return kept[::2], kept[1::2]
    rows = min((len(v) for batch in kept for v in batch.values()), default=0)
    if rows < 2:
        raise DataError(f"a search needs two halves of data, and the calibration batches have {rows} rows; give more")
    middle = rows // 2
    return [{k: v[:middle] for k, v in kept[0].items()}], [{k: v[middle:] for k, v in kept[0].items()}]


def gate_gradient(
    alpha: nn.Parameter,
    weights: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], torch.Tensor],
    other_loss: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """The gradient for alpha of ``other_loss`` at the weights w' after one step of the optimizer on ``loss``:

    d/d_alpha other_loss(w', alpha) - rate * d^2/(d_alpha d_w) loss(w, alpha) . d/d_w' other_loss(w', alpha)

    The product with the second derivative is a central difference. Weights and optimizer end as they were.
    """
    before, memory = [w.detach().clone() for w in weights], copy.deepcopy(optimizer.state_dict())

    @torch.no_grad()
    def move(direction: Sequence[torch.Tensor], by: float | torch.Tensor) -> None:
        for w, start, d in zip(weights, before, direction):
            w.copy_(start + by * d)

    for w, gradient in zip(weights, torch.autograd.grad(loss(), weights, allow_unused=True)):
        w.grad = gradient
    optimizer.step()
    optimizer.zero_grad()
    direct, *ahead = torch.autograd.grad(other_loss(), [alpha, *weights], allow_unused=True)
    ahead = [torch.zeros_like(w) if a is None else a for a, w in zip(ahead, weights)]
    optimizer.load_state_dict(memory)
    eps = 0.01 / (torch.cat([a.flatten() for a in ahead]).norm() + 1e-6)
    sides = []
    for by in (eps, -eps):
        move(ahead, by)
        sides.append(torch.autograd.grad(loss(), alpha)[0])
    move(before, 0.0)
    return direct - optimizer.param_groups[0]["lr"] * (sides[0] - sides[1]) / (2 * eps)


@dataclass
class Search:
    """A bi-level search of ``steps`` steps; :meth:`run` leaves its result in the gates.

    A step takes one batch of each half; with ``batch_size`` the batches are cut to as many rows first. It draws gates,
    updates alpha by AdamW with :func:`gate_gradient`, draws gates again, and updates the weights by AdamW. Both rates
    fall linearly to zero, both gradients are clipped at ``max_norm``. A step costs five passes forward and backward.
    With ``order=1`` alpha's gradient is taken at the weights as they are, and a step costs two passes. Everything that
    a step draws, dropout included, follows from ``seed`` and the step's number.

    With a ``checkpoint`` the state is written there, whole or not at all, every ``every`` seconds and at the end, and
    :meth:`run` goes on from it. Raises StateError for the state of another search.
    """

    model: nn.Module
    gates: Gates
    weights: list[nn.Parameter]
    steps: int
    rate: float
    gate_rate: float
    seed: int
    order: Literal[1, 2] = 2
    batch_size: int | None = None
    max_norm: float = 2.0
    what: str = "searching a structure"
    checkpoint: Path | None = None
    every: float = 5.0

    def run(self, batches: Iterable[Batch]) -> None:
        batches = batches if self.batch_size is None else cut(batches, self.batch_size)
        own, other = halves(batches, 2 * self.steps)
        self._identity = self._describe(own, other)
        optimizers = [
            torch.optim.AdamW(params, lr=rate, weight_decay=0.0, fused=True)
            for params, rate in ((self.weights, self.rate), ([self.gates.alpha], self.gate_rate))
        ]
        done = self._resume(optimizers)
        device = self.gates.alpha.device
        mode, written = self.model.training, time.monotonic()
        self.model.train()
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                for step in self._shown(range(done, self.steps)):
                    for optimizer, rate in zip(optimizers, (self.rate, self.gate_rate)):
                        # Not transformers' get_scheduler, which cannot begin in the middle, as a resumed search does.
                        optimizer.param_groups[0]["lr"] = rate * (1 - step / self.steps)
                    self._step(step, own[step % len(own)], other[step % len(other)], optimizers)
                    last = step + 1 == self.steps
                    if self.checkpoint and (last or time.monotonic() - written >= self.every):
                        self._write(step + 1, optimizers)
                        written = time.monotonic()
        finally:
            self.model.train(mode)
            for parameter in self.weights:
                parameter.grad = None

    def _step(self, step: int, own: Batch, other: Batch, optimizers: list[torch.optim.Optimizer]) -> None:
        on_weights, on_gates = optimizers
        generator = torch.Generator().manual_seed(self.seed + step)
        first, second = torch.rand(2, len(self.gates.sizes), generator=generator).to(self.gates.alpha)

        def loss(batch: Batch, u: torch.Tensor) -> torch.Tensor:
            # The passes of a step share their dropout, or the difference of two would be noise.
            torch.manual_seed(self.seed + self.steps + step)
            self.gates.draw(u)
            value = importance.loss(self.model, batch)
            if not bool(value.isfinite()):
                raise DataError("the search's loss is not finite; look at the labels and the rates")
            return value

        alpha, here, there = self.gates.alpha, partial(loss, own, first), partial(loss, other, first)
        if self.order == 2:
            alpha.grad = gate_gradient(alpha, self.weights, on_weights, here, there)
        else:
            (alpha.grad,) = torch.autograd.grad(there(), alpha)
        nn.utils.clip_grad_norm_([alpha], self.max_norm)
        on_gates.step()
        loss(own, second).backward(inputs=self.weights)
        nn.utils.clip_grad_norm_(self.weights, self.max_norm)
        on_weights.step()
        on_weights.zero_grad()

    def _shown(self, steps: range) -> Iterable[int]:
        return track(
            steps,
            self.what,
            total=self.steps,
            completed=steps.start,
            transient=True,
            disable=not sys.stdout.isatty(),
        )

    # The checkpoint

    def _describe(self, *data: list[Batch]) -> str:
        """What makes two searches the same."""
        digest = hashlib.sha256()
        for tensor in (t for half in data for batch in half for _, t in sorted(batch.items())):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        settings = (self.steps, self.rate, self.gate_rate, self.seed, self.order, self.max_norm, self.gates.beta)
        sizes = [float(self.gates.budget), *self.gates.sizes.tolist()]
        return json.dumps({"settings": settings, "sizes": sizes, "data": digest.hexdigest()})

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {"alpha": self.gates.alpha, **{f"weights.{i}": w for i, w in enumerate(self.weights)}}

    def _write(self, step: int, optimizers: list[torch.optim.Optimizer]) -> None:
        tensors = {n: t.detach() for n, t in self._tensors().items()}
        for i, optimizer in enumerate(optimizers):
            for j, entry in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{j}.{key}": value for key, value in entry.items()}
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{self.checkpoint.name}-", dir=self.checkpoint.parent)
        os.close(handle)
        try:
            save_file(
                {n: t.cpu().contiguous().clone() for n, t in tensors.items()},
                scratch,
                metadata={"step": str(step), "search": self._identity},
            )
            os.replace(scratch, self.checkpoint)
        finally:
            Path(scratch).unlink(missing_ok=True)

    @torch.no_grad()
    def _resume(self, optimizers: list[torch.optim.Optimizer]) -> int:
        """Load the checkpoint; returns how many steps are done."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return 0
        try:
            with safe_open(self.checkpoint, "pt") as file:
                found = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 - not a dict
                about = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise StateError(f"{self.checkpoint} is not a search's state ({error}); delete it") from error
        if about.get("search") != self._identity:
            raise StateError(
                f"{self.checkpoint} is the state of another search (other data, seed or settings); delete it, or give "
                "another file"
            )
        for name, tensor in self._tensors().items():
            tensor.copy_(found[name])
        for i, optimizer in enumerate(optimizers):
            state: dict[int, dict[str, torch.Tensor]] = {}
            for name, tensor in found.items():
                if name.startswith(f"optimizer.{i}."):
                    index, key = name.removeprefix(f"optimizer.{i}.").split(".")
                    state.setdefault(int(index), {})[key] = tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return int(about["step"])
