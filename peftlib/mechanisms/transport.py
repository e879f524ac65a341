"""Neurons of one bottleneck matched with those of another by optimal transport."""

from __future__ import annotations

import torch


def plan(neurons: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The transport plan (r, r) from ``neurons`` (r, k) to ``reference`` (r, k) that moves the least squared distance.

    Each neuron has mass one; the cheapest plan is then a permutation, entry [i, j] = 1 where neuron i becomes j.
    """
    # Imported late: few need it, and it takes a second.
    import ot

    cost = torch.cdist(neurons.double(), reference.double()).square().cpu().numpy()
    mass = torch.ones(len(cost), dtype=torch.double).numpy()
    return torch.as_tensor(ot.emd(mass, mass, cost)).to(neurons)


def move(bottleneck: dict[str, torch.Tensor], transport: torch.Tensor) -> dict[str, torch.Tensor]:
    """A bottleneck's tensors ("down.weight" (r, d), "down.bias" (r), "up.weight" (d, r) and others) with its neurons
    moved by a plan (r, r); what does not belong to single neurons stays."""
    moved = dict(bottleneck)
    for name in ("down.weight", "down.bias"):
        moved[name] = transport.T.to(bottleneck[name]) @ bottleneck[name]
    moved["up.weight"] = bottleneck["up.weight"] @ transport.to(bottleneck["up.weight"])
    return moved
