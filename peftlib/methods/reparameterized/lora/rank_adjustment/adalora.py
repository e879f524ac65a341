r"""AdaLoRA: updates in the form of a singular value decomposition, pruned to one budget by importance.

.. math:: y = W x + \frac{\alpha}{r} P \Lambda Q x, \qquad
    \mathcal{L} + \gamma \operatorname{mean}_k \bigl(\|P_k^\top P_k - I\|_F, \|Q_k Q_k^\top - I\|_F\bigr)

Shapes: P (out, r), Lambda (r,), Q (r, in), r the *initial* rank also after pruning. P and Q start N(0, 0.02), Lambda at
zero, so the start is the identity. The layer is :class:`peftlib.mechanisms.triplets.Triplets`. Trained:
r (in + out + 1) a matrix; stored after training: the kept triplets and which ones they are. The update is linear and
merges exactly, as LoRA's.

A weight w with gradient g has importance :math:`\bar I \bar U`, where :math:`\bar I` smooths :math:`|w g|` with
``beta1`` and :math:`\bar U` smooths :math:`|\,|w g| - \bar I\,|` with ``beta2``; a triplet has its singular value's
plus the mean of its column's and its row's. For the first ``initial_warmup`` of the steps all n r triplets of the n
matrices stay; then the budget falls to n ``target_rank`` with the cube of the remaining time, and every ``interval``
steps the least important singular values of all matrices together are set to zero. In the last ``final_warmup`` of the
steps the choice is fixed and held by setting them to zero after every step.

Source: Zhang et al. 2023, arXiv:2303.10512, and its code, whose scripts all adapt the six maps of a layer (on
BART those of cross-attention too): all linear maps, the default. Ranks and alpha are those of its readme's example
(SQuAD), gamma 0.1 and both betas 0.85 those of nearly all scripts. Where we differ: importance is read before the
optimizer's step, as in the paper's algorithm (the code multiplies updated weights with older gradients); ties go by
position, so the ranks add up to the budget exactly (the code's threshold can miss it); the scale is alpha / r without
its 1e-5. The orthogonality terms are norms, not their squares, as in the code, whose weight of 0.1 is the default (HF
peft: 0.5). The schedule is given in shares of the steps; the code's scripts have 0.08 to 0.18 and 0.31 to 0.58.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peftlib.anatomy import Site
from peftlib.errors import LoadError
from peftlib.mechanisms.triplets import Triplets, only_kept, spread
from peftlib.methods.base import ConfigError, ForwardPass, Method, MethodConfig, TrainingState, at_least, between
from peftlib.methods.bases import hf_peft
from peftlib.methods.bases.low_rank import LowRankUpdates


@dataclass(frozen=True)
class AdaLoRAConfig(MethodConfig):
    """``rank`` initial rank of every matrix, ``target_rank`` their mean rank at the end, ``alpha`` (the scale is
    alpha / rank), ``targets`` (site patterns), ``dropout`` on the update's input, ``initial_warmup`` and
    ``final_warmup`` (shares of the steps), ``interval`` of steps between prunings, ``beta1`` and ``beta2`` of the
    smoothing, ``orthogonality`` gamma."""

    rank: int = 12
    target_rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | str = "all-linear"
    dropout: float = 0.0
    initial_warmup: float = 0.15
    final_warmup: float = 0.5
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.1

    def __post_init__(self):
        for name in ("rank", "target_rank", "interval"):
            at_least(name, getattr(self, name), 1)
        for name in ("initial_warmup", "final_warmup", "orthogonality"):
            at_least(name, getattr(self, name), 0)
        between("beta1", self.beta1, 0, 1)
        between("beta2", self.beta2, 0, 1)
        if self.target_rank > self.rank:
            raise ConfigError(f"target_rank={self.target_rank} is above the initial rank={self.rank}; ranks only fall")
        if self.initial_warmup + self.final_warmup >= 1:
            raise ConfigError(
                f"initial_warmup={self.initial_warmup} and final_warmup={self.final_warmup} leave no steps to prune "
                "in; their sum must be below 1"
            )

    def budget(self, step: int, total: int, initial: int, target: int) -> int:
        """How many triplets may stay after ``step`` of ``total`` steps."""
        first, last = round(self.initial_warmup * total), total - round(self.final_warmup * total)
        if step <= first:
            return initial
        if step >= last:
            return target
        return target + int((initial - target) * (1 - (step - first) / (last - first)) ** 3)


_WEIGHTS, _KINDS = ("singular", "P", "Q"), ("sensitivity", "uncertainty")


STEPS = 1000
"""The length of training of which files for HF peft give the schedule's shares."""


