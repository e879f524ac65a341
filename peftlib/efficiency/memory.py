"""What training with each method takes in memory, beside the loaded backbone: its calibration, and its steps.

On CUDA it is the allocator's peak. On the CPU it is the peak of all tensors that are alive at once, counted exactly and
alike on every machine; what kernels use inside themselves is not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftlib.adapted import attach
from peftlib.efficiency.bench import loaded, random_batch, untrained_sources
from peftlib.methods.base import MethodConfig
from peftlib.methods.registry import config

COMPARED = ("full", "lora", "bitfit", "fish_mask", "sam", "lt_sft", "diff_pruning")
"""The methods that are compared by default: full fine-tuning, LoRA, and those that train entries of frozen tensors."""


@dataclass(frozen=True)
class Memory:
    """One method's bytes above the loaded backbone. ``calibration`` is the peak of what comes before training (0 where
    nothing does), ``training`` that of forward, backward and AdamW's step; ``gradients`` and ``optimizer`` are what of
    it the trained parameters' gradients and AdamW's states take."""

    name: str
    trained: int
    calibration: int
    training: int
    gradients: int
    optimizer: int
    device: str


class LiveTensors(TorchDispatchMode):
    """Inside ``with``: bytes of the tensors made inside that are alive (``now``), and their ``peak``."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def restart(self) -> int:
        """The peak so far; a new one begins with what is alive."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            # A view of a tensor that was there before is not new.
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self._born(tensor.untyped_storage())
        return result

    def _born(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._died, storage._cdata)

    def _died(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class _Allocated:
    """The same of CUDA's allocator."""

    def __enter__(self) -> _Allocated:
        torch.cuda.synchronize()
        self._before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.synchronize()

    def restart(self) -> int:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - self._before
        torch.cuda.reset_peak_memory_stats()
        return peak


def measure(
    name: str,
    method: MethodConfig,
    *,
    backbone: str = "minilm-l6",
    batch_size: int = 8,
    length: int = 64,
    batches: int = 2,
    device: str | torch.device | None = None,
) -> Memory:
    """Measure one method.

    Args:
        name: the row's label.
        method: the method's config.
        backbone: a name of :func:`peftlib.backbones.load`, given a two-class head and no dropout.
        batch_size, length: rows and tokens of a batch, without padding.
        batches: how many batches the calibration reads, and steps the training takes.
        device: default: CUDA where there is one, else the CPU.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    load = partial(loaded, backbone, device)
    model, sources = load(), untrained_sources(method.method, load)
    generator = torch.Generator().manual_seed(0)
    data = [random_batch(model, batch_size, length, generator) for _ in range(batches)]
    with _Allocated() if device.type == "cuda" else LiveTensors() as meter:
        adapted = attach(model, method, sources=sources, keep_original=False)
        meter.restart()
        adapted.calibrate(data)
        calibration = meter.restart() if adapted.method.calibrates else 0
        parameters = list(adapted.trainable().values())
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        model.train()
        with adapted.lifecycle(batches) as life:
            for batch in data:
                life.step_start()
                model(**batch).loss.backward()
                life.gradients()
                optimizer.step()
                gradients = sum(_bytes(p.grad) for p in parameters if p.grad is not None)
                optimizer.zero_grad()
                life.step_end()
        training = meter.restart()
    states = (t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim())
    return Memory(
        name, adapted.count().trained, calibration, training, gradients, sum(map(_bytes, states)), device.type
    )


def compare(methods: Iterable[str] = (), **options: Any) -> Iterator[Memory]:
    """Measure methods (default: ``COMPARED``) with their defaults, one after the other; ``options`` are those of
    :func:`measure`."""
    chosen = list(methods) or COMPARED
    for name in track(chosen, "measuring", transient=True):
        yield measure(name, config(name), **options)


def table(rows: Iterable[Memory]) -> Table:
    """The rows as a table for a terminal."""
    rows = list(rows)
    shown = Table(
        title="Memory of training, beside the backbone",
        caption="MB; peaks on " + " and ".join(sorted({r.device for r in rows})),
    )
    shown.add_column("method", no_wrap=True)
    for heading in ("trained", "calibration", "training", "gradients", "optimizer"):
        shown.add_column(heading, justify="right")
    for r in rows:
        sizes = (f"{x / 2**20:.1f}" for x in (r.calibration, r.training, r.gradients, r.optimizer))
        shown.add_row(r.name, f"{r.trained:,}", *sizes)
    return shown


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
