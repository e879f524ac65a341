"""What the methods share that choose entries of frozen tensors from data, and then train those alone.

:meth:`Method.calibrate` looks at the training data, in a pass over gradients or in a whole warm-up training, and
decides which entries train. The trained parameters, k values, exist only from then on. An optimizer that is built
afterwards has states for k values, counts and files are those of k values, and a resumed training finds the same
parameters as the one that it resumes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peftlib.errors import TargetError
from peftlib.mechanisms import sparse
from peftlib.mechanisms.host import Host
from peftlib.methods.base import Method, MethodConfig, TrainingState


def free(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Those that are frozen and that nothing else computes or writes into."""
    return {n: p for n, p in parameters.items() if not p.requires_grad and ".parametrizations." not in n}


class Budgeted:
    """The candidates and the budget of a method that chooses k among the entries of its ``candidates``.

    Subclasses say in ``choices`` which tensors the candidates are. They have a ``density`` in their config, or a ``k``.
    """

    config: Any

    def choices(self, host: Host) -> dict[str, nn.Parameter]:
        """The candidates by name in the model."""
        raise NotImplementedError

    def find_candidates(self, host: Host) -> None:
        """Fix the candidates and a seed for random draws. Raises TargetError where k is not from 1 to all entries,
        UnsupportedError where the candidates are quantized or offloaded."""
        self.candidates: dict[str, nn.Parameter] = self.choices(host)
        host.check_writable(self.candidates.values())
        self.seed = int(torch.randint(2**31, (), device="cpu"))
        if not 1 <= self.k <= self.entries:
            raise TargetError(
                f"density={self.config.density} of {self.entries:,} entries is {self.k:,}; it must be a number from 1 "
                f"to {self.entries:,}"
            )

    @property
    def entries(self) -> int:
        """How many entries there are to choose from."""
        return sum(p.numel() for p in self.candidates.values())

    @property
    def k(self) -> int:
        """How many entries are chosen."""
        return int(self.config.density * self.entries)


class ChosenEntries(Budgeted, Method):
    """A method that trains k entries of the tensors in ``candidates``.

    Subclasses say which tensors these are (:meth:`choices`) and how many entries are chosen (``k``, known before the
    data). Their ``calibrate`` says which entries, and ends with :meth:`choose` or :meth:`train`.
    """

    calibrates = True

    def __init__(self, config: MethodConfig):
        super().__init__(config)
        self.candidates: dict[str, nn.Parameter] = {}
        self.children: dict[str, sparse.SparseValues] = {}

    def attach(self, host: Host) -> None:
        self.find_candidates(host)

    def choices(self, host: Host) -> dict[str, nn.Parameter]:
        """The candidates: by default all frozen tensors of the backbone below its head that nothing else changes."""
        return free(host.anatomy.named_parameters())

    def trained_head(self) -> dict[str, nn.Parameter]:
        """The task head's parameters, where it trains."""
        return {n: p for n, p in self.host.anatomy.head.items() if p.requires_grad}

    def pending(self) -> tuple[int, int, int]:
        return sparse.pending(self.k, self.entries)

    def choose(self, scores: Sequence[torch.Tensor]) -> None:
        """Train the k entries with the largest scores (float32, not negative, one tensor a candidate)."""
        self.train(sparse.top_entries(scores, self.k))

    def train(self, indices: Iterable[torch.Tensor]) -> None:
        """Train the entries at these flat indices, one ascending tensor a candidate."""
        chosen = zip(self.candidates.items(), indices, strict=True)
        self.children = {n: sparse.train_entries(self.host, p, i) for (n, p), i in chosen if len(i)}

    def state(self) -> dict[str, torch.Tensor]:
        return sparse.state(self.host, self.children)

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.children = sparse.load_state(self.host, self.candidates, state)

    def add(self, state: dict[str, torch.Tensor]) -> None:
        """Add another sparse vector, as :meth:`state` gives it without a head, to this one: at every entry the two
        differences to the backbone's weights are summed.

        Entries that only one of them has keep its value bit for bit; the rest are rounded once. Raises LoadError where
        it does not fit the backbone, and nothing is changed then.
        """
        for name, (indices, values) in sparse.read(self.candidates, state).items():
            if name not in self.children:
                self.children[name] = sparse.train_entries(self.host, self.candidates[name], indices[:0])
            self.children[name].add(self.candidates[name], indices, values)


class MaskedGradients(ChosenEntries):
    """Chosen entries whose original clips the whole gradient, of all entries, and then masks it. So it is here: what
    trains is scaled by the norm of the whole gradient, though most of that is dropped in the backward pass."""

    clips = True

    def counts_passes(self, training: TrainingState) -> bool:
        return bool(training.max_norm)

    def on_step_start(self, training: TrainingState) -> None:
        if training.max_norm:
            sparse.watch(self.children.values(), training.accumulation)

    def on_gradients(self, training: TrainingState) -> None:
        if training.max_norm:
            sparse.clip_whole(self.host.root.trained().values(), self.children.values(), training.max_norm)
