r"""LoRAPrune: heads and feed-forward channels are cut out by scores that LoRA's factors and their gradients give.

.. math::
    \hat G = g_B A + B g_A - g_B g_A, \qquad
    I_u = \sum_{ij \in u} \Bigl|\hat G \odot \bigl(W + \tfrac{\alpha}{r} B A\bigr)\Bigr|_{ij}, \qquad
    s_u \leftarrow \beta s_u + (1 - \beta) \sum_W \frac{I_u}{\|I\|_2}

Shapes: W (out, in), A (r, in), B (out, r) with gradients g_A, g_B; W itself has none. LoRA is on every linear map of
the layers; B starts at zero, so the start is the identity. A unit u is a head (query, key, value and output map
together; with grouped queries a head of keys and values and all queries that read it) or an inner channel (up, gate and
down together), and is ranked among those of its own block. Trained: r (in + out) a matrix, before the cut.

From ``warmup`` to 1 - ``cooldown`` of the steps the share that is gone rises to ``ratio`` with the cube of the time
that is left, every ``interval`` steps; what is gone is masked and does not come back. Of n units exactly int(ratio n)
go. A training that ends earlier prunes the rest at its end. Then the weights, biases and factors are cut, which leaves
what the masked model computes; a further training goes on with the smaller model. ``adapted.method.cut()`` does it at
once. Measured: half of the heads and channels of MiniLM-L6's first five layers leave 6.2 of the layers' 10.6 million
parameters, and a forward of 16 rows of 64 tokens takes 0.63 times that of the whole model (one CPU thread, one
interleaved run; 0.56 with all six).

Files hold the factors as they are cut and which units are left; ``config.json`` names those that are gone, and
``load()`` onto the whole backbone cuts it again. ``merge()`` leaves a smaller transformers model whose forward is its
own. Where all layers end alike (``spare_first=0, spare_last=0``) and the config has names for their sizes (the LLaMA
family; heads that divide the hidden size), the config gets them, so ``save_pretrained`` works as ever; elsewhere the
saved adapter is the file: ``peftlib.load(backbone, folder).merge()``. T5's layers hand each other one position bias
with a row for every head, so its cut attention modules go on choosing their rows through peftlib's attention function,
after a merge too. Other methods can be attached to a merged model as far as they ask only for sizes of linear maps.

Source: Zhang et al. 2024, arXiv:2305.18403, and its code: rank 8, alpha 16, 50 %, 10 % of the steps before and after,
every 10 steps, beta 0.9; the first 10 % of the layers and the last one stay whole. Where we differ: the code never
applies the target itself, only shares below it; it knows LLaMA's 32 heads alone, where here every family, grouped
queries, cross-attention and biases are served; in an encoder-decoder both stacks spare layers. Scores stop when a block
has reached its share, and a step whose gradients are not finite is left out, as there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftlib import anatomy
from peftlib.errors import LoadError, TargetError, UnsupportedError
from peftlib.mechanisms import structured
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import LowRank, add_to_weight, check_rank, thin
from peftlib.mechanisms.structured import Block
from peftlib.methods.base import ConfigError, Method, MethodConfig, TrainingState, at_least, between

_NAME = "units"


@dataclass(frozen=True)
class LoRAPruneConfig(MethodConfig):
    """``ratio`` of the heads and channels of each pruned layer that go; ``rank`` r, ``alpha`` (the update is scaled by
    alpha / r), ``dropout`` on the update's input; ``warmup`` and ``cooldown`` (shares of the steps), ``interval`` of
    steps between prunings, ``beta`` of the smoothing; ``spare_first`` (share of a stack's layers, rounded down) and
    ``spare_last`` (layers) stay whole."""

    ratio: float = 0.5
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    warmup: float = 0.1
    cooldown: float = 0.1
    interval: int = 10
    beta: float = 0.9
    spare_first: float = 0.1
    spare_last: int = 1

    def __post_init__(self):
        between("ratio", self.ratio, 0, 1)
        if self.ratio == 1:
            raise ConfigError("ratio=1 leaves nothing of a layer; it must be below 1")
        for name in ("rank", "interval"):
            at_least(name, getattr(self, name), 1)
        for name in ("warmup", "cooldown", "beta", "spare_first", "spare_last"):
            at_least(name, getattr(self, name), 0)
        if self.beta >= 1:
            raise ConfigError(f"beta={self.beta!r} lets no step count; it must be below 1")
        if self.warmup + self.cooldown >= 1:
            raise ConfigError(
                f"warmup={self.warmup} and cooldown={self.cooldown} leave no steps to prune in; their sum must be "
                "below 1"
            )

    def share(self, step: int, total: int) -> float:
        """What share of the units is gone after ``step`` of ``total`` steps."""
        first, last = round(self.warmup * total), total - round(self.cooldown * total)
        if step <= first:
            return 0.0
        if step >= last:
            return self.ratio
        return self.ratio * (1 - (1 - (step - first) / (last - first)) ** 3)


class LoRAPrune(Method):
    Config = LoRAPruneConfig
    learning_rate = 2e-3
    exceptions = dict.fromkeys(
        ("merge on t5", "merge on mt5"),
        "The layers share one position bias with a row for every head, so attention modules that lost heads keep a "
        "part that chooses their rows; the outputs are equal.",
    )

    def attach(self, host: Host) -> None:
        c = self.config
        if host is not host.root:
            raise UnsupportedError(
                f"{self.name} cuts the maps that other methods act on, so it cannot be combined with them; attach it "
                "alone, merge() it, and attach the other method to the smaller model"
            )
        self.updates: dict = {}
        self.scores: dict[str, torch.Tensor] = {}
        for site in host.anatomy.sites():
            check_rank(c.rank, site)
            update = LowRank(site.in_features, site.out_features, c.rank, c.alpha / c.rank, c.dropout)
            self.updates[site] = host.after(site, "lora", update)
        self.blocks = structured.blocks(host, _NAME, self._layers(host))
        if not any(_count(c.ratio, block) for block in self.blocks):
            raise TargetError(
                f"ratio={c.ratio}, spare_first={c.spare_first} and spare_last={c.spare_last} remove nothing from "
                f"{len(host.anatomy.layers)} layers of {host.anatomy.kv_heads} heads and {host.anatomy.f} channels; "
                "raise ratio or spare less"
            )

    def _layers(self, host: Host) -> list[anatomy.Layer]:
        """Those that are pruned."""
        c, chosen = self.config, []
        for stack in host.anatomy.stacks:
            layers = [layer for layer in host.anatomy.layers if layer.stack == stack]
            chosen += layers[int(c.spare_first * len(layers)) : max(0, len(layers) - c.spare_last)]
        return chosen

    def gone(self) -> dict[str, list[int]]:
        """Block, such as "encoder.0.attention" -> its units that are masked or cut."""
        return {block.name: block.gone for block in self.blocks}

    @torch.no_grad()
    def on_gradients(self, training: TrainingState) -> None:
        if training.step == 0:
            self._restart()
        scores = {b.name: self._score(b) for b in self.blocks if len(b.gone) < _count(self.config.ratio, b)}
        if all(bool(score.isfinite().all()) for score in scores.values()):
            for name, score in scores.items():
                self.scores.setdefault(name, torch.zeros_like(score)).lerp_(score, 1 - self.config.beta)

    def _restart(self) -> None:
        self.scores = {}
        for block in self.blocks:
            if not block.units.cut:
                block.kept.fill_(True)

    def _score(self, block: Block) -> torch.Tensor:
        total = torch.zeros(len(block.kept), device=block.kept.device)
        for site in (*block.into, block.out):
            update = self.updates[site]
            if update.A.grad is None or update.B.grad is None:
                continue
            A, B, g_A, g_B = (t.float() for t in (update.A, update.B, update.A.grad, update.B.grad))
            gradient = torch.cat([g_B, B - g_B], dim=1) @ torch.cat([A, g_A])
            weight = torch.addmm(site.weight.float(), B, A, alpha=update.scale)
            sums = block.sums(site, gradient.mul_(weight).abs_())
            total += sums / (torch.linalg.norm(sums) + 1e-8)
        return total

    def on_step_end(self, training: TrainingState) -> None:
        step = training.step + 1
        share = self.config.share(step, training.total)
        if share == self.config.ratio or step % self.config.interval == 0:
            self._mask(share)

    def _mask(self, share: float) -> None:
        """Mask the units of the lowest scores, the first ones among equals, until this share of each block is gone."""
        for block in self.blocks:
            more = _count(share, block) - len(block.gone)
            if more > 0 and block.name in self.scores:
                order = self.scores[block.name].masked_fill(~block.kept, math.inf).argsort(stable=True)
                block.kept[order[:more]] = False

    def on_train_end(self) -> None:
        if self.scores:
            self._mask(self.config.ratio)
            self.cut()

    def cut(self) -> None:
        """Take what is masked out of the weights, for good. An optimizer from before knows the old factors."""
        for block in self.blocks:
            if block.units.cut:
                continue
            for site in block.into:
                select(self.updates[site], rows=block.indices(site))
            select(self.updates[block.out], columns=block.indices(block.out))
            structured.cut(self.host, block, _NAME)
        self.scores = {}

    def run_state(self) -> dict[str, torch.Tensor]:
        return dict(self.scores)

    def load_run_state(self, state: dict[str, torch.Tensor]) -> None:
        self.scores = {name: score.to(self.host.device).clone() for name, score in state.items()}

    def notes(self) -> dict[str, Any]:
        return {"gone": {name: anatomy.runs(units) for name, units in self.gone().items() if units}}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        mine, paths = self.host.state(), {child: path for path, child in self.host.paths().items()}
        for block in self.blocks:
            name = f"{paths[block.units]}.kept"
            kept = state.get(name)
            if kept is None or kept.shape != block.kept.shape or not bool(kept.any()):
                raise LoadError(f"the file does not say which of the {len(block.kept)} units of {name} are left")
            block.kept.copy_(kept)
        if any(n in state and state[n].shape != tensor.shape for n, tensor in mine.items()):
            self.cut()
        self.host.load_state(state)

    def merge(self) -> None:
        self.cut()
        for site, update in self.updates.items():
            add_to_weight(site, update.delta())
        structured.fit_config(self.host)


def _count(share: float, block: Block) -> int:
    """How many units of a block this share is."""
    return int(share * len(block.kept) + 1e-9)


def select(update: LowRank, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None) -> None:
    """Keep these outputs (rows) or inputs (columns) of an update only. An optimizer from before knows the old
    factors."""
    if rows is not None:
        B = thin(len(rows), update.B.shape[1]).to(update.B).copy_(update.B.detach()[rows])
        update.B = nn.Parameter(B, requires_grad=update.B.requires_grad)
    if columns is not None:
        update.A = nn.Parameter(update.A.detach()[:, columns], requires_grad=update.A.requires_grad)
