"""What fine-tuning will take in memory, before any weights are there: for a model, a method and a GPU.

A training step is carried out on torch's meta device, where tensors have shapes and no numbers, and every tensor that
is alive is counted. So the plan holds for a method as it is written, whatever it keeps, without formulas.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from peftlib import backbones
from peftlib.adapted import Adapted, attach
from peftlib.efficiency.memory import LiveTensors
from peftlib.errors import ConfigError, UnknownNameError, UnsupportedError
from peftlib.methods.base import MethodConfig, SavedAdapter, at_least

PRECISIONS = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.float32, torch.bfloat16),
}
"""Name -> dtype of the backbone's weights, dtype in which it computes."""

OPTIMIZERS = {"adamw": (2, None), "adamw-8bit": (2, 1), "sgd-momentum": (1, None), "sgd": (0, None)}
"""Name -> states a trained parameter, bytes of each (None: those of the parameter)."""


@dataclass(frozen=True)
class Plan:
    """Bytes of one training step. ``weights``: backbone and method, frozen or not; ``gradients`` and ``optimizer``: of
    the ``trained`` parameters; ``activations``: everything else that is alive at the peak of forward and backward."""

    backbone: str
    method: str
    trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def plan(
    backbone: str,
    method: str | MethodConfig,
    *,
    batch_size: int = 1,
    length: int = 512,
    precision: str = "bfloat16",
    optimizer: str = "adamw",
    checkpointing: bool = False,
    head: str = "causal_lm",
    sources: Sequence[SavedAdapter] = (),
    **options: Any,
) -> Plan:
    """Plan one step on one device.

    Args:
        backbone: a published model of :mod:`peftlib.backbones`, or whatever a config is found for.
        method: a name of :func:`peftlib.methods` with its ``options``, or a config. ``"full"`` needs no anatomy.
        batch_size, length: rows of a forward and tokens a row, without padding.
        precision: "float32"; "bfloat16": weights and products; "mixed": float32 weights, bfloat16 products (autocast).
            What trains with a method is float32 in each; ``"full"`` in bfloat16 is all in bfloat16, as by
            ``attach(..., keep_half=True)``.
        optimizer: "adamw" (as torch's: two states a parameter, in its dtype), "adamw-8bit", "sgd-momentum" or "sgd".
        checkpointing: recompute each layer in the backward pass.
        head: as for :func:`peftlib.backbones.load`.
        sources: for methods that build on other adapters.

    Not counted: what CUDA and its kernels take for themselves (about half a gigabyte), fragmentation, the copies of
    weights that autocast keeps, and a method's calibration. Gradients are counted together, as they are at the end of
    the backward pass, so that the total is an upper bound of the tensors alive at once.

    Raises UnknownNameError, ConfigError, UnsupportedError for a family that the method cannot act on and for a method
    that chooses from data what it trains: measure that one with :mod:`peftlib.efficiency.memory`.
    """
    for kind, name, known in (("precision", precision, PRECISIONS), ("optimizer", optimizer, OPTIMIZERS)):
        if name not in known:
            raise UnknownNameError(kind, name, known)
    at_least("batch_size", batch_size, 1)
    at_least("length", length, 1)
    stored, computed = PRECISIONS[precision]
    model = backbones.shapes(backbone, head=head)
    cast(nn.Module, model).to(stored)  # PreTrainedModel.to has lost its signature
    # Every parameter trains: that needs no table of the family's parts.
    full = method == "full" and not options
    adapted = None if full else attach(model, method, sources=sources, keep_original=False, **options)
    if adapted is not None and any(adapted.method.pending()):
        raise UnsupportedError(
            f"{adapted.name} chooses from data what it trains, so its step cannot be planned from shapes; measure it "
            "with peftlib.efficiency.memory on the device itself"
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = sum(_sizes(model).values())
    gradients = sum(p.numel() * p.element_size() for p in trained)
    states, size = OPTIMIZERS[optimizer]
    return Plan(
        backbone=backbone,
        method="full" if adapted is None else adapted.name,
        trained=sum(p.numel() for p in trained),
        weights=weights,
        gradients=gradients,
        optimizer=sum(states * p.numel() * (size or p.element_size()) for p in trained),
        activations=_activations(model, adapted, computed, batch_size, length, head, checkpointing),
    )


def _activations(
    model: PreTrainedModel,
    adapted: Adapted | None,
    computed: torch.dtype,
    batch_size: int,
    length: int,
    head: str,
    checkpointing: bool,
) -> int:
    """Bytes alive at the peak of a forward and backward pass, gradients of parameters left out."""
    for parameter in _backbone_parameters(model, adapted):
        parameter.data = parameter.data.to(computed)
    device = model.device
    ids = torch.zeros((batch_size, length), dtype=torch.long, device=device)
    inputs = {"input_ids": ids, "labels": ids if head != "classification" else ids[:, 0]}
    if adapted is not None:
        adapted.guard.running = adapted.lifecycle(1)  # training hooks need numbers; this forward has none
    if checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ConfigError(f"{type(model).__name__} has no gradient checkpointing; plan without it")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if head == "causal_lm":
            # Without a cache transformers looks into the positions for packed rows, unless the mask is ready-made.
            inputs["attention_mask"] = torch.ones((batch_size, 1, length, length), dtype=torch.bool, device=device)
    # A gradient is dropped as soon as it is formed: they are counted apart.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop)
    model.train()
    try:
        with LiveTensors() as meter:
            model(**inputs).loss.backward()
    except (NotImplementedError, RuntimeError) as error:
        raise UnsupportedError(
            f"the forward of {type(model).__name__} with this method needs numbers, not only shapes ({error}); measure "
            "it with peftlib.efficiency.memory on the device itself"
        ) from error
    return meter.peak


def _drop(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _backbone_parameters(model: nn.Module, adapted: Adapted | None) -> Iterable[nn.Parameter]:
    """All parameters but the new ones of a method, which stay in float32."""
    new = set() if adapted is None else {id(p) for c in adapted.host.paths().values() for p in c.parameters()}
    return (p for p in model.parameters() if id(p) not in new)


def _sizes(model: nn.Module) -> dict[int, int]:
    """Storage -> bytes, of all parameters and buffers."""
    storages = (t.untyped_storage() for t in (*model.parameters(), *model.buffers()))
    return {s._cdata: s.nbytes() for s in storages}


def table(plans: Iterable[Plan], memory: float | None = None) -> Table:
    """The plans as a table for a terminal, in GB (10^9 bytes); with ``memory`` of a GPU, also whether they fit."""
    shown = Table(title="Memory of a training step, GB")
    shown.add_column("backbone")
    shown.add_column("method", no_wrap=True)
    names = ("weights", "gradients", "optimizer", "activations", "total")
    for heading in ("trained", *names, *(() if memory is None else (f"fits {memory:g} GB",))):
        shown.add_column(heading, justify="right")
    for p in plans:
        cells = [p.backbone, p.method, f"{p.trained:,}", *(f"{getattr(p, name) / 1e9:,.2f}" for name in names)]
        if memory is not None:
            cells.append("yes" if p.total <= memory * 1e9 else "no")
        shown.add_row(*cells)
    return shown
