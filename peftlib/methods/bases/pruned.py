"""What the methods share that add the modules of other methods and prune their entries from data before training."""

from __future__ import annotations

import torch
from torch import nn

from peftlib.mechanisms import pruned, sparse
from peftlib.mechanisms.host import Host
from peftlib.methods.base import MethodConfig
from peftlib.methods.bases.entries import Budgeted
from peftlib.methods.combination import Combination


class PrunedCombination(Budgeted, Combination):
    """Attaches its parts, then keeps k of the entries that they added; :meth:`calibrate` chooses which.

    Afterwards k values train: an optimizer has states for k values, and files hold k values with their indices.
    """

    calibrates = True

    def __init__(self, config: MethodConfig):
        super().__init__(config)
        self.calibrates = True
        self.candidates: dict[str, nn.Parameter] = {}
        self.children: dict[str, sparse.SparseValues] | None = None

    def attach(self, host: Host) -> None:
        super().attach(host)
        self.find_candidates(host)

    def choices(self, host: Host) -> dict[str, nn.Parameter]:
        """The candidates: by default all added tensors."""
        return pruned.added(host)

    def pending(self) -> tuple[int, int, int]:
        trained, stored, size = sparse.pending(self.k, self.entries)
        bytes_now = sum(p.numel() * p.element_size() for p in self.candidates.values())
        return trained - self.entries, stored - self.entries, size - bytes_now

    def keep(self, indices: list[torch.Tensor]) -> None:
        """Train the entries at these flat indices, one ascending tensor a candidate, and drop the others."""
        self.children = pruned.keep(self.host, self.candidates, indices)

    def state(self) -> dict[str, torch.Tensor]:
        if self.children is None:
            return self.host.state()
        return pruned.state(self.host, self.candidates, self.children)

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.children = pruned.load_state(self.host, self.candidates, state)
