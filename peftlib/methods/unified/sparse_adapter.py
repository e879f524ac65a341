r"""SparseAdapter: adapters are pruned before they train, by a score of their untrained entries (unified).

.. math:: h \leftarrow h + (M_{up} \odot W_{up})\, \sigma((M_{down} \odot W_{down}) \mathrm{LN}(h) + b_{down}) + b_{up},
          \qquad M = \operatorname{top}_k(s)

=========  ==============================================================================================
score      s of an entry w
=========  ==============================================================================================
snip       \|w g\|, g the loss gradient on the calibration batches; w g is that of a mask at w
grasp      w (H g), H the Hessian: what w contributes to the gradient's norm, to first order
magnitude  \|w\|
synflow    \|w dR/dw\|, R the sum of the entries of \|W_up\| \|W_down\| 1; needs no data
random     uniform
=========  ==============================================================================================

Shapes: h (b, t, d) of b rows, t tokens and hidden size d; W_down (r, d), W_up (d, r); M and s have the shape of each
matrix. The norm LN (its own in each adapter) and the biases train and are not pruned. k = int(density times entries) of
all matrices together, or with ``scope="local"`` of each by itself; ties by position. :meth:`Adapted.calibrate` fixes
the mask; then k values train from their start and the others stay zero. Both matrices start at N(0, 0.02^2), the norm
as the identity, biases at zero: near the identity, since with a zero W_up every snip score would be zero. Stored: k
values with their indices, or bits, and what is not pruned. Large-sparse: twice the ``bottleneck`` at half the
``density`` has the same budget. No merge, except for LoRA.

``form``: "adapter" has sequential adapters behind both blocks, "lora" A and B, both started at N(0, 0.02^2), and "mam"
parallel adapters with the norm, beside the prefixes of He et al. 2022, which are not pruned and made by an MLP.

Source: He et al. 2022, arXiv:2210.04284 (SNIP, 40 % pruned), and its code, whose ``sparsity`` is the share that is kept
and which scores 320 rows, in evaluation mode. It multiplies dense weights by masks; here k values train. Its adapter
behind the feed-forward block stands behind the dropout, ours before it, which is the same outside training. Its LoRA on
attention starts as here (RoBERTa, BART), that on feed-forward maps of BART at B = 0, where no snip score is above zero.
Its synflow runs the adapter itself on ones, which its norm turns into zeros, so that no score is above zero; the linear
form here is SynFlow's own (Tanaka et al. 2020, arXiv:2006.05467). The settings of its MAM runs are not public: the
prefix is that of ``mam_adapter``, the adapters' ``scale`` the default of its code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from peftlib.errors import UnknownNameError
from peftlib.mechanisms import importance, pruned
from peftlib.mechanisms.bottleneck import Bottleneck
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import LowRank
from peftlib.mechanisms.prefix import Prefix
from peftlib.methods.base import Method, MethodConfig, at_least, between
from peftlib.methods.bases.pruned import PrunedCombination

FORMS, SCOPES = ("adapter", "lora", "mam"), ("global", "local")
SCORES = ("snip", "grasp", "magnitude", "synflow", "random")


@dataclass(frozen=True)
class SparseAdapterConfig(MethodConfig):
    """``form``: "adapter" (``bottleneck`` r, ``activation``), "lora" (``rank``, ``alpha``, ``targets``) or "mam"
    (``bottleneck`` r and ``scale`` of the adapters, ``length`` m of the prefix and ``hidden`` units of its MLP);
    ``norm``: adapters have a trained norm on their input; ``dropout`` of their inner activation; ``score`` and
    ``scope`` of the choice, ``density`` that is kept, ``rows`` and ``batches`` to score on at most (None: all);
    ``std`` of the start."""

    form: Literal["adapter", "lora", "mam"] = "adapter"
    score: Literal["snip", "grasp", "magnitude", "synflow", "random"] = "snip"
    scope: Literal["global", "local"] = "global"
    density: float = 0.6
    rows: int | None = 320
    batches: int | None = None
    std: float = 0.02
    bottleneck: int = 64
    activation: str = "relu"
    norm: bool = True
    dropout: float = 0.1
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] | str = ("*attention.query", "*attention.value")
    length: int = 30
    hidden: int = 800
    scale: float = 1.0

    def __post_init__(self):
        for what, value, known in (
            ("form", self.form, FORMS),
            ("score", self.score, SCORES),
            ("scope", self.scope, SCOPES),
        ):
            if value not in known:
                raise UnknownNameError(f"{what} of sparse_adapter", value, known)
        between("density", self.density, 0, 1)
        between("std", self.std, 0, float("inf"))
        for name in ("bottleneck", "rank", "length", "hidden"):
            at_least(name, getattr(self, name), 1)
        at_least("dropout", self.dropout, 0)
        for name in ("rows", "batches"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)


class SparseAdapter(PrunedCombination):
    Config = SparseAdapterConfig
    learning_rate = 5e-4

    def part_configs(self) -> tuple[dict, ...]:
        c = self.config
        adapter = {"bottleneck": c.bottleneck, "activation": c.activation, "dropout": c.dropout}
        if c.form == "adapter":
            return ({"method": "sequential_adapter", "train_norms": False, **adapter},)
        if c.form == "lora":
            return ({"method": "lora", "rank": c.rank, "alpha": c.alpha, "targets": c.targets},)
        prefix = {"length": c.length, "hidden": c.hidden, "shift_positions": False}
        return {"method": "prefix_tuning", **prefix}, {"method": "parallel_adapter", "scale": c.scale, **adapter}

    def choices(self, host: Host) -> dict[str, nn.Parameter]:
        matrices = set()
        for child in host.paths().values():
            for weight in (w for product in _products(child) for w in product):
                nn.init.normal_(weight, std=self.config.std)
                matrices.add(id(weight))
            if isinstance(child, Bottleneck) and self.config.norm:
                W_down = child.down.weight  # (r, d)
                child.norm = nn.LayerNorm(W_down.shape[1], device=W_down.device, dtype=W_down.dtype)
        return {n: p for n, p in pruned.added(host).items() if id(p) in matrices}

    @property
    def k(self) -> int:
        return sum(self._sizes())

    def _sizes(self) -> list[int]:
        """How many entries are kept, of all tensors or of each."""
        if self.config.scope == "global":
            return [int(self.config.density * self.entries)]
        return [int(self.config.density * p.numel()) for p in self.candidates.values()]

    def calibrate(self, batches: Iterable[dict[str, torch.Tensor]], checkpoint: Path | None = None) -> None:
        scores = self.scores(list(importance.first_rows(islice(batches, self.config.batches), self.config.rows)))
        if self.config.scope == "global":
            self.keep(pruned.largest(scores, self.k))
        else:
            self.keep([pruned.largest([s], k)[0] for s, k in zip(scores, self._sizes())])

    def scores(self, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        """The score of every candidate's entries."""
        parameters, score = list(self.candidates.values()), self.config.score
        if score == "snip":
            return [s.abs() for s in importance.first_order(self.host.model, parameters, batches)]
        if score == "grasp":
            return _grasp(self.host.model, parameters, batches)
        if score == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return [torch.rand(p.shape, generator=generator).to(p.device) for p in parameters]
        scores = {id(p): p.detach().abs() for p in parameters}
        if score == "synflow":
            for child in self.host.paths().values():
                for down, up in _products(child):
                    a, b = scores[id(down)], scores[id(up)]  # |W_down| (r, d), |W_up| (d, r)
                    scores[id(down)] = a * b.sum(0)[:, None]  # (r, d)
                    scores[id(up)] = b * a.sum(1)  # (d, r)
        return [scores[id(p)] for p in parameters]

    def state(self) -> dict[str, torch.Tensor]:
        if self.config.form != "mam":
            return super().state()
        prefixes = self.parts[0]  # stored as keys and values, without the MLP that makes them
        made = prefixes.host.state()
        return {n: t for n, t in super().state().items() if n not in made} | prefixes.state()

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        for child in self.host.paths().values():
            if isinstance(child, Prefix):
                child.keep()
        super().load_state(state)

    def check_mergeable(self) -> None:
        if self.config.form != "lora":
            Method.check_mergeable(self)


def _products(child: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The pairs (W_down, W_up), or (A, B), of matrices that a child applies one after the other."""
    if isinstance(child, Bottleneck):
        return [(child.down.weight, child.up.weight)]
    return [(child.A, child.B)] if isinstance(child, LowRank) else []


def _grasp(
    model: nn.Module, parameters: list[nn.Parameter], batches: list[dict[str, torch.Tensor]]
) -> list[torch.Tensor]:
    """``w (H g)`` for each w, g and H the gradient and the Hessian of the sum of the losses of all batches."""
    g = importance.GradientSums(parameters, "signed")
    with g:
        for batch in batches:
            g.backward(importance.loss(model, batch))
    Hg = [torch.zeros_like(w) for w in parameters]
    # The fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            gradients = torch.autograd.grad(importance.loss(model, batch), parameters, create_graph=True)
            along = sum((gradient * total).sum() for gradient, total in zip(gradients, g.sums))  # ()
            for product, more in zip(Hg, torch.autograd.grad(along, parameters)):
                product += more
    return [w.detach() * product for w, product in zip(parameters, Hg)]