class _Files(hf_peft.Updates):
    """HF peft's files hold the triplets that count, and ``rank_pattern`` says which of the initial ones they are. Its
    scale is alpha / (r + 1e-5); the difference goes into the singular values.

    All maps have one initial rank there, and the parts of a map that it sees whole have their triplets one behind the
    other, each with rows in one part.
    """

    def fitting(
        self, settings: dict, path: str, first: Site, whole: dict[str, torch.Tensor], folder: object
    ) -> dict[str, torch.Tensor]:
        rank = settings["init_r"]
        mask = (settings["rank_pattern"] or {}).get(f"{path}.lora_E", [True] * rank)
        kept = torch.tensor(mask, dtype=torch.bool)
        P, singular, Q = whole["P"], whole["singular"].flatten(), whole["Q"]
        sizes = {len(Q), len(singular), P.shape[1]}
        if sizes != {int(kept.sum())} or len(kept) != rank:
            raise LoadError(
                f"{folder} says that {int(kept.sum())} of {rank} triplets of {path} count, and holds {sorted(sizes)}"
            )
        P, singular, Q, kept = Triplets.spread(P, singular * (rank / (rank + 1e-5)), Q, kept)
        return {"P": P, "singular": singular, "Q": Q, "kept": kept}

    def parts(self, sites: list[Site], whole: dict[str, torch.Tensor]) -> hf_peft.Values:
        by_rows = super().parts(sites, whole)
        own = {site: found["P"].any(dim=0) for site, found in by_rows.items()}  # (r,) each
        if len(sites) == 1 or torch.stack(list(own.values())).sum(dim=0)[whole["kept"]].ne(1).any():
            return by_rows
        return {
            site: found
            | {"kept": own[site], "singular": found["singular"] * own[site], "Q": found["Q"] * own[site][:, None]}
            for site, found in by_rows.items()
            if own[site].any()
        }

    def more_options(self, settings: dict, values: hf_peft.Values, folder: object) -> dict:
        total = settings["total_step"]
        shares = {"initial_warmup": settings["tinit"], "final_warmup": settings["tfinal"]} if total else {}
        return {name: steps / total for name, steps in shares.items()}

    def whole(self, attribute: str, updates: dict[Site, Triplets]) -> torch.Tensor:
        kept = [
            getattr(update, attribute) if update.kept.all() else update.only_kept()[attribute]
            for update in updates.values()
        ]
        if attribute == "singular":
            return torch.cat(kept)[:, None]
        if attribute == "Q":
            return torch.cat(kept)
        first = next(iter(updates))
        P = kept[0].new_zeros(first.out_features * (first.part or (0, 1))[1], sum(p.shape[1] for p in kept))
        column = 0
        for site, p in zip(updates, kept):
            P[site.rows, column : column + p.shape[1]] = p
            column += p.shape[1]
        return P

    def write(self, method: Method) -> tuple[dict, dict]:
        settings, tensors = super().write(method)
        rank = settings["init_r"]
        for name in tensors:
            if name.endswith(".lora_E"):
                tensors[name] = tensors[name] * ((rank + 1e-5) / rank)
        return settings, tensors

    def more_settings(self, method: Method) -> dict:
        c, modules = method.config, hf_peft.by_module(method.updates)
        rank = c.rank * max(len(updates) for updates in modules.values())
        counts = {path: sum(int(u.kept.sum()) for u in updates.values()) for path, updates in modules.items()}
        pattern = {f"{path}.lora_E": [i < count for i in range(rank)] for path, count in counts.items()}
        return {
            "init_r": rank,
            "lora_alpha": c.alpha * rank / c.rank,
            "rank_pattern": pattern if set(counts.values()) != {rank} else None,
            "total_step": STEPS,
            "tinit": round(c.initial_warmup * STEPS),
            "tfinal": round(c.final_warmup * STEPS),
            "fan_in_fan_out": any(site.transposed for site in method.updates),
        }


