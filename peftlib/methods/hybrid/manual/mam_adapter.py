r"""MAM adapter: a short prefix at attention, a scaled parallel adapter beside the FFN (hybrid, manual combination).

.. math:: \mathrm{Attn}(Q, [P_K; K], [P_V; V]), \qquad \mathrm{FFN}(x) + s\, W_{up}\, \mathrm{ReLU}(W_{down} x)

Shapes: x (b, t, d) of b rows, t tokens and hidden size d; P_K, P_V (m, d) a layer; W_down (r, d), W_up (d, r).
Trained and stored: what its two parts, prefix tuning and the parallel adapter, train and store, so keys and values
without the MLP that makes them. The adapter starts at zero, the prefix acts from the first step on. No merge: a prefix
depends on the query, and the adapter is nonlinear.

Source: He et al. 2022, arXiv:2110.04366: m = 30 with an MLP of 800 units, r = 512, s = 4. The defaults are those of
their scripts for summarization and translation; theirs for GLUE has m = r = 16 and s = 2. The text keeps its
positions. On BERT ``adapters`` 1.3 with the same weights gives the same states (``tests/golden``).
"""

from __future__ import annotations

from dataclasses import dataclass

from peftlib.methods.base import Method, MethodConfig, at_least
from peftlib.methods.combination import Combination


@dataclass(frozen=True)
class MAMAdapterConfig(MethodConfig):
    """``length`` m; ``reparametrize`` by an MLP of ``hidden`` units; ``bottleneck`` r; ``scale`` s."""

    length: int = 30
    reparametrize: bool = True
    hidden: int = 800
    bottleneck: int = 512
    scale: float = 4.0

    def __post_init__(self):
        for name in ("length", "hidden", "bottleneck"):
            at_least(name, getattr(self, name), 1)


class MAMAdapter(Combination):
    Config = MAMAdapterConfig
    learning_rate = 1e-4

    def part_configs(self) -> tuple[dict, ...]:
        c = self.config
        prefix = {"length": c.length, "reparametrize": c.reparametrize, "hidden": c.hidden, "shift_positions": False}
        adapter = {"bottleneck": c.bottleneck, "scale": c.scale}
        return {"method": "prefix_tuning", **prefix}, {"method": "parallel_adapter", **adapter}

    def check_mergeable(self) -> None:
        Method.check_mergeable(self)
