r"""AutoPEFT: one structure of a space of serial adapters, parallel adapters and prefixes (hybrid, automatic).

.. math:: \max_{c \in \mathcal C} \bigl(\mathrm{score}(c), -\mathrm{params}(c)\bigr), \qquad
          c = (r_{serial}, r_{parallel}, m, z_1, \dots, z_L)

Letters: r_serial and r_parallel are the bottlenecks of an adapter behind and of one beside the feed-forward block, m is
the number of keys and values before those of each attention, d the hidden size. The sizes hold for every layer l with
z_l = 1; layers with z_l = 0 have no modules. A size of 0 leaves that module out. The serial adapter reads what the
layer would give without adapters, the parallel one the hidden state in front of the block, and both add to the residual
sum: LN(x + FFN(x) + A_serial(LN(x + FFN(x))) + A_parallel(x)). Trained: 2 d r + r + d an adapter in each layer that is
on, and the MLP that makes the prefixes; stored: 2 m d a prefix. The parallel adapter starts at zero, the serial one at
N(0, 0.02^2), so alone they start at or near the backbone; a prefix acts from the first step on. No merge: adapters are
nonlinear and a prefix depends on the query.

Attached is one structure. A search (``peftlib search autopeft``) finds the set of those that no other beats in both
score and size, by Bayesian optimization; it scores each with a training run of its own.

Source: Zhou et al. 2024, arXiv:2301.12132, and its code. As there: the three modules, sizes that all layers share and
one bit a layer; the serial adapter is Pfeiffer's with ReLU, the parallel one that of He et al. with scale 4 and no
dropout, prefixes come from an MLP of 800 units, which the search's count of parameters leaves out. The default sizes
and the learning rate are chosen here; the original trains every structure at 1e-4 for 20 epochs.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftlib.errors import TargetError
from peftlib.mechanisms.host import Host
from peftlib.methods.base import ConfigError, Method, MethodConfig, at_least
from peftlib.methods.combination import Combination
from peftlib.methods.hybrid.automatic.autopeft.search import AutoPEFTSearch


@dataclass(frozen=True)
class AutoPEFTConfig(MethodConfig):
    """``serial`` and ``parallel`` bottlenecks and the prefixes' ``length``, 0 for none; ``layers``: 1 or 0 for each
    layer (None: all are on), those of an encoder before those of a decoder; ``reparametrize`` prefixes by an MLP of
    ``hidden`` units."""

    serial: int = 48
    parallel: int = 48
    length: int = 3
    layers: tuple[int, ...] | None = None
    reparametrize: bool = True
    hidden: int = 800

    def __post_init__(self):
        at_least("hidden", self.hidden, 1)
        for name in ("serial", "parallel", "length"):
            at_least(name, getattr(self, name), 0)
        if not (self.serial or self.parallel or self.length):
            raise ConfigError("serial=0, parallel=0 and length=0 leave nothing to train; one must be at least 1")
        if self.layers is not None and (not any(self.layers) or not set(self.layers) <= {0, 1}):
            raise ConfigError(f"layers={self.layers!r} are not one 0 or 1 a layer with at least one 1")


class AutoPEFT(Combination):
    Config = AutoPEFTConfig
    learning_rate = 5e-4
    structure_search = AutoPEFTSearch

    def part_configs(self) -> tuple[dict, ...]:
        c = self.config
        serial = {"variant": "pfeiffer", "activation": "relu", "init_std": 0.02, "train_norms": False}
        prefix = {"length": c.length, "reparametrize": c.reparametrize, "hidden": c.hidden, "shift_positions": False}
        # In this order the serial adapter reads the layer without the parallel one.
        parts = (
            (c.serial, {"method": "sequential_adapter", "bottleneck": c.serial, **serial}),
            (c.parallel, {"method": "parallel_adapter", "bottleneck": c.parallel, "dropout": 0.0}),
            (c.length, {"method": "prefix_tuning", **prefix}),
        )
        return tuple(part for size, part in parts if size)

    def scope(self, host: Host, part: Method) -> Host:
        bits, layers = self.config.layers, host.anatomy.num_layers
        if bits is None:
            return host.scope()
        if len(bits) != layers:
            raise TargetError(
                f"layers={bits!r} are for {len(bits)} layers, and {type(host.model).__name__} has {layers}"
            )
        return host.scope(layers=[i for i, on in enumerate(bits) if on])

    def check_mergeable(self) -> None:
        Method.check_mergeable(self)
