r"""Threshold mask: which pretrained weights stay and which become zero is learned; no weight changes.

.. math:: y = (W \odot M)\, x + b, \qquad M = [\,S > \tau\,], \qquad \partial M / \partial S := 1

Shapes: W, S, M (out, in). The scores S start uniform on :math:`(-c, s)` with :math:`s = (c + \tau)/\rho - c`, so that a
share :math:`\rho` of the weights is expected to start at zero: the start is not the identity. Gradients pass the step
unchanged (straight-through). Trained: one score a masked weight. Stored: one bit a masked weight; a loaded mask is for
use, not for more training, because its scores are gone. Merge: exact, the masked weight replaces the weight.

Source: Zhao et al. 2020, arXiv:2004.12406, and its code (strict comparison, tau = 0.01, c = 0.02, biases not masked,
head trained). Taxonomy: partial/pretrained_weight_masking. Departures: the pooler is not masked; the code's masks by
sampling, by head and by layer are not offered. Its initial share of zeros and its choice of layers vary by task; here
5 % and all layers (narrow ``targets`` to fewer).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from peftlib.anatomy import Site
from peftlib.errors import LoadError, StateError, TargetError
from peftlib.mechanisms import bits
from peftlib.mechanisms.host import Host
from peftlib.methods.base import Method, MethodConfig, between, one_of


@dataclass(frozen=True)
class ThresholdMaskConfig(MethodConfig):
    """``sparsity`` rho, the share of zeros at the start; ``threshold`` tau; ``scale`` c of the scores' lower end;
    ``init``: "uniform", or "magnitude" to drop the smallest weights of each matrix first; ``targets`` (site patterns);
    ``biases``: mask the targets' biases as well."""

    sparsity: float = 0.05
    threshold: float = 0.01
    scale: float = 0.02
    init: str = "uniform"
    targets: tuple[str, ...] | str = "all-linear"
    biases: bool = False

    def __post_init__(self):
        between("sparsity", self.sparsity, 0, 1)
        between("scale", self.scale, 0, float("inf"))
        between("threshold", self.threshold, 0 if self.init == "magnitude" else -self.scale, float("inf"))
        one_of("init", self.init, ("uniform", "magnitude"))


def binarize(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """``[S > tau]`` as 0 and 1 in the scores' dtype; the gradient passes as if this were the identity."""
    hard = (scores > threshold).to(scores.dtype)
    return hard + (scores - scores.detach())


class StraightThroughMask(nn.Module):
    """A parametrization, ``forward(W) = W * [scores > threshold]``.

    Shapes: W (out, in) or (in, out), or a bias (out); scores and mask have its shape or, with ``dim`` and ``index``
    (k,), that of ``W.index_select(dim, index)``, a part of it, and the rest of W stays as it is. Scores train until
    :meth:`deploy` puts a fixed mask in their place.
    """

    def __init__(self, scores: torch.Tensor, threshold: float, dim: int = 0, index: torch.Tensor | None = None):
        super().__init__()
        self.scores = nn.Parameter(scores)
        self.threshold = threshold
        self.dim = dim
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("fixed", None, persistent=False)

    def forward(self, W: torch.Tensor) -> torch.Tensor:
        if self.fixed is None:
            M = binarize(self.scores, self.threshold)  # (out, in) or the part's shape
        elif self.training and torch.is_grad_enabled():
            raise StateError(
                "a loaded mask has its bits only, not the scores that train it: call model.eval() to use it, or "
                "attach the method anew to train one"
            )
        else:
            M = self.fixed  # (out, in) or the part's shape
        if self.index is None:
            return W * M.to(W.dtype)  # (out, in)
        part = W.index_select(self.dim, self.index) * M.to(W.dtype)  # the part's shape
        return W.index_copy(self.dim, self.index, part)  # (out, in)

    def _mask(self) -> torch.Tensor:
        return self.scores.detach() > self.threshold if self.fixed is None else self.fixed

    def kept(self, W: torch.Tensor) -> torch.Tensor:
        """The mask as it is now, boolean, of W's whole shape: entries outside the masked part are kept."""
        if self.index is None:
            return self._mask()
        return torch.ones_like(W, dtype=torch.bool).index_copy(self.dim, self.index, self._mask())

    def pack(self) -> torch.Tensor:
        """The mask as it is now, one bit an entry."""
        return bits.pack(self._mask())

    def deploy(self, packed: torch.Tensor) -> None:
        """Use this stored mask from now on, in the place of the scores. Raises LoadError when it does not fit."""
        now = self.scores if self.fixed is None else self.fixed
        self.fixed = bits.unpack(packed, now.shape).to(now.device)
        self.scores = None


class ThresholdMask(Method):
    Config = ThresholdMaskConfig
    learning_rate = 2e-3

    def attach(self, host: Host) -> None:
        self.masks: dict[str, StraightThroughMask] = {}
        sites = host.anatomy.sites(self.config.targets)
        for module in dict.fromkeys(site.module for site in sites):
            parts = [site for site in sites if site.module is module]
            path, dim = parts[0].path, int(parts[0].transposed)
            self.masks[f"{path}.weight"] = self._mask(host, module.weight, parts, dim)
            if self.config.biases and module.bias is not None:
                self.masks[f"{path}.bias"] = self._mask(host, module.bias, parts, 0)
        if self.config.biases and not any(name.endswith(".bias") for name in self.masks):
            raise TargetError("biases=True, and no target has a bias; leave it out")

    def _mask(self, host: Host, tensor: nn.Parameter, parts: list[Site], dim: int) -> StraightThroughMask:
        """Mask the part of the tensor that belongs to these sites; ``dim`` is that of the outputs."""
        index = None
        if sum(site.out_features for site in parts) < tensor.shape[dim]:
            rows = torch.arange(tensor.shape[dim], device=tensor.device)
            index = torch.cat([rows[site.rows] for site in parts])
        part = tensor if index is None else tensor.index_select(dim, index)
        return host.parametrize(tensor, StraightThroughMask(self._scores(part), self.config.threshold, dim, index))

    def _scores(self, weight: torch.Tensor) -> torch.Tensor:
        """S at the start, of the weight's shape."""
        c = self.config
        if c.init == "uniform":
            return torch.empty(weight.shape).uniform_(-c.scale, (c.scale + c.threshold) / c.sparsity - c.scale)
        order = weight.detach().abs().flatten().argsort(stable=True)
        scores = torch.full(weight.shape, 2 * c.threshold)
        scores.view(-1)[order[: round(c.sparsity * order.numel())]] = 0
        return scores

    def state(self) -> dict[str, torch.Tensor]:
        tensors = {f"{name}.mask": mask.pack() for name, mask in self.masks.items()}
        return tensors | {n: p.detach() for n, p in self._dense()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        mine = self.state()
        if missing := sorted(mine.keys() ^ state.keys()):
            raise LoadError(f"the masks in the file are not those of this config and backbone: {missing[:3]}")
        for name, mask in self.masks.items():
            mask.deploy(state[f"{name}.mask"])
        with torch.no_grad():
            for name, parameter in self._dense():
                parameter.copy_(state[name])

    def _dense(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters beside the scores: those of the task head."""
        scores = {id(mask.scores) for mask in self.masks.values()}
        return ((n, p) for n, p in self.host.trained().items() if id(p) not in scores)
