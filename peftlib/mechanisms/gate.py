"""Gates that read a hidden state and scale what a trained module changes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from peftlib.errors import UnsupportedError
from peftlib.mechanisms.attention import Inputs
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.positions import by_name, names
from peftlib.mechanisms.precision import cast


class Tokens:
    """Which positions of a stack's present input are tokens: ``mask`` (B, n), or None where all are."""

    mask: torch.Tensor | None = None


def watch(host: Host, stack: str) -> Tokens:
    """What tells the tokens of a stack from its padding, in every forward."""
    module, tokens = host.anatomy.stack_inputs(stack), Tokens()
    host.hook(module, _see_mask, tokens, names(module), before=True)
    return tokens


def _see_mask(tokens: Tokens, order: tuple[str, ...], module: nn.Module, args: tuple, kwargs: dict) -> None:
    mask = by_name(order, args, kwargs).get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise UnsupportedError(
            f"a gate of a sample needs an attention mask of shape (batch, tokens), and got {tuple(mask.shape)}"
        )
    tokens.mask = mask


class Gate(nn.Module):
    """``forward(x) = sigmoid(w x + b)`` for x (B, n, d): a value a token, (B, n, 1), or, with ``tokens``, the mean over
    a sample's tokens, (B, 1, 1). w starts N(0, std), b at zero."""

    def __init__(self, d: int, tokens: Tokens | None, std: float = 0.02):
        super().__init__()
        self.linear = nn.Linear(d, 1)
        self.tokens = tokens
        nn.init.normal_(self.linear.weight, std=std)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.linear(cast(x, self.linear.weight)))
        if self.tokens is None:
            return gate
        if self.tokens.mask is None:
            return gate.mean(dim=1, keepdim=True)
        mask = self.tokens.mask.to(gate.dtype)[..., None]
        return (gate * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)


class PrefixGate(Gate):
    """Scales the first ``length`` keys and values of an attention, those of a prefix, by a gate of its input."""

    def __init__(self, d: int, tokens: Tokens | None, length: int):
        super().__init__(d, tokens)
        self.length = length
        self.seen = None

    def forward(self, inputs: Inputs) -> Inputs:
        seen, self.seen = self.seen, None
        gate = super().forward(seen)[:, None].to(inputs.key.dtype)
        key, value = (t.split([self.length, t.shape[2] - self.length], dim=2) for t in (inputs.key, inputs.value))
        if self.tokens is not None:
            return replace(
                inputs,
                key=torch.cat([gate * key[0], key[1]], dim=2),
                value=torch.cat([gate * value[0], value[1]], dim=2),
            )
        # A gate that differs from query to query cannot scale keys, which all queries share. With twice the width,
        # the prefix in the second half, it scales the queries' second half and the output's instead: same products.
        apart = [torch.cat([_before(t[0]), _behind(t[1])], dim=2) for t in (key, value)]
        query = torch.cat([inputs.query, gate * inputs.query], dim=-1)
        return replace(inputs, query=query, key=apart[0], value=apart[1], finish=_Join(gate))


class _Join:
    """Adds the gated second half of an output (B, q, H, 2p) to the first."""

    def __init__(self, gate: torch.Tensor):
        self.gate = gate

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        text, prefix = output.chunk(2, dim=-1)
        return text + self.gate.transpose(1, 2) * prefix


def _before(t: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(t), t], dim=-1)


def _behind(t: torch.Tensor) -> torch.Tensor:
    return torch.cat([t, torch.zeros_like(t)], dim=-1)


def see_input(child: PrefixGate, module: nn.Module, args: tuple, kwargs: dict) -> None:
    """A hook before an attention module: shows its input to the gate."""
    child.seen = args[0] if args else kwargs["hidden_states"]
