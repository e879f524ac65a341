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

from peftlib.anatomy import Anatomy, Site
from peftlib.errors import TargetError, UnsupportedError
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


class _Files(hf_peft.Format):
    """A row where HF peft scales a map's input (its ``feedforward_modules``), a column where it scales the output."""

    kind = "IA3"
    unused = (*hf_peft.MAPS, "feedforward_modules", "init_ia3_weights")

    def read(self, settings: dict, tensors: dict, parts: Anatomy, folder: object) -> tuple[dict, hf_peft.Fill]:
        self.settled(settings, folder)
        scales: dict[str, torch.Tensor] = {}
        outputs, inputs = [], []
        for name in sorted(n for n in tensors if n.endswith(".ia3_l")):
            path, scale = name.removesuffix(".ia3_l"), tensors.pop(name)
            sites = hf_peft.sites_of(parts, path, folder)
            # A fused map's input is that of all its parts.
            if scale.shape[0] == 1:
                scales[str(sites[0])] = scale.flatten()
                inputs.append(sites[0])
                continue
            parts_of_map = dict(zip(sites, scale.flatten().split([site.out_features for site in sites])))
            # A part of a fused map that keeps ones beside others that do not is one that was not adapted.
            moved = {site: part for site, part in parts_of_map.items() if not part.eq(1).all()}
            for site, part in (moved or parts_of_map).items():
                scales[str(site)] = part
                outputs.append(site)
        hf_peft.all_used(tensors, scales, folder)
        options = {"outputs": hf_peft.patterns(parts, outputs), "inputs": hf_peft.patterns(parts, inputs)}

        def fill(method: Method) -> None:
            for site, child in method.scales.items():
                hf_peft.copy(child.scale, scales[str(site)], f"{site}.ia3_l")

        return options, fill

    def write(self, method: Method) -> tuple[dict, dict]:
        tensors, rows = {}, []
        modules = hf_peft.by_module(method.scales)
        inputs = {site.path for site, child in method.scales.items() if isinstance(child, ScaleInput)}
        outputs = {site.path for site, child in method.scales.items() if isinstance(child, ScaleOutput)}
        if both := inputs & outputs:
            raise UnsupportedError(
                f"HF peft's (IA)3 scales the input or the output of a map; here {min(both)} has both"
            )
        for path, scales in modules.items():
            name = f"base_model.model.{path}.ia3_l"
            first, child = next(iter(scales.items()))
            if path in inputs:
                tensors[name] = child.scale[None]
                rows.append(path)
                continue
            whole = child.scale.new_ones(first.out_features * (first.part or (0, 1))[1])
            for site, child in scales.items():
                whole[site.rows] = child.scale
            tensors[name] = whole[:, None]
        settings = {
            "target_modules": sorted(modules),
            "feedforward_modules": sorted(rows),
            "fan_in_fan_out": any(site.transposed for site in method.scales),
        }
        return settings, tensors


class IA3(Method):
    Config = IA3Config
    learning_rate = 1e-2
    hf_peft = _Files()

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
        self._fold(ScaleOutput)

    def merge_inputs(self) -> None:
        self._fold(ScaleInput)

    def _fold(self, kind: type[ScaleInput] | type[ScaleOutput]) -> None:
        for site, scale in self.scales.items():
            if isinstance(scale, kind):
                scale.fold(site)
