"""What a stack of layers takes, and what it returns: a tensor, a tuple or one of transformers' outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from peftlib.errors import UnsupportedError

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


def logits_of(output: Any) -> torch.Tensor:
    """The logits of a model's output; those of the starts and ends of answers (b, t) side by side, (b, 2, t). Raises
    UnsupportedError for an output without either."""
    if getattr(output, "start_logits", None) is not None:
        return torch.stack([output.start_logits, output.end_logits], dim=1)  # 2 (b, t) -> (b, 2, t)
    if getattr(output, "logits", None) is None:
        raise UnsupportedError(
            f"the method compares logits, and {type(output).__name__} has none; use a model whose head gives logits"
        )
    return output.logits


def cut_states(output: Any, cut: Callable[[torch.Tensor, int], torch.Tensor], state: torch.Tensor | None = None) -> Any:
    """The output with all its hidden states (B, n, d) and attentions (B, H, n, k) cut to the text's positions by
    ``cut(x, dim)``. ``state``: what takes the place of the last hidden states; None leaves them whole."""
    last = state_of(output)

    def each(x: torch.Tensor | None) -> torch.Tensor | None:
        if x is None:
            return None
        if x.dim() == 3:
            return state if x is last and state is not None else cut(x, 1)
        return cut(cut(x, 2), 3)

    output = _map_layers(output, ("hidden_states", "attentions"), each)
    return output if state is None else with_state(output, state)


def cut_keys(output: Any, cut: Callable[[torch.Tensor, int], torch.Tensor], name: str = "attentions") -> Any:
    """The output with the columns of its attentions (B, H, n, k), and nothing else, cut to the text's positions."""
    return _map_layers(output, (name,), lambda x: cut(x, 3) if x is not None and x.dim() == 4 else x)


def _map_layers(output: Any, names: Iterable[str], each: Callable[[torch.Tensor | None], torch.Tensor | None]) -> Any:
    """The output with ``each`` of the tensors that it has a layer."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, tuple):
        return tuple(tuple(map(each, x)) if isinstance(x, tuple) else x for x in output)
    for name in names:
        if (layers := getattr(output, name, None)) is not None:
            setattr(output, name, tuple(map(each, layers)))
    return output
