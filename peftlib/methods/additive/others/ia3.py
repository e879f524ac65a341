r"""(IA)³: trained vectors scale keys, values and the inner activations of the feed-forward block.

.. math:: \mathrm{softmax}\Bigl(\frac{Q\,(l_k \odot K)^\top}{\sqrt{p}}\Bigr)(l_v \odot V), \qquad
          W_2\,(l_f \odot \gamma(W_1 x))

Shapes, with b rows of t tokens and heads of size p: K, V (b, t, d) and l_k, l_v (d), narrower with grouped queries; the
inner activations (b, t, f) and l_f (f). All start at one, so the start is the identity. Trained: 2d + f a layer, 4d + f
in a decoder layer with cross-attention. Everything is linear, so it merges exactly: l_k and l_v scale the rows of their
weights and their biases, l_f the columns of W_2.

Source: Liu et al. 2022, arXiv:2205.05638, which does this in self- and cross-attention of T5. Their unlikelihood and
length-normalised losses belong to the recipe T-Few, not to the method, and are not here. ``inputs`` names the maps
whose input is scaled: ``("attention.output", "ffn.down")`` is what HF peft does by default on BERT and RoBERTa.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from peftlib.anatomy import Site
from peftlib.errors import TargetError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.scaling import ScaleOutput
from peftlib.methods.base import Method, MethodConfig
from peftlib.methods.bases import hf_peft


@dataclass(frozen=True)
class IA3Config(MethodConfig):
    """``outputs`` and ``inputs``: site patterns of the linear maps whose output or input is scaled; () for none."""

    outputs: tuple[str, ...] | str = ("*attention.key", "*attention.value")
    inputs: tuple[str, ...] | str = ("ffn.down",)


class ScaleInput(nn.Module):
    """Before a linear map: ``forward(x) = l * x``, elementwise; ``scale`` l (in) starts at one. l_k and l_v, behind
    their maps, are a :class:`ScaleOutput` each."""

    def __init__(self, size: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.scale).to(x.dtype)  # (b, t, in)

    def fold(self, site: Site) -> None:
        """Scale the columns of the site's weight (out, in)."""
        with torch.no_grad():
            site.weight.copy_(site.weight * self.scale)


class IA3(Method):
    Config = IA3Config
    learning_rate = 1e-2
    hf_peft = hf_peft.IA3()

    def attach(self, host: Host) -> None:
        c = self.config
        self.scales: dict[Site, ScaleInput | ScaleOutput] = {}
        if not c.outputs and not c.inputs:
            raise TargetError("outputs and inputs are both empty; name at least one site")
        for site in host.anatomy.sites(c.outputs, optional=True):
            self.scales[site] = host.after(site, "ia3", ScaleOutput(site.out_features))
        for site in host.anatomy.sites(c.inputs, optional=True):
            self.scales[site] = host.before(site, "ia3", ScaleInput(site.in_features))

    def merge(self) -> None:
        for site, scale in self.scales.items():
            scale.fold(site)
