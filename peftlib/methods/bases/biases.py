"""What the methods share that search which of a backbone's biases train: BitFit, trained for a while, then pruned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from peftlib.errors import UnsupportedError
from peftlib.mechanisms import pruning
from peftlib.mechanisms.host import Host
from peftlib.methods.base import MethodConfig, at_least, between
from peftlib.methods.bases.entries import ChosenEntries


@dataclass(frozen=True)
class SearchConfig(MethodConfig):
    """``density`` of the biases' entries that is kept; the search takes ``epochs`` over the calibration batches, or
    ``steps``, at ``search_rate``, and scores on at most ``batches`` (None: all)."""

    density: float = 0.5
    epochs: float = 1.0
    steps: int | None = None
    search_rate: float = 1e-3
    batches: int | None = None

    def __post_init__(self):
        between("density", self.density, 0, 1)
        between("epochs", self.epochs, 0, float("inf"))
        between("search_rate", self.search_rate, 0, float("inf"))
        for name in ("steps", "batches"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)


class SearchedBiases(ChosenEntries):
    """Chooses among the entries of all biases; subclasses call :meth:`search` to calibrate."""

    def choices(self, host: Host) -> dict[str, nn.Parameter]:
        biases = {n: p for n, p in host.anatomy.biases.items() if not p.requires_grad}
        if not biases:
            raise UnsupportedError(
                f"{self.name} prunes biases, and {type(host.model).__name__} (family {host.anatomy.family.name}) has "
                "none that it could train. Methods of about this size that need no biases: ia3, lora of rank 1."
            )
        return biases

    def search(
        self, batches: Iterable[dict[str, torch.Tensor]], choose: pruning.Choose, what: str, rounds: int = 1
    ) -> None:
        """Train all biases with the head for a while, go back, and train what ``choose`` finds by the change."""
        c: SearchConfig = self.config
        masks = pruning.search(
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
