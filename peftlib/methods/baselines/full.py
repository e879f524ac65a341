"""Full fine-tuning: every parameter of the backbone trains. The upper baseline of every comparison.

``last_layers=k`` trains only the top k layers (counted from the output, over all stacks together) and the head.
Merge: nothing to fold, the backbone itself was trained.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftlib.errors import TargetError
from peftlib.mechanisms.host import Host
from peftlib.methods.base import Method, MethodConfig


@dataclass(frozen=True)
class FullConfig(MethodConfig):
    """``last_layers``: how many of the top layers train; None trains everything, embeddings included."""

    last_layers: int | None = None


class Full(Method):
    Config = FullConfig
    learning_rate = 1e-4

    def attach(self, host: Host) -> None:
        k, layers = self.config.last_layers, host.anatomy.layers
        if k is None:
            host.train(host.model.parameters())
            return
        if not 1 <= k <= len(layers):
            raise TargetError(f"last_layers={k!r} does not fit the backbone; choose 1 to its {len(layers)} layers")
        for layer in layers[-k:]:
            host.train(layer.module.parameters())
