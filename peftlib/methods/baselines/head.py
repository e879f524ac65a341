"""Training the task head alone on the frozen backbone: the lower baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass

from peftlib.errors import UnsupportedError
from peftlib.mechanisms.host import Host
from peftlib.methods.base import Method, MethodConfig


@dataclass(frozen=True)
class HeadConfig(MethodConfig):
    """No options."""


class Head(Method):
    Config = HeadConfig
    learning_rate = 2e-3

    def attach(self, host: Host) -> None:
        if not host.anatomy.head:
            raise UnsupportedError(
                f"head needs a new task head, and {type(host.model).__name__} has none (a language-model head is "
                "pretrained). Use a model with a classification head, or another method."
            )
        host.train(host.anatomy.head.values())
