r"""LoRAPrune: heads and feed-forward channels are pruned by scores that LoRA's factors and their gradients give.

.. math::
    \hat G = g_B A + B g_A - g_B g_A, \qquad
    I_u = \sum_{ij \in u} \Bigl|\hat G \odot \bigl(W + \tfrac{\alpha}{r} B A\bigr)\Bigr|_{ij}, \qquad
    s_u \leftarrow \beta s_u + (1 - \beta) \sum_W \frac{I_u}{\|I\|_2}

Shapes: W (out, in), A (r, in), B (out, r) with gradients g_A, g_B; W itself has none. LoRA is on every linear map of
the layers; B starts at zero, so the start is the identity. A unit u is a head (query, key, value and output map
together; with grouped queries a head of keys and values and all queries that read it) or an inner channel (up, gate and
down together), and is ranked among those of its own block. Trained: r (in + out) a matrix, before the cut.

From ``warmup`` to 1 - ``cooldown`` of the steps the pruned share rises to ``ratio`` with the cube of the remaining
time, every ``interval`` steps; a pruned unit is masked and does not come back. Of n units exactly int(ratio n) are
pruned. A training that ends earlier prunes the rest at its end. Then the weights, biases and factors are cut, and the
smaller model computes the same as the masked one; a further training goes on with it. ``adapted.method.cut()`` cuts at
once. Measured: with half of the heads and channels of MiniLM-L6's first five layers pruned, 6.2 of the layers' 10.6
million parameters remain, and a forward of 16 rows of 64 tokens takes 0.63 times that of the whole model (one CPU
thread, one interleaved run; 0.56 with all six).

Files hold the cut factors and which units are kept; ``config.json`` names the pruned ones, and ``load()`` onto the
whole backbone cuts it again. ``merge()`` leaves a smaller transformers model whose forward is its own. Where all layers
end with the same sizes (``spare_first=0, spare_last=0``) and the config has names for them (the LLaMA family; heads
that divide the hidden size), the config gets them, so ``save_pretrained`` works as ever; elsewhere the saved adapter is
the file: ``peftlib.load(backbone, folder).merge()``. T5's layers share one position bias with a row for every head, so
its cut attention modules go on choosing their rows through peftlib's attention function, after a merge too. Other
methods can be attached to a merged model as far as they need only the sizes of linear maps.

Source: Zhang et al. 2024, arXiv:2305.18403, and its code: rank 8, alpha 16, dropout 0.05, 50 %, 10 % of the steps
before and after, every 10 steps, beta 0.9; the first 10 % of the layers and the last one stay whole. Paper and code
differ in the importance, and prune partly other units. The code's, above, is the default: it is what their released
script runs, and its norm lets the maps of a block count alike, however large their gradients.
``criterion="squared"`` is the paper's: :math:`\sum_{ij \in u} (\hat G \odot (W + \frac{\alpha}{r} B A))_{ij}^2`, added
over the maps as it is. Where we differ from both: the code never applies the target itself, only shares below it; it
knows LLaMA's 32 heads alone, where here every family, grouped queries, cross-attention and biases are served; in an
encoder-decoder both stacks spare layers. Scores stop when a block has reached its share, and a step whose gradients are
not finite is left out, as there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from peftlib import anatomy
from peftlib.anatomy import Site
from peftlib.errors import LoadError, TargetError, UnsupportedError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import LowRank, sites_of_rank
from peftlib.methods.base import ConfigError, MethodConfig, TrainingState, at_least, between, one_of
from peftlib.methods.bases.low_rank import LowRankUpdates, fit_rank
from peftlib.methods.reparameterized.lora.weight_update.lora_prune import layer
from peftlib.methods.reparameterized.lora.weight_update.lora_prune.layer import Block


@dataclass(frozen=True)
class LoRAPruneConfig(MethodConfig):
    """``ratio`` of the heads and channels of a layer that are pruned, by ``criterion``: "absolute" is the code's,
    "squared" the paper's; ``rank`` r, ``alpha`` (the update is scaled by
    alpha / r), ``dropout`` on the update's input; ``warmup`` and ``cooldown`` (shares of the steps), ``interval`` of
    steps between prunings, ``beta`` of the smoothing; ``spare_first`` (share of a stack's layers, rounded down) and
    ``spare_last`` (layers) stay whole."""

    ratio: float = 0.5
    criterion: Literal["absolute", "squared"] = "absolute"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
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
        one_of("criterion", self.criterion, ("absolute", "squared"))
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
        """The pruned share of the units after ``step`` of ``total`` steps."""
        first, last = round(self.warmup * total), total - round(self.cooldown * total)
        if step <= first:
            return 0.0
        if step >= last:
            return self.ratio
        return self.ratio * (1 - (1 - (step - first) / (last - first)) ** 3)


class LoRAPrune(LowRankUpdates):
    Config = LoRAPruneConfig
    learning_rate = 2e-3

    def __init__(self, config: LoRAPruneConfig):
        super().__init__(config)
        self.scores: dict[str, torch.Tensor] = {}

    def targets(self, host: Host) -> list[Site]:
        self.config = fit_rank(self.config, host.anatomy.sites())
        return sites_of_rank(host, "all-linear", self.config.rank)

    def update(self, site: Site) -> LowRank:
        c = self.config
        return LowRank(site.in_features, site.out_features, c.rank, c.alpha / c.rank, c.dropout)

    def attach(self, host: Host) -> None:
        c = self.config
        if host is not host.root:
            raise UnsupportedError(
                f"{self.name} cuts the maps that other methods act on, so it cannot be combined with them; attach it "
                "alone, merge() it, and attach the other method to the smaller model"
            )
        super().attach(host)
        self.blocks = layer.blocks(host, self._layers(host))
        host.check_dense(site for block in self.blocks for site in (*block.into, block.out))
        if not any(_count(c.ratio, block) for block in self.blocks):
            raise TargetError(
                f"ratio={c.ratio}, spare_first={c.spare_first} and spare_last={c.spare_last} remove nothing from "
                f"{len(host.anatomy.layers)} layers of {host.anatomy.kv_heads} heads and {host.anatomy.f} channels; "
                "raise ratio or spare less"
            )

    def _layers(self, host: Host) -> list[anatomy.Layer]:
        """The layers that are pruned."""
        c, chosen = self.config, []
        for stack in host.anatomy.stacks:
            layers = [one for one in host.anatomy.layers if one.stack == stack]
            chosen += layers[int(c.spare_first * len(layers)) : max(0, len(layers) - c.spare_last)]
        return chosen

    def gone(self) -> dict[str, list[int]]:
        """Block, such as "encoder.0.attention" -> its pruned units, masked or cut."""
        return {block.name: block.gone for block in self.blocks}

    def on_step_start(self, training: TrainingState) -> None:
        if training.step == 0:
            self._restart()

    @torch.no_grad()
    def on_gradients(self, training: TrainingState) -> None:
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
        """s of the block's units, (units,), from the present factors and gradients."""
        total = torch.zeros(len(block.kept), device=block.kept.device)
        for site in (*block.into, block.out):
            update = self.updates[site]
            if update.A.grad is None or update.B.grad is None:
                continue
            A, B, g_A, g_B = (t.float() for t in (update.A, update.B, update.A.grad, update.B.grad))
            # g_B A + B g_A - g_B g_A as one product: (out, 2 r) (2 r, in) -> (out, in)
            G = torch.cat([g_B, B - g_B], dim=1) @ torch.cat([A, g_A])
            W = torch.addmm(site.weight.float(), B, A, alpha=update.scale)  # (out, in), with the update
            G.mul_(W)
            if self.config.criterion == "squared":
                total += block.sums(site, G.square_())  # (out, in) -> (units,)
            else:
                I_u = block.sums(site, G.abs_())  # (out, in) -> (units,)
                total += I_u / (torch.linalg.norm(I_u) + 1e-8)
        return total

    def on_step_end(self, training: TrainingState) -> None:
        step = training.step + 1
        share = self.config.share(step, training.total)
        if share == self.config.ratio or step % self.config.interval == 0:
            self._mask(share)

    def _mask(self, share: float) -> None:
        """Mask the units of the lowest scores, the first ones among equals, until this share of each block is
        pruned."""
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
        """Cut the masked units out of weights and factors, for good. An optimizer from before knows the old factors."""
        for block in self.blocks:
            if block.units.cut:
                continue
            for site in block.into:
                layer.select(self.updates[site], rows=block.indices(site))
            layer.select(self.updates[block.out], columns=block.indices(block.out))
            layer.cut(self.host, block)
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
        super().merge()
        layer.fit_config(self.host)


def _count(share: float, block: Block) -> int:
    """How many units of a block this share is."""
    return int(share * len(block.kept) + 1e-9)
