r"""S4: four groups of layers with a set of methods each, and the same budget in every layer (hybrid, automatic).

.. math:: G_1: \{A, L\}, \quad G_2: \{A, P\}, \quad G_3: \{A, P, B\}, \quad G_4: \{P, B, L\}, \qquad
          N_1 < N_2 = N_3 > N_4, \qquad \mathrm{params}(\ell) \approx \frac{\beta\,|\theta|}{L}

Letters: A adapter (Pfeiffer's) of bottleneck r, P prefix of m keys and values, B biases of the layer, L LoRA of rank r
on queries and values; group G_i has N_i consecutive layers, a spindle with few layers at both ends; theta are the
backbone's parameters. Every one of the L layers gets the share beta |theta| / L of the budget. Its biases are counted
first; the other methods of its set get equal parts of the rest, and each is as wide as its part allows: one more unit
would not fit. Trained: at most beta |theta|, the same in all layers of a group. Prefixes act from the first step on.
No merge: adapters are nonlinear and a prefix depends on the query.

Source: Chen et al. 2023, arXiv:2301.01821, whose design patterns these are: spindle, uniform allocation, every group
tuned, a set a group; beta is 0.5 % in its comparisons with T5-base, for which the sets were found. The relative sizes
1:2:2:1 of the groups, the split of a layer's share and prefixes without an MLP are chosen here. Their repository
(amazon-science/peft-design-spaces) is AdapterHub's library with UniPELT under the name PEFT, without groups; from it is
the adapter: Pfeiffer's, ReLU, N(0, 0.02^2).
Each stack of an encoder-decoder has its own four groups. A layer without biases (LLaMA, T5) has no B.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from peftlib.anatomy import Layer
from peftlib.errors import TargetError
from peftlib.mechanisms.host import Host
from peftlib.methods.base import ConfigError, Method, MethodConfig, between
from peftlib.methods.combination import Combination, make_parts

SETS = (("adapter", "lora"), ("adapter", "prefix"), ("adapter", "prefix", "bitfit"), ("prefix", "bitfit", "lora"))
TARGETS = ("attention.query", "attention.value", "cross_attention.query", "cross_attention.value")


@dataclass(frozen=True)
class S4Config(MethodConfig):
    """``budget``: share of the parameters below the task head that trains at most; ``groups``: relative sizes of the
    four groups of layers; ``scale`` alpha / r of LoRA; ``activation`` of the adapters."""

    budget: float = 0.005
    groups: tuple[int, ...] = (1, 2, 2, 1)
    scale: float = 2.0
    activation: str = "relu"

    def __post_init__(self):
        between("budget", self.budget, 0, 1)
        if len(self.groups) != len(SETS) or min(self.groups) < 0 or not sum(self.groups):
            raise ConfigError(f"groups={self.groups!r} are not the relative sizes of four groups, such as (1, 2, 2, 1)")

    def sizes(self, layers: int) -> tuple[int, ...]:
        """How many of so many layers each group has."""
        ends = [round(sum(self.groups[:i]) * layers / sum(self.groups)) for i in range(len(SETS) + 1)]
        return tuple(b - a for a, b in pairwise(ends))


class S4(Combination):
    Config = S4Config
    learning_rate = 2e-3

    def part_configs(self) -> tuple[dict, ...]:
        return ()  # they depend on the backbone

    def attach(self, host: Host) -> None:
        self.parts, self.layers = [], {}
        share = self.config.budget * host.size
        for names, layers in self._groups(host):
            for part in make_parts(self._set(host, names, layers[0], share / host.anatomy.num_layers)):
                self.parts.append(part)
                self.layers[part] = layers
        super().attach(host)

    def scope(self, host: Host, part: Method) -> Host:
        return host.scope(layers=self.layers[part])

    def _groups(self, host: Host) -> Iterator[tuple[tuple[str, ...], list[int]]]:
        """The set and the positions of every group that has layers."""
        for stack in host.anatomy.stacks:
            left = [i for i, layer in enumerate(host.anatomy.layers) if layer.stack == stack]
            for names, size in zip(SETS, self.config.sizes(len(left))):
                group, left = left[:size], left[size:]
                if group:
                    yield names, group

    def _set(self, host: Host, names: tuple[str, ...], first: int, share: float) -> list[dict]:
        """The configs of one layer's methods, as large as its share of the budget allows."""
        c, layer, d = self.config, host.anatomy.layers[first], host.anatomy.d
        biases = sum(p.numel() for n, p in layer.module.named_parameters() if n.rpartition(".")[2] == "bias")
        names = tuple(n for n in names if n != "bitfit" or biases)
        part = (share - biases * ("bitfit" in names)) / sum(n != "bitfit" for n in names)
        sizes = {
            "adapter": int((part - d) // (2 * d + 1)),
            "prefix": int(part // _prefix_cost(layer)),
            "lora": int(part // sum(s.in_features + s.out_features for s in _targets(layer))),
        }
        for name in names:
            if sizes.get(name, 1) < 1:
                raise TargetError(
                    f"budget={c.budget} leaves {max(part, 0):,.0f} parameters a layer for each of "
                    f"{', '.join(n for n in names if n != 'bitfit')}, too few for {name}; choose a larger budget"
                )
        rank = sizes["lora"]
        made = {
            "adapter": {
                "method": "sequential_adapter",
                "variant": "pfeiffer",
                "bottleneck": sizes["adapter"],
                "activation": c.activation,
                "init_std": 0.02,
                "train_norms": False,
            },
            "prefix": {
                "method": "prefix_tuning",
                "length": sizes["prefix"],
                "reparametrize": False,
                "shift_positions": False,
            },
            "bitfit": {"method": "bitfit"},
            "lora": {
                "method": "lora",
                "rank": rank,
                "alpha": c.scale * rank,
                "targets": tuple(s.name for s in _targets(layer)),
            },
        }
        return [made[name] for name in names]

    def check_mergeable(self) -> None:
        Method.check_mergeable(self)


def _targets(layer: Layer) -> list:
    return [layer.sites[name] for name in TARGETS if name in layer.sites]


def _prefix_cost(layer: Layer) -> int:
    """Parameters of one more position of a layer's prefixes."""
    keys = ("attention.key", "cross_attention.key")
    return sum(2 * layer.sites[name].out_features for name in keys if name in layer.sites)
