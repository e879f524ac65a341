r"""MerA: pretrained adapters are aligned neuron by neuron and merged into one, from which tuning starts (additive).

.. math:: W_{down} = \frac{1}{N} \sum_n T_n^\top W_{down}^{(n)}, \qquad
          W_{up} = \frac{1}{N} \sum_n W_{up}^{(n)} T_n, \qquad
          T_n = \mathrm{OT}(\text{neurons of adapter } n, \text{neurons of adapter } 1)

Shapes: those of the sources' adapters, W_down (r, d), W_up (d, r); T (r, r) moves the bottleneck's r neurons, layer by
layer, at the least total squared distance, so it is a permutation. Biases move with their neurons. ``merging="sum"``
leaves out 1/N. Trained: one adapter, as a source has it. Start: the merged adapter, not the backbone's output. No merge
into weights.

``align`` says by what a neuron is known: "weights": its row of W_down, its bias and its column of W_up; "activations":
its values before the nonlinearity on up to ``tokens`` tokens of the target's batches, with its adapter in the backbone
(in :func:`calibrate`); "none": neurons stay where they are.

``sources`` are adapters of one method with one config: ``adapter_drop`` with ``robust=False`` (Pfeiffer's, one a
layer), parallel, residual or sequential ones. Same-track merging: with ``tracks``, the kind of task of each source,
and ``track``, the target's, only sources of that track are merged. Other parameters that sources train (their own
norms or the backbone's) are averaged. The sources' task heads are not used: the target trains one of its own.

Source: He et al. 2023, arXiv:2308.15982, of which the abstract and the beginning could be read; no code was published.
Not confirmed, so chosen here: uniform masses, squared distances, the first source as the reference, values before the
nonlinearity (behind a ReLU two silent neurons are the same), and that both matrices are summed or averaged after the
alignment.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from peftlib.errors import StateError, UnknownNameError
from peftlib.mechanisms.host import Host
from peftlib.methods.base import ConfigError, Method, MethodConfig, SavedAdapter, at_least, check_alike
from peftlib.methods.bases.sources import attach_source


@dataclass(frozen=True)
class MerAConfig(MethodConfig):
    """``align``: "weights", "activations" or "none"; ``merging``: "average" or "sum"; ``tracks`` of the sources, in
    their order, and the ``track`` that is merged; ``tokens``: how many the activations are taken on."""

    align: Literal["weights", "activations", "none"] = "weights"
    merging: Literal["average", "sum"] = "average"
    tracks: tuple[str, ...] = ()
    track: str = ""
    tokens: int = 2048

    def __post_init__(self):
        at_least("tokens", self.tokens, 1)
        for name, known in (("align", ("weights", "activations", "none")), ("merging", ("average", "sum"))):
            if getattr(self, name) not in known:
                raise UnknownNameError(name, getattr(self, name), known)
        if bool(self.tracks) != bool(self.track):
            raise ConfigError(f"tracks={self.tracks!r} with track={self.track!r}: same-track merging needs both")


class MerA(Method):
    Config = MerAConfig
    learning_rate = 5e-4
    source_methods = ("adapter_drop", "parallel_adapter", "residual_adapter", "sequential_adapter")

    def __init__(self, config: MerAConfig):
        super().__init__(config)
        self.calibrates = config.align == "activations"

    def take_sources(self, sources: tuple[SavedAdapter, ...]) -> None:
        super().take_sources(sources)
        check_alike(self.name, sources)
        c = self.config
        if c.tracks and len(c.tracks) != len(sources):
            raise ConfigError(f"{len(c.tracks)} tracks were given for {len(sources)} sources; give one a source")
        self.merged = [s for s, track in zip(sources, c.tracks or [c.track] * len(sources)) if track == c.track]
        if len(self.merged) < 2:
            raise ConfigError(f"{len(self.merged)} sources are of track {c.track!r}; merging needs at least 2")

    def attach(self, host: Host) -> None:
        attach_source(self.sources[0], host)
        self.own = tuple(host.trained())
        if not self.calibrates and self.merged[0].state is not None:
            self._merge({})

    def calibrate(self, batches: Iterable[dict[str, torch.Tensor]], checkpoint: Path | None = None) -> None:
        if any(source.state is None for source in self.merged):
            raise StateError("this mera was loaded without its sources; attach() it with them to merge again")
        batches = list(batches)
        found = []
        for source in self.merged:
            self._write(source.state)
            found.append(self._activations(batches))
        self._merge({place: [seen[place] for seen in found] for place in found[0]})

    def _merge(self, activations: dict[str, list[torch.Tensor]]) -> None:
        """Start from the merged sources; ``activations``: place -> neurons (r, tokens) of each source."""
        states = [{n: source.state[n] for n in self.own} for source in self.merged]
        merged = {n: torch.stack([state[n] for state in states]).mean(0) for n in self.own}
        for place in (n.removesuffix("down.weight") for n in self.own if n.endswith("down.weight")):
            adapters = [{n.removeprefix(place): t for n, t in s.items() if n.startswith(place)} for s in states]
            if self.config.align != "none":
                neurons = activations.get(place) or [
                    torch.cat([a["down.weight"], a["down.bias"][:, None], a["up.weight"].T], dim=1) for a in adapters
                ]  # each (r, tokens), or (r, d + 1 + d)
                plans = [transport_plan(x, neurons[0]) for x in neurons]  # each (r, r)
                adapters = [moved(adapter, T) for adapter, T in zip(adapters, plans)]
            for name in ("down.weight", "down.bias", "up.weight", "up.bias"):
                total = torch.stack([adapter[name] for adapter in adapters]).sum(0)  # N of a shape -> that shape
                merged[place + name] = total / len(adapters) if self.config.merging == "average" else total
        self._write(merged)

    def _write(self, state: dict[str, torch.Tensor]) -> None:
        parameters = self.host.trained()
        with torch.no_grad():
            for name in self.own:
                parameters[name].copy_(state[name])

    @torch.no_grad()
    def _activations(self, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Place -> the values of the attached adapters' neurons, (r, tokens)."""
        seen: dict[str, torch.Tensor] = {}
        found: dict[str, list[torch.Tensor]] = {}
        handles = [
            child.down.register_forward_hook(partial(_look, seen, f"{path}."))
            for path, child in self.host.paths().items()
        ]
        try:
            for batch in batches:
                self.host.model(**batch)
                mask = batch.get("attention_mask")
                for place, rows in seen.items():
                    fits = mask is not None and mask.shape == rows.shape[:2]
                    found.setdefault(place, []).append(rows[mask.bool().cpu()] if fits else rows.flatten(0, -2))
                if min(sum(map(len, rows)) for rows in found.values()) >= self.config.tokens:
                    break
        finally:
            for handle in handles:
                handle.remove()
        return {place: torch.cat(rows)[: self.config.tokens].T for place, rows in found.items()}  # each (r, tokens)


