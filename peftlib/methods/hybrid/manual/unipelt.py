r"""UniPELT: LoRA, prefix and adapter in every layer, each behind a gate that reads what it reads (hybrid).

.. math:: h \leftarrow h + \mathcal{G}_A \Delta_A(h), \quad W x + \mathcal{G}_L\, \tfrac{\alpha}{r} B A x, \quad
          \mathrm{Attn}(Q, [\mathcal{G}_P P_K; K], [\mathcal{G}_P P_V; V]), \qquad
          \mathcal{G} = \frac{1}{t} \sum_{i=1}^{t} \sigma(w^\top x_i + w_0)

Shapes: x (b, t, d) of b rows, t tokens and hidden size d; w (d), w_0 (1) for each module: the adapter's gate reads the
adapter's input, LoRA's (one a matrix) the map's, the prefix's the attention block's. A gate is one value a row, the
mean over its tokens. Trained: what the three methods train, and d + 1 a gate, four in a layer of an encoder; stored:
keys and values without the MLP that makes them. Gates start near 1/2, LoRA at zero and the adapter near it; the prefix
acts from the first step on. No merge: the gates depend on the input.

Source: Mao et al. 2022, arXiv:2110.07577, and its code; the sizes are those of ``adapters`` 1.3: prefix m = 10, adapter
r = d / 16 on BERT-base, LoRA r = 8 on queries and values. The adapter is Pfeiffer's. The code's means include padding,
which ours leave out. In a causal stack a mean over the row would see the tokens to come, so there each token has its
own gates (chosen here), and a prefix is scaled by the query's gate. ``adapters`` leaves out LoRA's alpha / r behind a
gate; the default alpha makes it 1. With the same weights and without padding it gives the same states on BERT
(``tests/golden``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from peftlib.anatomy import Layer, Site
from peftlib.errors import UnsupportedError
from peftlib.mechanisms import attention
from peftlib.mechanisms.attention import Inputs
from peftlib.mechanisms.call import Handed, Kept
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.positions import by_name, names
from peftlib.mechanisms.precision import cast
from peftlib.methods.base import Method, MethodConfig, at_least
from peftlib.methods.combination import Combination


@dataclass(frozen=True)
class UniPELTConfig(MethodConfig):
    """``length`` m; ``reparametrize`` by an MLP of ``hidden`` units; ``bottleneck`` and ``activation`` of the adapter;
    ``rank`` r, ``alpha`` and ``targets`` of LoRA."""

    length: int = 10
    reparametrize: bool = True
    hidden: int = 512
    bottleneck: int = 48
    activation: str = "relu"
    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] | str = ("*attention.query", "*attention.value")

    def __post_init__(self):
        for name in ("length", "hidden", "bottleneck", "rank"):
            at_least(name, getattr(self, name), 1)


class Tokens:
    """Which positions of a stack's present input are tokens: ``mask`` (b, t), or None where all are."""

    def __init__(self) -> None:
        self._mask = Kept()

    @property
    def mask(self) -> torch.Tensor | None:
        return self._mask.get()

    @mask.setter
    def mask(self, mask: torch.Tensor | None) -> None:
        self._mask.set(mask)


class Gate(nn.Module):
    """``forward(x) = sigmoid(w x + w_0)`` for x (b, t, d): a value a token, (b, t, 1), or, with ``tokens``, the mean
    over a row's tokens, (b, 1, 1). w starts N(0, std^2), w_0 at zero."""

    def __init__(self, d: int, tokens: Tokens | None, std: float = 0.02):
        super().__init__()
        self.linear = nn.Linear(d, 1)
        self.tokens = tokens
        nn.init.normal_(self.linear.weight, std=std)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        g = torch.sigmoid(self.linear(cast(x, self.linear.weight)))  # (b, t, d) -> (b, t, 1)
        if self.tokens is None:
            return g
        mask = self.tokens.mask
        if mask is None:
            return g.mean(dim=1, keepdim=True)  # (b, t, 1) -> (b, 1, 1)
        mask = mask.to(g.dtype)[..., None]  # (b, t) -> (b, t, 1)
        return (g * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)  # -> (b, 1, 1)