class AdaLoRA(LowRankUpdates):
    Config = AdaLoRAConfig
    learning_rate = 1e-2
    child = "adalora"
    hf_peft = _Files(
        kind="ADALORA",
        tensors={"lora_A": "Q", "lora_B": "P", "lora_E": "singular"},
        rows=("P",),
        options={
            "init_r": "rank",
            "target_r": "target_rank",
            "lora_alpha": "alpha",
            "lora_dropout": "dropout",
            "deltaT": "interval",
            "beta1": "beta1",
            "beta2": "beta2",
            "orth_reg_weight": "orthogonality",
        },
        used={
            "init_r": 12,
            "target_r": 8,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "rank_pattern": None,
            "deltaT": 1,
            "beta1": 0.85,
            "beta2": 0.85,
            "orth_reg_weight": 0.5,
            "tinit": 0,
            "tfinal": 0,
            "total_step": None,
        },
        # HF peft's AdaLoRA takes no heed of these.
        unused=(*hf_peft.LORA_UNUSED, "r", "use_rslora", "alpha_pattern", "init_lora_weights"),
        refused=hf_peft.LORA_REFUSED,
    )

    def __init__(self, config: AdaLoRAConfig):
        super().__init__(config)
        self.trace: list[tuple[int, dict[str, int]]] = []
        """The history of ranks: from each of its steps on, these triplets were not zero."""
        self.smooth: dict[Triplets, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.fixed = False

    def update(self, site: Site) -> Triplets:
        c = self.config
        return Triplets(site.in_features, site.out_features, c.rank, c.alpha / c.rank, c.dropout)

    def ranks(self) -> dict[str, int]:
        """Site -> how many of its triplets count."""
        return {str(site): int(update.kept.sum()) for site, update in self.updates.items()}

    def penalty(self, forward: ForwardPass) -> torch.Tensor:
        norms = [norm for update in self.updates.values() for norm in update.orthogonality()]
        return self.config.orthogonality * torch.stack(norms).mean()

    def on_step_start(self, training: TrainingState) -> None:
        if training.step == 0:
            self._restart()

    @torch.no_grad()
    def on_gradients(self, training: TrainingState) -> None:
        last = training.total - round(self.config.final_warmup * training.total)
        if training.step + 1 >= last and self.smooth:
            return
        for update in self.updates.values():
            weights = [getattr(update, name) for name in _WEIGHTS]
            if update not in self.smooth:
                self.smooth[update] = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
            for weight, (sensitivity, uncertainty) in zip(weights, self.smooth[update]):
                now = torch.zeros_like(weight) if weight.grad is None else (weight * weight.grad).abs()  # |w g|
                sensitivity.lerp_(now, 1 - self.config.beta1)
                uncertainty.lerp_((now - sensitivity).abs(), 1 - self.config.beta2)

    def on_step_end(self, training: TrainingState) -> None:
        step, total = training.step + 1, training.total
        target = self.config.target_rank * len(self.updates)
        initial = sum(len(update.singular) for update in self.updates.values())
        budget = self.config.budget(step, total, initial, min(target, initial))
        if step >= total - round(self.config.final_warmup * total):
            if not self.fixed:
                for update, kept in zip(self.updates.values(), self._most_important(budget)):
                    update.kept.copy_(kept)
                self.fixed = True
            self._prune([update.kept for update in self.updates.values()], step)
        elif budget < initial and step % self.config.interval == 0:
            self._prune(self._most_important(budget), step)

    def on_train_end(self) -> None:
        self.smooth.clear()

    def run_state(self) -> dict[str, torch.Tensor]:
        return {
            f"{path}.{weight}.{kind}": tensor
            for path, update in self.named().items()
            for weight, pair in zip(_WEIGHTS, self.smooth.get(update, ()))
            for kind, tensor in zip(_KINDS, pair)
        }

    def load_run_state(self, state: dict[str, torch.Tensor]) -> None:
        for path, update in self.named().items() if state else ():
            self.smooth[update] = [
                tuple(state[f"{path}.{weight}.{kind}"].to(self.host.device) for kind in _KINDS) for weight in _WEIGHTS
            ]

    def _restart(self) -> None:
        self.fixed = False
        self.smooth.clear()
        for update in self.updates.values():
            update.kept.fill_(True)
        self.trace = [(0, self.ranks())]

    def _most_important(self, budget: int) -> list[torch.Tensor]:
        """For each matrix a mask (r,) of its triplets; ``budget`` of all are true, the first ones where scores are
        equal."""
        scores = []
        for update in self.updates.values():
            # The importance of each weight: (r,), (out, r), (r, in).
            singular, P, Q = (sensitivity * uncertainty for sensitivity, uncertainty in self.smooth[update])
            scores.append(singular + P.mean(dim=0) + Q.mean(dim=1))  # -> (r,)
        order = torch.cat(scores).argsort(descending=True, stable=True)
        kept = torch.zeros_like(order, dtype=torch.bool)
        kept[order[:budget]] = True
        return list(kept.split([len(score) for score in scores]))

    @torch.no_grad()
    def _prune(self, kept: list[torch.Tensor], step: int) -> None:
        for update, mask in zip(self.updates.values(), kept):
            update.singular.masked_fill_(~mask, 0)
        ranks = dict(zip(map(str, self.updates), torch.stack([mask.sum() for mask in kept]).tolist()))
        if not self.trace or ranks != self.trace[-1][1]:
            self.trace.append((step, ranks))

    def state(self) -> dict[str, torch.Tensor]:
        return only_kept(self.host.state(), self.named())

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.host.load_state(spread(state, self.named()))
