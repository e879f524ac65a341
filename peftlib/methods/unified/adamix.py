r"""AdaMix: several modules at each place, of which every pass draws one, averaged into one in the end (unified).

.. math:: h \leftarrow h + W_{up}\, \sigma(W_{down}^{(i)} h + b^{(i)}) + b_{up}, \quad
          i \sim \mathcal{U}\{1, \dots, M\}; \quad
          \mathcal{L}(p) + \frac{w}{2} \bigl(\mathrm{KL}(p \,\|\, q) + \mathrm{KL}(q \,\|\, p)\bigr)

Shapes: h (b, t, d) of b rows, t tokens and hidden size d; W_down^(i) (r, d), b^(i) (r), W_up (d, r); M experts i. The
adapters stand behind the feed-forward blocks, before the residual sum. Every place draws its i anew in every training
pass, for the whole batch. p and q are the predictions of two passes over the same inputs, which draw independently; the
first argument of each KL is a target, without gradient, and the mean is over rows (for text: tokens with a label).
A single output has no divergence. Trained: M (d r + r) + r d + d a layer. After training, in evaluation and in files
there is one adapter, of the mean weights; it costs what one adapter costs, and trains on as one. Both projections start
at N(0, 0.02^2), near the identity. No merge: the nonlinearity stands between them.

``form="lora"`` has M matrices A and one B of LoRA on ``targets``, :math:`y = W x + \frac{\alpha}{r} B A^{(i)} x`. The
maps of one attention that take query, key and value share their i; the M matrices of a map start as copies of one, B at
zero: the identity. The mean update merges exactly.

Source: Wang et al. 2022, arXiv:2205.12410, and its code: M = 4, w = 1, GELU, the up-projection shared, r = 48 with BERT
(16 with RoBERTa-large). Its LoRA runs, on text generation, have r = 4, alpha = 32, M = 8, w = 100 and dropout 0.1: the
defaults of that form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.anatomy import Site
from peftlib.errors import UnknownNameError
from peftlib.mechanisms.bottleneck import Sequential, check_activation
from peftlib.mechanisms.call import Local
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import LowRank, update
from peftlib.mechanisms.outputs import Args, Kwargs
from peftlib.mechanisms.precision import cast
from peftlib.methods.base import ForwardPass, MethodConfig, at_least, between
from peftlib.methods.bases.low_rank import LowRankUpdates

FORMS = ("adapter", "lora")
DEFAULTS: dict[str, dict[str, float]] = {
    "adapter": {"experts": 4, "consistency": 1.0, "dropout": 0.0},
    "lora": {"experts": 8, "consistency": 100.0, "dropout": 0.1},
}


@dataclass(frozen=True)
class AdaMixConfig(MethodConfig):
    """``form``: "adapter" (``bottleneck`` r, ``activation``, ``std`` of the start) or "lora" (``rank``, ``alpha``,
    ``targets``); ``experts`` M; ``consistency`` w (0: one pass only); ``dropout`` of the inner activation (adapter) or
    the update's input (LoRA). Where these three are None, they are 4, 1 and 0 (adapter) or 8, 100 and 0.1 (LoRA)."""

    form: Literal["adapter", "lora"] = "adapter"
    experts: int | None = None
    consistency: float | None = None
    bottleneck: int = 48
    activation: str = "gelu"
    std: float = 0.02
    rank: int = 4
    alpha: float = 32.0
    targets: tuple[str, ...] | str = ("*attention.query", "*attention.value")
    dropout: float | None = None

    def __post_init__(self):
        if self.form not in FORMS:
            raise UnknownNameError("form of adamix", self.form, FORMS)
        for name, value in DEFAULTS[self.form].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        at_least("experts", self.experts, 2)
        at_least("consistency", self.consistency, 0)
        between("std", self.std, 0, float("inf"))
        for name in ("bottleneck", "rank"):
            at_least(name, getattr(self, name), 1)
        check_activation(self.activation)


class Draw(Local):
    """The i that several maps use in a pass; whoever runs before them sets it."""

    def __init__(self) -> None:
        self.i: torch.Tensor | None = None


def _one_of(count: int, device: torch.device) -> torch.Tensor:
    # As a tensor: no jump in a compiled graph, and a recomputation restores the generator, so draws it again.
    return torch.randint(count, (1,), device=device)  # (1,)