class PrefixGate(Gate):
    """Scales the first m keys and values of an attention, those of a prefix, by a gate of the attention's input.

    Shapes: query (b, H, q, p), key and value (b, H_kv, k, p), as :class:`peftlib.mechanisms.attention.Inputs`.
    """

    def __init__(self, d: int, tokens: Tokens | None, length: int):
        super().__init__(d, tokens)
        self.length = length
        self.seen = Handed()

    def forward(self, inputs: Inputs) -> Inputs:
        x = self.seen.take()
        g = super().forward(x)[:, None].to(inputs.key.dtype)  # (b, 1, 1, 1), or (b, 1, q, 1) without tokens
        sizes = [self.length, inputs.key.shape[2] - self.length]
        P_K, K = inputs.key.split(sizes, dim=2)  # (b, H_kv, m, p), (b, H_kv, k - m, p)
        P_V, V = inputs.value.split(sizes, dim=2)  # the same
        if self.tokens is not None:
            key = torch.cat([g * P_K, K], dim=2)  # (b, H_kv, k, p)
            value = torch.cat([g * P_V, V], dim=2)  # (b, H_kv, k, p)
            return replace(inputs, key=key, value=value)
        # A gate that differs from query to query cannot scale keys, which all queries share. With twice the width,
        # the prefix in the second half, it scales the queries' second half and the output's instead: same products.
        key = torch.cat([_second_half(P_K), _first_half(K)], dim=2)  # (b, H_kv, k, 2p)
        value = torch.cat([_second_half(P_V), _first_half(V)], dim=2)  # (b, H_kv, k, 2p)
        query = torch.cat([inputs.query, g * inputs.query], dim=-1)  # (b, H, q, 2p)
        return replace(inputs, query=query, key=key, value=value, finish=_AddHalves(g))


class _AddHalves:
    """Adds the gated second half of an attention's output, the prefix's part, to the first."""

    def __init__(self, gate: torch.Tensor):
        self.gate = gate

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        text, prefix = output.chunk(2, dim=-1)  # (b, q, H, 2p) -> 2 (b, q, H, p)
        return text + self.gate.transpose(1, 2) * prefix  # (b, q, H, p)


def _first_half(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, torch.zeros_like(x)], dim=-1)  # (..., p) -> (..., 2p)


def _second_half(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(x), x], dim=-1)  # (..., p) -> (..., 2p)


class UniPELT(Combination):
    Config = UniPELTConfig
    learning_rate = 2e-3

    def part_configs(self) -> tuple[dict, ...]:
        c = self.config
        prefix = {"length": c.length, "reparametrize": c.reparametrize, "hidden": c.hidden, "shift_positions": False}
        adapter = {"bottleneck": c.bottleneck, "activation": c.activation, "init_std": 0.02, "train_norms": False}
        return (
            {"method": "prefix_tuning", **prefix},
            {"method": "sequential_adapter", "variant": "pfeiffer", **adapter},
            {"method": "lora", "rank": c.rank, "alpha": c.alpha, "targets": c.targets},
        )

    def attach(self, host: Host) -> None:
        parts = host.anatomy
        self.gates = host.scope()
        self.tokens: dict[str, Tokens | None] = {
            stack: _tokens(host, stack) if stack == "encoder" else None for stack in parts.stacks
        }
        super().attach(host)
        for layer in parts.layers:
            for module in (layer.attention, layer.cross_attention):
                if module is not None:
                    child = PrefixGate(parts.d, self.tokens[layer.stack], self.config.length)
                    attention.attach(self.gates, module, "prefix_gate", child)
                    self.gates.hook(module, _see_input, child.seen, before=True)

    def scope(self, host: Host, part: Method) -> Host:
        return host.scope(gate=self._gate)

    def _gate(self, where: Site | Layer, module: nn.Module, name: str) -> nn.Module:
        width = where.in_features if isinstance(where, Site) else self.host.anatomy.d
        return self.gates.add(module, f"{name}_gate", Gate(width, self.tokens[where.stack]))

    def state(self):
        return super().state() | self.gates.state()

    def load_state(self, state) -> None:
        gates = self.gates.state().keys()
        self.gates.load_state({n: t for n, t in state.items() if n in gates})
        super().load_state({n: t for n, t in state.items() if n not in gates})

    def check_mergeable(self) -> None:
        Method.check_mergeable(self)


def _tokens(host: Host, stack: str) -> Tokens:
    """The tokens of a stack, told from its padding in every forward."""
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


def _see_input(seen: Handed, module: nn.Module, args: tuple, kwargs: dict) -> None:
    """A hook before an attention module: shows its input to the gate."""
    seen.value = args[0] if args else kwargs["hidden_states"]
