"""What the methods share that add one update beside each targeted linear map: the targets, ranks that fit, the merge.

Such a method has ``rank`` and ``targets`` in its config and says in :meth:`LowRankUpdates.update` what the layer beside
a map is. The layer computes ``y' = layer(x, y)`` from the map's input x (b, t, in) and output y (b, t, out); where it
can be merged, its ``delta()`` is the (out, in) matrix that it adds to the weight.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from torch import nn

from peftlib.anatomy import Site, weights
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import add_to_weight, sites_of_rank
from peftlib.mechanisms.quantized import QuantizedLinear
from peftlib.methods.base import Method, MethodConfig, fitted, is_default

C = TypeVar("C", bound=MethodConfig)


def fit_rank(config: C, sites: list[Site], multiple_of: int = 1) -> C:
    """The config with a rank that fits all sites in the place of a default that does not, and with alpha in the same
    proportion to it, which leaves the update's scale alpha / r."""
    given: Any = config
    narrow = min(sites, key=lambda site: min(site.in_features, site.out_features))
    largest = min(narrow.in_features, narrow.out_features) // multiple_of * multiple_of
    if given.rank <= largest or largest < 1 or not is_default(config, "rank"):
        return config
    values = {"rank": largest}
    if (alpha := getattr(config, "alpha", None)) is not None:
        values["alpha"] = alpha * largest / given.rank
    if (target := getattr(config, "target_rank", None)) is not None:
        values["target_rank"] = min(target, largest)
    return fitted(config, f"{narrow} ({narrow.out_features} x {narrow.in_features})", **values)


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
        """The maps to update. A default rank that is too large for one of them becomes the largest that is not. Raises
        TargetError for a pattern that matches nothing, or another rank that does not fit."""
        sites = host.anatomy.sites(self.config.targets)
        self.config = fit_rank(self.config, sites)
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

    replaces = True

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