class Experts(nn.Module):
    """``forward(x) = W_i x + b_i``: training draws i uniformly for the whole batch, or uses that of a ``shared`` draw;
    otherwise W and b are the means.

    Shapes: x (..., in); ``weight`` (M, out, in), ``bias`` (M, out) or None; (out, in) and (out) after :meth:`keep`.
    Weights start N(0, std^2) or, without ``std``, as copies of one that is Kaiming-uniform with a = sqrt(5); biases at
    zero.
    """

    shared: Draw | None = None

    def __init__(self, in_features: int, out_features: int, count: int, std: float | None = None, bias: bool = True):
        super().__init__()
        self.count = count
        self.weight = nn.Parameter(torch.empty(count, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(count, out_features)) if bias else None
        with torch.no_grad():
            if std is None:
                self.weight[1:] = nn.init.kaiming_uniform_(self.weight[0], a=math.sqrt(5))
            else:
                for weight in self.weight:
                    nn.init.normal_(weight, std=std)

    def mean(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The mean weight (out, in) and bias (out)."""
        if self.count == 1:
            return self.weight, self.bias
        return self.weight.mean(dim=0), None if self.bias is None else self.bias.mean(dim=0)

    def keep(self) -> None:
        """Become one map, the mean, which trains on by itself."""
        if self.count > 1:
            weight, bias = self.mean()
            self.weight = nn.Parameter(weight.detach())
            self.bias = None if bias is None else nn.Parameter(bias.detach())
            self.count = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.count == 1:
            return F.linear(x, *self.mean())  # (..., in) -> (..., out)
        i = _one_of(self.count, x.device) if self.shared is None else self.shared.i  # (1,)
        W = self.weight.index_select(0, i)[0]  # (M, out, in) -> (out, in)
        b = None if self.bias is None else self.bias.index_select(0, i)[0]  # (M, out) -> (out,)
        return F.linear(x, W, b)  # (..., in) -> (..., out)


class MixedLowRank(LowRank):
    """``forward(x, y) = y + scale * B A_i dropout(x)``: of M matrices A one is drawn; B is shared."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, count: int, dropout: float = 0.0):
        super().__init__(in_features, out_features, rank, scale, dropout)
        del self.A
        self.experts = Experts(in_features, rank, count, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = cast(self.dropout(x), self.B).flatten(0, -2)  # (b, t, in) -> (b t, in)
        Ax = self.experts(x)  # (b t, in) -> (b t, r)
        return update(y, Ax, self.B, self.scale)  # (b, t, out)

    def delta(self) -> torch.Tensor:
        """The (out, in) update of the mean, formed in float32 or wider."""
        dtype = torch.promote_types(self.B.dtype, torch.float32)
        return self.scale * (self.B.detach().to(dtype) @ self.experts.mean()[0].detach().to(dtype))


class AdaMix(LowRankUpdates):
    Config = AdaMixConfig
    learning_rate = 2e-3
    child = "adamix"

    def attach(self, host: Host) -> None:
        if self.config.form == "lora":
            super().attach(host)
            self.experts = [update.experts for update in self.updates.values()]
            self._share_draws(host)
        else:
            adapters = [host.after(site, self.child, self.adapter(site)) for site in host.anatomy.sites(("ffn.down",))]
            self.experts = [adapter.down for adapter in adapters]

    def _share_draws(self, host: Host) -> None:
        """One draw for the maps of an attention that make its query, keys and values."""
        for layer in host.anatomy.layers:
            for block, module in (("attention", layer.attention), ("cross_attention", layer.cross_attention)):
                sites = (layer.sites.get(f"{block}.{name}") for name in ("query", "key", "value"))
                experts = [self.updates[site].experts for site in sites if site in self.updates]
                if len(experts) > 1:
                    draw = Draw()
                    for one in experts:
                        one.shared = draw
                    host.hook(module, _draw, draw, experts[0], before=True)

    def update(self, site: Site) -> MixedLowRank:
        c = self.config
        return MixedLowRank(site.in_features, site.out_features, c.rank, c.alpha / c.rank, c.experts, c.dropout)

    def adapter(self, site: Site) -> Sequential:
        c, d = self.config, site.out_features
        adapter = Sequential(d, c.bottleneck, c.activation, dropout=c.dropout)
        nn.init.normal_(adapter.up.weight, std=c.std)
        adapter.down = Experts(d, c.bottleneck, c.experts, c.std)
        return adapter

    def penalty(self, forward: ForwardPass) -> torch.Tensor | None:
        w = self.config.consistency
        if not w or self.experts[0].count == 1:
            return None
        p = self._log_probabilities(forward.logits())  # (b, C) or (b, t, C)
        q = self._log_probabilities(forward.logits(forward.replay()))
        pq = F.kl_div(q, p.detach(), log_target=True, reduction="none")  # terms of KL(p || q)
        qp = F.kl_div(p, q.detach(), log_target=True, reduction="none")  # terms of KL(q || p)
        rows, labels = (pq + qp).sum(dim=-1), forward.labels  # (b,) or (b, t)
        if rows.dim() > 1 and labels is not None:
            if self.host.anatomy.stacks == ("decoder",):  # label t + 1 belongs to output t
                rows, labels = rows[:, :-1], labels[:, 1:]  # (b, t - 1)
            asked = (labels != -100).to(rows.dtype)
            return w / 2 * (rows * asked).sum() / asked.sum().clamp(min=1)  # ()
        return w / 2 * rows.mean()  # ()

    @staticmethod
    def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(logits.float(), dim=-1)

    def on_train_end(self) -> None:
        for experts in self.experts:
            experts.keep()

    @torch.no_grad()
    def state(self) -> dict[str, torch.Tensor]:
        means = {}
        for path, child in self.host.paths().items():
            for name, module in child.named_modules(prefix=path):
                if isinstance(module, Experts):
                    weight, bias = module.mean()
                    means |= {f"{name}.weight": weight} | ({} if bias is None else {f"{name}.bias": bias})
        return self.host.state() | means

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.on_train_end()
        super().load_state(state)

    def check_mergeable(self) -> None:
        if self.config.form != "lora":
            super().check_mergeable()


def _draw(draw: Draw, experts: Experts, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
    if experts.training and experts.count > 1:
        draw.i = _one_of(experts.count, experts.weight.device)