def transport_plan(neurons: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The plan T (r, r) that moves ``neurons`` (r, k) to ``reference`` (r, k) at the least squared distance.

    Each neuron has mass one; the cheapest plan is then a permutation, entry [i, j] = 1 where neuron i becomes j.
    """
    # Imported late: few need it, and it takes a second.
    import ot

    cost = torch.cdist(neurons.double(), reference.double()).square().cpu().numpy()  # (r, k) and (r, k) -> (r, r)
    mass = torch.ones(len(cost), dtype=torch.double).numpy()
    return torch.as_tensor(ot.emd(mass, mass, cost)).to(neurons)  # (r, r)


def moved(adapter: dict[str, torch.Tensor], T: torch.Tensor) -> dict[str, torch.Tensor]:
    """An adapter's tensors by name with its neurons moved by a plan T (r, r). What does not belong to single neurons,
    such as b_up, stays."""
    W_down, b_down, W_up = (adapter[name] for name in ("down.weight", "down.bias", "up.weight"))
    return adapter | {
        "down.weight": T.T.to(W_down) @ W_down,  # (r, d)
        "down.bias": T.T.to(b_down) @ b_down,  # (r,)
        "up.weight": W_up @ T.to(W_up),  # (d, r)
    }


def _look(seen: dict[str, torch.Tensor], place: str, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    seen[place] = output.float().cpu()
