r"""AdapterFusion: frozen adapters of several tasks, whose outputs an attention mixes for a new task (additive).

.. math:: o = h + \sum_n \mathrm{softmax}_n\bigl((W_Q h + b_Q)^\top (W_K z_n + b_K)\bigr)\, W_V z_n

Shapes, with b rows of t tokens and N sources: h (b, t, d), what the adapters read; z_n (b, t, d), what adapter n would
add; W_Q, W_K, W_V (d, d). W_Q and W_K start from N(0, 0.02^2) and W_V from the identity with 1e-6 elsewhere, so that
the start is a mix of the adapters: not the backbone's output. Trained: 3 d^2 + 2 d at each place of an adapter; stored
with the adapters, so that a file needs nothing else. No merge: the mix depends on the input. W_V is kept near the
identity by the penalty 0.01 ||W_V - I||^2.

Stage 1 is training the ``sources``, adapters of one kind: ``adapter_drop`` with ``robust=False`` is the paper's adapter
(Pfeiffer's, one a layer); sequential, parallel and residual adapters work too, sequential ones without ``train_norms``.
Bottlenecks may differ. Stage 2 trains the fusion and leaves them bit-identical. The sources' task heads are not used:
the target trains one of its own.

Source: Pfeiffer et al. 2021, arXiv:2005.00247; biases, start, penalty and the dropout of the attention's scores, at the
rate of BERT's own attention, are those of their library, which adds the penalty's gradient behind a step, so that it
counts in the next one. ``adapters`` 1.3 with the same weights gives the same states (``tests/golden``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from peftlib.mechanisms.host import Host
from peftlib.mechanisms.precision import cast
from peftlib.methods.base import ConfigError, ForwardPass, Method, MethodConfig, SavedAdapter, at_least
from peftlib.methods.bases.sources import attach_source


@dataclass(frozen=True)
class AdapterFusionConfig(MethodConfig):
    """``regularization``: weight of the penalty; ``dropout`` on the attention's scores (None: the backbone's
    ``attention_probs_dropout_prob``, 0 where its config has none)."""

    regularization: float = 0.01
    dropout: float | None = None

    def __post_init__(self):
        at_least("regularization", self.regularization, 0)
        at_least("dropout", self.dropout or 0, 0)


class FusedAdapters(nn.Module):
    """Adapters of one class, side by side in the place of one: what each would add, mixed by attention."""

    active = True

    def __init__(self, adapters: list[nn.Module], d: int, dropout: float):
        super().__init__()
        self.adapters = nn.ModuleList(adapters).requires_grad_(False)
        self.query, self.key = nn.Linear(d, d), nn.Linear(d, d)
        self.value = nn.Linear(d, d, bias=False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        for linear in (self.query, self.key):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.constant_(self.value.weight, 1e-6)
        with torch.no_grad():
            self.value.weight.fill_diagonal_(1.0)

    def delta(self, h: torch.Tensor) -> torch.Tensor:
        """What is added for h, both (b, t, d)."""
        z = torch.stack([adapter.delta(h) for adapter in self.adapters], dim=-2)  # N of (b, t, d) -> (b, t, N, d)
        q = self.query(cast(h, self.query.weight))  # (b, t, d)
        scores = (q[..., None, :] * self.key(z)).sum(-1)  # (b, t, N, d) -> (b, t, N)
        a = torch.softmax(self.dropout(scores), dim=-1)  # (b, t, N)
        return (a[..., None, :].to(z.dtype) @ self.value(z).to(z.dtype))[..., 0, :]  # (b, t, N, d) -> (b, t, d)

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        # The adapters' own class says to what the delta is added.
        return type(self.adapters[0]).forward(self, *args)


class AdapterFusion(Method):
    Config = AdapterFusionConfig
    learning_rate = 5e-4
    source_methods = ("adapter_drop", "sequential_adapter", "parallel_adapter", "residual_adapter")

    def attach(self, host: Host) -> None:
        names = {id(module): name for name, module in host.model.named_modules()}
        found = [_adapters(host, source, names) for source in self.sources]
        for source, adapters in zip(self.sources, found):
            if list(adapters) != list(found[0]) or source.config.method != self.sources[0].config.method:
                raise ConfigError(
                    f"sources {self.sources[0].name!r} and {source.name!r} are of different methods or stand at "
                    "different places; fuse adapters of one kind"
                )
        dropout = self.config.dropout
        if dropout is None:
            dropout = getattr(host.anatomy.config, "attention_probs_dropout_prob", 0.0)
        places = iter(found[0])
        self.fused: list[FusedAdapters] = []

        def fused(_: nn.Module) -> nn.Module:
            place = next(places)
            side_by_side = [adapters[place] for adapters in found]
            self.fused.append(FusedAdapters(side_by_side, host.anatomy.d, dropout))
            return self.fused[-1]

        scope = host.scope(exchange=fused)
        attach_source(self.sources[0], scope)
        scope._exchange = None

    def hooks(self) -> tuple[str, ...]:
        return super().hooks() if self.config.regularization else ()

    def penalty(self, forward: ForwardPass) -> torch.Tensor:
        values = [fused.value.weight for fused in self.fused]  # each (d, d)
        distances = [(W_V - torch.eye(len(W_V), device=W_V.device)).square().sum() for W_V in values]
        return self.config.regularization * sum(distances)


def _adapters(host: Host, source: SavedAdapter, names: dict[int, str]) -> dict[str, nn.Module]:
    """Place -> the source's adapter there, as it was saved."""
    dry_run = host.dry_run()
    attach_source(source, dry_run)
    if dry_run.unfrozen:
        raise ConfigError(
            f"source {source.name!r} trains parameters of the backbone, which cannot stand side by side; train the "
            "sources with train_norms=False"
        )
    found = {}
    for module, name, child in dry_run.children:
        prefix = f"{names[id(module)]}.{name}."
        if source.state is not None:
            child.load_state_dict({n.removeprefix(prefix): t for n, t in source.own.items() if n.startswith(prefix)})
        found[prefix] = child
    return found
