r"""AdaMix: several modules at each place, of which every pass draws one, averaged into one in the end (unified).

.. math:: h \leftarrow h + W_{up}\, \sigma(W_{down}^{(i)} h + b^{(i)}) + b_{up}, \quad
          i \sim \mathcal{U}\{1, \dots, M\}; \quad
          \mathcal{L}(p) + \frac{w}{2} \bigl(\mathrm{KL}(p \,\|\, q) + \mathrm{KL}(q \,\|\, p)\bigr)

Shapes: W_down^(i) (r, d), b^(i) (r), W_up (d, r). The adapters stand behind the feed-forward blocks, before the
residual sum. Every place draws its i anew in every training pass, for the whole batch. p and q are the predictions of
two passes over the same inputs, which draw by themselves; the first argument of each KL is a target, without gradient,
and rows (for text: tokens with a label) are averaged. A single output has no prediction to keep consistent. Trained:
M (d r + r) + r d + d a layer. After training, in evaluation and in files there is one adapter, of the mean weights; it
costs what one adapter costs, and trains on as one. Both projections start at N(0, 0.02), near the identity. No merge:
the nonlinearity stands between them.

``form="lora"`` has M matrices A and one B of LoRA on ``targets``: B starts at zero, the identity, and the mean update
merges exactly.

Source: Wang et al. 2022, arXiv:2205.12410, and its code: M = 4, w = 1, GELU, the up-projection shared, r = 48 with BERT
(16 with RoBERTa-large). Their LoRA runs on text generation have r = 4, M = 8 and w = 100.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.errors import UnknownNameError
from peftlib.mechanisms.bottleneck import Sequential, check_activation
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import add_to_weight, check_rank
from peftlib.mechanisms.mixture import Experts, MixedLowRank
from peftlib.methods.base import ForwardPass, Method, MethodConfig, at_least, between

FORMS = ("adapter", "lora")


@dataclass(frozen=True)
class AdaMixConfig(MethodConfig):
    """``form``: "adapter" (``bottleneck`` r, ``activation``, ``std`` of the start) or "lora" (``rank``, ``alpha``,
    ``targets``); ``experts`` M; ``consistency`` w (0: one pass only); ``dropout`` of the inner activation (adapter) or
    the update's input (LoRA)."""

    form: Literal["adapter", "lora"] = "adapter"
    experts: int = 4
    consistency: float = 1.0
    bottleneck: int = 48
    activation: str = "gelu"
    std: float = 0.02
    rank: int = 4
    alpha: float = 32.0
    targets: tuple[str, ...] | str = ("*attention.query", "*attention.value")
    dropout: float = 0.0

    def __post_init__(self):
        if self.form not in FORMS:
            raise UnknownNameError("form of adamix", self.form, FORMS)
        at_least("experts", self.experts, 2)
        at_least("consistency", self.consistency, 0)
        between("std", self.std, 0, float("inf"))
        for name in ("bottleneck", "rank"):
            at_least(name, getattr(self, name), 1)
        check_activation(self.activation)


class AdaMix(Method):
    Config = AdaMixConfig
    learning_rate = 2e-3

    def attach(self, host: Host) -> None:
        c, d = self.config, host.anatomy.d
        self.updates: dict = {}
        self.experts: list[Experts] = []
        for site in host.anatomy.sites(c.targets if c.form == "lora" else ("ffn.down",)):
            if c.form == "lora":
                check_rank(c.rank, site)
                sizes = site.in_features, site.out_features
                child = self.updates[site] = MixedLowRank(*sizes, c.rank, c.alpha / c.rank, c.experts, c.dropout)
                self.experts.append(child.experts)
            else:
                child = Sequential(d, c.bottleneck, c.activation, dropout=c.dropout)
                nn.init.normal_(child.up.weight, std=c.std)
                child.down = Experts(d, c.bottleneck, c.experts, c.std)
                self.experts.append(child.down)
            host.after(site, "adamix", child)

    def penalty(self, forward: ForwardPass) -> torch.Tensor | None:
        if not self.config.consistency or self.experts[0].count == 1:
            return None
        p, q = (self._log_probabilities(out) for out in (forward.logits(), forward.logits(forward.replay())))
        both = F.kl_div(q, p.detach(), log_target=True, reduction="none") + F.kl_div(
            p, q.detach(), log_target=True, reduction="none"
        )
        rows = both.sum(dim=-1)
        labels = forward.labels
        if rows.dim() > 1 and labels is not None:
            if self.host.anatomy.stacks == ("decoder",):  # label t + 1 belongs to output t
                rows, labels = rows[:, :-1], labels[:, 1:]
            asked = (labels != -100).to(rows.dtype)
            return self.config.consistency / 2 * (rows * asked).sum() / asked.sum().clamp(min=1)
        return self.config.consistency / 2 * rows.mean()

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

    def merge(self) -> None:
        for site, child in self.updates.items():
            add_to_weight(site, child.delta())
