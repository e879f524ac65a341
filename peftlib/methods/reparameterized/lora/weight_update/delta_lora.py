r"""Delta-LoRA: LoRA whose frozen weight follows the change of the low-rank product from step to step.

.. math:: y = W_t x + \frac{\alpha}{r} B_t A_t x, \qquad
    W_{t+1} = W_t + \lambda \frac{\alpha}{r} \bigl(B_{t+1} A_{t+1} - B_t A_t\bigr) \text{ for } t > K

Shapes: W (out, in), A (r, in), B (out, r). B starts at zero, so the start is the identity. W has no gradient and no
optimizer state: it gets the factors' change as Adam and weight decay made it. There is no dropout, so the gradient of
the product is the gradient of W. Merge: exact, the present W plus the product. Trained: r (in + out) a matrix.

The steps of W add up to :math:`\lambda \frac{\alpha}{r} (B_T A_T - B_{K+1} A_{K+1})`, so a file holds the factors now
and those at step K + 1, never W. At the end of training W is set to its original plus this sum, rounded once, which
takes away the rounding of single steps and makes loading exact. This needs the original, so ``attach(...,
keep_original=False)`` leaves W as the steps made it. In bfloat16 most single steps are smaller than W's resolution:
keep the weights in float32. Steps count from 0. In a further training W follows from the first step on.

Source: Zi et al. 2023, arXiv:2309.02411, which has no public code: lambda 0.5 for RoBERTa on GLUE with K the steps of
the learning rate's warm-up, 2 and 500 for GPT-2, 0.5 and 1000 for BART; queries and values, r = 8. Here K is a share of
the steps, by default :func:`peftlib.fit`'s warm-up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peftlib.anatomy import Site
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import LowRank, add_to_weight
from peftlib.methods.base import ConfigError, MethodConfig, TrainingState, at_least
from peftlib.methods.bases.low_rank import LowRankUpdates


@dataclass(frozen=True)
class DeltaLoRAConfig(MethodConfig):
    """``rank`` r, ``alpha`` (the update is scaled by alpha / r), ``targets`` (site patterns), ``follow`` lambda,
    ``warmup``, K as a share of the steps: the weights follow in those after step K."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | str = ("*attention.query", "*attention.value")
    follow: float = 0.5
    warmup: float = 0.06

    def __post_init__(self):
        at_least("rank", self.rank, 1)
        at_least("follow", self.follow, 0)
        at_least("warmup", self.warmup, 0)
        if self.warmup >= 1:
            raise ConfigError(f"warmup={self.warmup!r} leaves no steps in which the weights follow; it must be below 1")


class Anchored(LowRank):
    """:class:`LowRank` with a copy of its factors at step K + 1: ``A_anchor`` (r, in), ``B_anchor`` (out, r)."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float):
        super().__init__(in_features, out_features, rank, scale)
        self.register_buffer("A_anchor", self.A.detach().clone())
        self.register_buffer("B_anchor", self.B.detach().clone())

    @torch.no_grad()
    def anchor(self) -> None:
        """Copy the present factors: from now on the weight follows."""
        self.A_anchor.copy_(self.A)
        self.B_anchor.copy_(self.B)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of A and B."""
        return self.A.detach().clone(), self.B.detach().clone()

    def change(self, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """From the update of these factors to the present one, (out, in)."""
        before = self.scale * (B.to(self.delta_dtype) @ A.to(self.delta_dtype))  # (out, r) (r, in) -> (out, in)
        return self.delta() - before  # (out, in)

    def moved(self) -> torch.Tensor:
        """The update's change since step K + 1, (out, in)."""
        return self.change(self.A_anchor, self.B_anchor)


class DeltaLoRA(LowRankUpdates):
    Config = DeltaLoRAConfig
    learning_rate = 2e-3

    def __init__(self, config: DeltaLoRAConfig):
        super().__init__(config)
        self.following = False
        self.before: dict[Site, tuple[torch.Tensor, torch.Tensor]] = {}
        """A and B before the optimizer's step."""

    def update(self, site: Site) -> Anchored:
        c = self.config
        return Anchored(site.in_features, site.out_features, c.rank, c.alpha / c.rank)

    def attach(self, host: Host) -> None:
        super().attach(host)
        self.originals = {site: host.write(site) for site in self.updates}

    def on_gradients(self, training: TrainingState) -> None:
        if not self.following and training.step > round(self.config.warmup * training.total):
            self.following = True
            for update in self.updates.values():
                update.anchor()
        if self.following:
            self.before = {site: update.factors() for site, update in self.updates.items()}

    def on_step_end(self, training: TrainingState) -> None:
        for site, factors in self.before.items():
            add_to_weight(site, self.config.follow * self.updates[site].change(*factors))
        self.before = {}

    def on_train_end(self) -> None:
        if self.following:
            self._follow({site: original for site, original in self.originals.items() if original is not None})

    @torch.no_grad()
    def _follow(self, originals: dict[Site, torch.Tensor]) -> None:
        """Set the weights to their originals plus lambda times the updates' change since step K + 1, rounded once."""
        for site, original in originals.items():
            moved = self.config.follow * self.updates[site].moved()  # (out, in)
            site.weight.copy_(original.to(moved) + moved)

    def run_state(self) -> dict[str, torch.Tensor]:
        return {"following": torch.tensor(self.following)}

    def load_run_state(self, state: dict[str, torch.Tensor]) -> None:
        self.following = bool(state["following"])

    def state(self) -> dict[str, torch.Tensor]:
        state = self.host.state()
        return state if self.following else {n: t for n, t in state.items() if n not in self._anchors()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        anchors, present = self._anchors(), self.host.state()
        following = not anchors.isdisjoint(state)
        self.host.load_state(state if following else state | {n: present[n] for n in anchors})
        base = {site: site.weight if original is None else original for site, original in self.originals.items()}
        self.following = following
        if following:
            self._follow(base)

    def _anchors(self) -> set[str]:
        return {f"{path}.{name}" for path in self.named() for name in ("A_anchor", "B_anchor")}
