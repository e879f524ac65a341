"""What a stack of layers takes, and what it returns: a tensor, a tuple or one of transformers' outputs."""

from __future__ import annotations

from typing import Any

import torch

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
"""What a module is called with, as a forward hook gets it."""


def state_of(output: Any) -> torch.Tensor:
    """The hidden states (B, n, d) of a layer's or a stack's output."""
    return output if isinstance(output, torch.Tensor) else output[0]


def with_state(output: Any, state: torch.Tensor) -> Any:
    """The output with ``state`` in the place of its hidden states."""
    if isinstance(output, torch.Tensor):
        return state
    if isinstance(output, tuple):
        return (state, *output[1:])
    output.last_hidden_state = state
    return output
