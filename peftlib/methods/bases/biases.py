"""What the methods share that search which of a backbone's biases train.

The search trains all biases with the task head for a while, prunes their change to a budget by how much it matters to
the loss, to first order, in one round or in several, and then sets everything back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from peftlib.errors import UnsupportedError
from peftlib.mechanisms import atomic, importance, precision, warmup
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.importance import Batch
from peftlib.methods.base import MethodConfig, at_least, between
from peftlib.methods.bases.entries import ChosenEntries

Choose = Callable[[list[torch.Tensor], list[torch.Tensor], int], list[torch.Tensor]]
"""``choose(scores, masks, budget)`` gives the masks of ``budget`` entries to keep among those in ``masks``, from signed
scores (:func:`peftlib.mechanisms.importance.first_order`)."""


@dataclass(frozen=True)
class SearchConfig(MethodConfig):
    """``density`` of the biases' entries that is kept; the search takes ``epochs`` over the calibration batches, or
    ``steps``, at ``search_rate``, and scores on at most ``batches`` (None: all)."""

    density: float = 0.5
    epochs: float = 1.0
    steps: int | None = None
    search_rate: float = 1e-3
    batches: int | None = None

    def __post_init__(self) -> None:
        between("density", self.density, 0, 1)
        between("epochs", self.epochs, 0, float("inf"))
        between("search_rate", self.search_rate, 0, float("inf"))
        for name in ("steps", "batches"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)


class SearchedBiases(ChosenEntries):
    """Chooses among the entries of all biases; a subclass's ``calibrate`` calls :meth:`search`."""

    def choices(self, host: Host) -> dict[str, nn.Parameter]:
        biases = {n: p for n, p in host.anatomy.biases.items() if not p.requires_grad}
        if not biases:
            raise UnsupportedError(
                f"{self.name} prunes biases, and {type(host.model).__name__} (family {host.anatomy.family.name}) has "
                "none that it could train. Methods of about this size that need no biases: ia3, lora of rank 1."
            )
        return biases

    def search(self, batches: Iterable[Batch], choose: Choose, what: str, rounds: int = 1) -> None:
        """Search the entries that ``choose`` keeps, and train these."""
        c: SearchConfig = self.config
        masks = search_masks(
            self.host.model,
            self.candidates.values(),
            batches,
            self.k,
            choose,
            rate=c.search_rate,
            epochs=c.epochs,
            steps=c.steps,
            rounds=rounds,
            limit=c.batches,
            beside=self.trained_head().values(),
            seed=self.seed,
            what=f"{self.name}: searching {what}",
        )
        self.train(mask.flatten().nonzero().flatten() for mask in masks)


def search_masks(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    batches: Iterable[Batch],
    budget: int,
    choose: Choose,
    *,
    rate: float,
    epochs: float,
    steps: int | None = None,
    rounds: int = 1,
    limit: int | None = None,
    beside: Iterable[nn.Parameter] = (),
    seed: int = 0,
    what: str = "searching entries",
) -> list[torch.Tensor]:
    """Masks of the ``budget`` entries to train, boolean, of the parameters' shapes. All values are set back at the end.

    Each of ``rounds`` trains the entries in the masks for its part of ``epochs`` (or ``steps``), scores their change on
    the batches (at most ``limit``), and sets back the entries that ``choose`` drops. The number of entries falls in
    equal ratios to ``budget``. ``beside`` are trained along, such as a task head, and not pruned.
    """
    parameters, beside = list(parameters), list(beside)
    batches = batches if warmup.sized(batches) else list(batches)
    with atomic.kept((*parameters, *beside)) as starts, precision.in_float32(model, parameters):
        masks = [torch.ones_like(p, dtype=torch.bool) for p in parameters]
        total = sum(p.numel() for p in parameters)

        @torch.no_grad()
        def set_back() -> None:
            for parameter, mask, start in zip(parameters, masks, starts):
                parameter.copy_(torch.where(mask, parameter, start))

        for round_ in range(1, rounds + 1):
            warmup.train(
                model,
                [{"params": [*parameters, *beside], "lr": rate}],
                batches,
                epochs=epochs / rounds,
                steps=None if steps is None else math.ceil(steps / rounds),
                seed=seed + round_,
                what=f"{what}, round {round_} of {rounds}",
                after_step=set_back,
            )
            scores = importance.first_order(model, parameters, batches, limit, starts[: len(parameters)])
            kept = budget if round_ == rounds else round(total * (budget / total) ** (round_ / rounds))
            masks = choose(scores, masks, kept)
            set_back()
        with torch.no_grad():
            for parameter, start in zip((*parameters, *beside), starts):
                parameter.copy_(start)
        return masks
