"""Arithmetic with saved sparse vectors: a task's and a language's differences to one backbone add up."""

from __future__ import annotations

import os

from peftlib import saved
from peftlib.adapted import Adapted
from peftlib.errors import LoadError, StateError
from peftlib.methods.base import SavedAdapter
from peftlib.methods.bases.entries import ChosenEntries


def add_vector(adapted: Adapted, vector: str | os.PathLike[str] | SavedAdapter) -> None:
    """Add a saved sparse vector to the attached one, as LT-SFT puts a task and a language together:

    >>> adapted = peftlib.load(model, "task")
    >>> peftlib.add_vector(adapted, "language")

    Both must come from methods that train chosen entries (LT-SFT and the Fisher masks among them) on backbones with the
    same weights; what is above them may differ, and ``vector``'s task head is left out. At entries that only one of
    them has, the sum is its value bit for bit. What is saved afterwards is the sum. Build an optimizer after it, not
    before.

    Raises LoadError for a folder that cannot be read, holds something else or was made for another backbone, StateError
    where ``adapted`` has no sparse vector.
    """
    if not isinstance(adapted.method, ChosenEntries) or not adapted.calibrated:
        raise StateError(f"{adapted.name} has no sparse vector to add to; load one that was saved, or train one first")
    other = vector if isinstance(vector, SavedAdapter) else saved.read(vector)
    here, there = adapted._identity, other.backbone or {}
    if any(there.get(key) != here[key] for key in ("model_type", "weights")):
        raise LoadError(
            f"{other.name} was made for a {there.get('model_type')} backbone with other weights than this "
            f"{here['class']} has; differences add up on one backbone only"
        )
    assert other.state is not None, "a source without its tensors has no entries to add"
    state = {n: t.to(adapted.host.device) for n, t in other.state.items() if n not in other.head}
    adapted.method.add(state)
