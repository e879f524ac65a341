r"""Hadamard adapter: a trained vector scales the attention output, another shifts it, and the norm behind them trains.

.. math:: a' = w \odot a + b

Shapes: a (b, t, d), the output of the attention block before the residual sum, for b rows of t tokens; w, b (d), which
start at one and zero, so the start is the identity. Trained: w, b and one norm (2d) a layer, 36,864 on BERT-base. It
merges exactly into the output projection: w scales the rows of its weight and its bias, b is added to the bias.

Two trainings: in the first ``head_stage`` of the steps only the task head trains, then the head stays as it is and
vectors and norms train. Each has the learning-rate schedule for itself. Without a task head (language models,
``train_head=False``) there is only the second.

Source: Chen et al. 2023, arXiv:2407.11033. The abstract's 0.033 % of BERT-base is two vectors and one norm a layer. Not
confirmed there, so chosen here: a is taken behind the output projection; the trained norm is the one that the attention
output meets next, which is the feed-forward block's norm where norms stand before their block; half of the steps go to
each stage. Decoders with cross-attention have the vectors on self-attention only. Where the output projection has no
bias (LLaMA, T5), b has nothing to merge into: merge() refuses, and ``shift=False`` leaves b out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from peftlib.anatomy import Layer, Site
from peftlib.errors import MergeError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.scaling import ScaleOutput
from peftlib.mechanisms.schedules import Stage
from peftlib.methods.base import ConfigError, Method, MethodConfig, TrainingState


@dataclass(frozen=True)
class HadamardAdapterConfig(MethodConfig):
    """``head_stage``: share of the steps in which only the task head trains, 0 to train all at once; ``shift``:
    whether there is b; ``train_norms``: whether the norm behind the attention trains."""

    head_stage: float = 0.5
    shift: bool = True
    train_norms: bool = True

    def __post_init__(self):
        if not 0 <= self.head_stage < 1:
            raise ConfigError(f"head_stage={self.head_stage!r} is a share of the steps: at least 0 and below 1")


class Hadamard(ScaleOutput):
    """Behind the output projection: ``forward(x, a) = w * a + b`` with ``scale`` w and ``shift`` b, or without b."""

    def __init__(self, d: int, shift: bool):
        super().__init__(d)
        self.shift = nn.Parameter(torch.zeros(d)) if shift else None

    def forward(self, x: torch.Tensor | None, a: torch.Tensor) -> torch.Tensor:
        scaled = a * self.scale  # (b, t, d)
        return (scaled if self.shift is None else scaled + self.shift).to(a.dtype)  # (b, t, d)


class HadamardAdapter(Method):
    Config = HadamardAdapterConfig
    learning_rate = 1e-2

    def attach(self, host: Host) -> None:
        self.layers: dict[Site, Hadamard] = {}
        for layer in host.anatomy.layers:
            site = layer.sites["attention.output"]
            self.layers[site] = host.after(site, "hadamard_adapter", Hadamard(site.out_features, self.config.shift))
            if self.config.train_norms:
                host.train(_next_norm(layer).parameters())

    def stages(self, total: int) -> tuple[Stage, ...]:
        first = round(self.config.head_stage * total) if self._trained_head() else 0
        stages = (Stage("task head", first), Stage("adapter and norms", total - first))
        return tuple(stage for stage in stages if stage.steps)

    def _trained_head(self) -> list[nn.Parameter]:
        return [p for p in self.host.anatomy.head.values() if p.requires_grad]

    def on_gradients(self, training: TrainingState) -> None:
        """Drop the gradients of the parameters that the present stage does not train."""
        if not self.config.head_stage or not (head := self._trained_head()):
            return
        ids = {id(p) for p in head}
        for parameter in self.host.model.parameters():
            if (id(parameter) in ids) != (training.stage == "task head"):
                parameter.grad = None

    def check_mergeable(self) -> None:
        super().check_mergeable()
        bare = [site for site, layer in self.layers.items() if layer.shift is not None and site.bias is None]
        if bare:
            raise MergeError(
                f"hadamard_adapter's shift merges into the bias of the output projection, and {bare[0]} has none. Keep "
                "it attached, or train it with shift=False, which merges exactly."
            )

    def merge(self) -> None:
        for site, layer in self.layers.items():
            layer.fold(site)


def _next_norm(layer: Layer) -> nn.Module:
    """The norm through which the attention output passes first."""
    if not layer.pre_norm:
        return layer.norms["attention"]
    return layer.norms.get("cross_attention", layer.norms["ffn"])
