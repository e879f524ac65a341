"""What a choice within a method does to speed: FLOPs by torch's counter, and time, variant beside variant.

>>> rich.print(speed.table(speed.compare_known(["adapter_drop"])))
>>> speed.compare({f"r = {rank}": peftlib.LoRAConfig(rank=rank) for rank in (1, 8, 64)})

As in :mod:`peftlib.efficiency.bench` the variants take turns, and ratios are medians over the turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from peftlib.adapted import attach
from peftlib.efficiency.bench import loaded, random_batch, take_turns
from peftlib.errors import UnknownNameError
from peftlib.methods.base import MethodConfig
from peftlib.methods.registry import config

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "adapter_drop": {f"k = {k}": {"dropped": k, "robust": False, "bottleneck": 48} for k in range(6)},
    "coda": {f"n/k = {ratio}": {"reduction": float(ratio), "attention": "k-to-k"} for ratio in (1, 2, 3, 5)},
}
"""Methods with an option that is there to save time: options by label, the slowest first."""


@dataclass(frozen=True)
class Speed:
    """One variant: ``flops`` of a pass and their ratio to the first variant's, median ``seconds``, median ``ratio`` to
    the first variant of the same turn."""

    name: str
    flops: int
    flops_ratio: float
    seconds: float
    ratio: float


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of the matrix products in ``run()``, those of attention included."""
    # The counter does not know the CPU's fused attention; what it computes it counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def compare(
    variants: Mapping[str, MethodConfig],
    *,
    train: bool = False,
    backbone: str = "minilm-l6",
    batch_size: int = 8,
    length: int = 128,
    turns: int = 7,
    device: str | torch.device | None = None,
) -> list[Speed]:
    """Measure a forward pass without gradients, or with ``train`` a step's forward and backward pass.

    Args:
        variants: a config for each label.
        backbone: a name of :func:`peftlib.backbones.load`, given a two-class head and no dropout.
        batch_size, length: rows and tokens of the batch, without padding.
        turns: how many passes each variant takes, after one that is not counted.
        device: default: CUDA where there is one, else the CPU, with torch's number of threads.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    runs: dict[str, Callable[[], object]] = {}
    with ExitStack() as stack:
        for name, chosen in variants.items():
            model = loaded(backbone, device)
            batch = random_batch(model, batch_size, length, torch.Generator().manual_seed(0))
            adapted = attach(model, chosen)
            adapted.calibrate([batch])
            model.train(train)
            if train:
                stack.enter_context(adapted.lifecycle(turns + 2)).step_start()
            runs[name] = partial(_pass, model, batch, train)
        flops = {name: count_flops(run) for name, run in runs.items()}
        seconds = take_turns(runs, turns, device)
    first = next(iter(runs))
    return [
        Speed(
            name,
            flops=flops[name],
            flops_ratio=flops[name] / flops[first],
            seconds=statistics.median(taken),
            ratio=statistics.median(a / b for a, b in zip(taken, seconds[first])),
        )
        for name, taken in seconds.items()
    ]


def compare_known(methods: Iterable[str] = (), **settings: Any) -> Iterator[Speed]:
    """The variants of ``VARIANTS``, of the named methods or all, as :func:`compare` measures them, each beside its
    method's first: a forward pass, "method, label", and a training step, "method, training, label". Raises
    UnknownNameError."""
    methods = list(methods) or VARIANTS
    for method in methods:
        if method not in VARIANTS:
            raise UnknownNameError("method with variants", method, VARIANTS)
    for method in methods:
        for train, prefix in ((False, method), (True, f"{method}, training")):
            variants = {f"{prefix}, {label}": config(method, **options) for label, options in VARIANTS[method].items()}
            yield from compare(variants, train=train, **settings)


def table(rows: Iterable[Speed]) -> Table:
    """The variants as a table for a terminal (``rich``)."""
    rows = list(rows)
    shown = Table(title="Variants beside the first of their method")
    shown.add_column("variant", no_wrap=True)
    for heading in ("GFLOPs", "x", "ms", "x"):
        shown.add_column(heading, justify="right")
    for r in rows:
        shown.add_row(
            r.name, f"{r.flops / 1e9:.2f}", f"{r.flops_ratio:.2f}", f"{1e3 * r.seconds:.1f}", f"{r.ratio:.2f}"
        )
    return shown


def _pass(model: nn.Module, batch: dict[str, torch.Tensor], train: bool) -> None:
    if train:
        model(**batch).loss.backward()
        return
    with torch.no_grad():
        model(**batch)
