"""What the methods share that add one update beside each targeted linear map: the targets, ranks that fit, the merge.

Such a method has ``rank`` and ``targets`` in its config and says in :meth:`LowRankUpdates.update` what the layer beside
a map is. The layer computes ``y' = layer(x, y)`` from the map's input x (b, t, in) and output y (b, t, out); where it
can be merged, its ``delta()`` is the (out, in) matrix that it adds to the weight.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from peftlib.anatomy import Site, weights
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import add_to_weight, sites_of_rank
from peftlib.mechanisms.quantized import QuantizedLinear
from peftlib.methods.base import Method, MethodConfig


class LowRankUpdates(Method):
    """``updates``: site -> the layer beside its map, in the order of the anatomy."""

    child: ClassVar[str] = "lora"
    """The layer's name in the module that it stands beside, and so in files."""

    def __init__(self, config: MethodConfig):
        super().__init__(config)
        self.updates: dict[Site, Any] = {}

    def update(self, site: Site) -> nn.Module:
        """A new layer for this map."""
        raise NotImplementedError

    def targets(self, host: Host) -> list[Site]:
        """The maps to update. Raises TargetError for a pattern that matches nothing, or a rank that does not fit."""
        return sites_of_rank(host, self.config.targets, self.config.rank)

    def attach(self, host: Host) -> None:
        for site in self.targets(host):
            self.updates[site] = host.after(site, self.child, self.update(site))

    def named(self) -> dict[str, nn.Module]:
        """The layers by name in the model."""
        mine = set(self.updates.values())
        return {name: child for name, child in self.host.paths().items() if child in mine}

    def merge(self) -> None:
        """``W <- W + delta``, rounded once to W's dtype."""
        for site, update in self.updates.items():
            add_to_weight(site, update.delta())


class QuantizedUpdates(LowRankUpdates):
    """Updates beside maps whose weights are quantized first. ``quantized``: path -> quantized map."""

    def __init__(self, config: MethodConfig):
        super().__init__(config)
        self.quantized: dict[str, QuantizedLinear] = {}

    def quantize(self, host: Host) -> dict[str, QuantizedLinear]:
        """Put quantized maps in the place of those that the config names."""
        raise NotImplementedError

    def attach(self, host: Host) -> None:
        self.targets(host)  # an error in the targets comes before anything is replaced
        self.quantized = self.quantize(host)
        super().attach(host)

    def merge(self) -> None:
        """Make the quantized maps plain ones: ``W <- dequantized W + delta``, rounded once."""
        merged = set()
        for module in self.quantized.values():
            if weights.packed(module) is None:
                continue  # another part of a combination has written into it
            weight = module.dequantize()  # (out, in)
            for site, update in self.updates.items():
                if site.module is module:
                    weight[site.rows] += update.delta()
                    merged.add(site)
            weights.unpack(module, weight)
        for site, update in self.updates.items():
            if site not in merged:
                add_to_weight(site, update.delta())
