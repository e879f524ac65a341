r"""UniPELT: LoRA, prefix and adapter in every layer, each behind a gate that reads what it reads (hybrid).

.. math:: h \leftarrow h + \mathcal{G}_A \Delta_A(h), \quad W x + \mathcal{G}_L\, \tfrac{\alpha}{r} B A x, \quad
          \mathrm{Attn}(Q, [\mathcal{G}_P P_K; K], [\mathcal{G}_P P_V; V]), \qquad
          \mathcal{G} = \frac{1}{n} \sum_{t=1}^{n} \sigma(w^\top x_t + b)

Shapes: w (d), b (1) for each module: the adapter's reads the adapter's input, LoRA's (one a matrix) the map's, the
prefix's the attention block's. A gate is one value a sample, the mean over its tokens. Trained: what the three methods
train, and d + 1 a gate, four in a layer of an encoder; stored: keys and values without the MLP that makes them. Gates
start near 1/2, LoRA at zero and the adapter near it, the prefix acts from the first step on. No merge: the gates depend
on the input.

Source: Mao et al. 2022, arXiv:2110.07577, and its code; the sizes are those of ``adapters`` 1.3: prefix m = 10, adapter
r = d / 16 on BERT-base, LoRA r = 8 on queries and values. The adapter is Pfeiffer's. The code's means include padding,
which ours leave out. In a causal stack a mean over the sample would see the tokens to come, so there each token has its
own gates (chosen here), and a prefix is weighed by the query's gate. ``adapters`` leaves out LoRA's alpha / r behind a
gate; the default alpha makes it 1. With the same weights (BERT, two layers, float32, no padding) its logits differ by
at most 8.2e-8.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from peftlib.anatomy import Layer, Site
from peftlib.mechanisms import attention
from peftlib.mechanisms.gate import Gate, PrefixGate, Tokens, see_input, watch
from peftlib.mechanisms.host import Host
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
            stack: watch(host, stack) if stack == "encoder" else None for stack in parts.stacks
        }
        super().attach(host)
        for layer in parts.layers:
            for module in (layer.attention, layer.cross_attention):
                if module is not None:
                    child = PrefixGate(parts.d, self.tokens[layer.stack], self.config.length)
                    attention.attach(self.gates, module, "prefix_gate", child)
                    self.gates.hook(module, see_input, child, before=True)

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
