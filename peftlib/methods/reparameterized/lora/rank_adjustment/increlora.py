r"""IncreLoRA: every matrix starts at rank one, and ranks grow where the update matters most, until a budget is spent.

.. math:: y = W x + \frac{\alpha}{r_k} \sum_j \lambda_{k,j} b_{k,j} a_{k,j}^\top x, \qquad
    S_k = \operatorname{mean} \Bigl|\Delta W_k \odot \frac{\partial \mathcal L}{\partial \Delta W_k}\Bigr|

Shapes: W (out, in), a (in,), b (out,), lambda a number; r_k active components in matrix k. a and b start N(0, 0.02) and
lambda at zero. Beside the active ones each matrix has a reserve of ``grow`` components, trained in advance with lambda
fixed at 1e-5 (the start is that near to the identity). The importance of a matrix is S_k, smoothed by ``beta1``, times
its smoothed deviation (``beta2``). In each round the ``top`` most important matrices turn their reserve into active
components and get a new reserve; what begins to train then has the learning-rate schedule for itself, from its warm-up
to the end of the training (:meth:`TrainingState.rate_since`). The last round takes no more than the rest of the budget,
so the ranks of n matrices add up to n ``target_rank`` exactly, and unused reserves are dropped. The loss also has
:math:`\gamma` times the mean distance of B^T B and A A^T from the identity. Merge: exact, as LoRA's.

An optimizer is built before training, so each matrix has room for all components that the rounds can bring it; the
count says how much is allocated. Only components in use have gradients, and only active ones are stored at the end.

Source: Zhang et al. 2023, arXiv:2308.12043, and its code (FeiyuZhang98/IncreLoRA). As there, the scale falls with 1 /
r_k when a rank grows, and a round's components have the schedule that is left, with as many steps of warm-up as the
whole training (``multi_lr`` in the scripts for CoLA, MRPC, RTE and SQuAD). ``alpha`` is 32 there on CoLA, MRPC, QNLI,
RTE and STS-B, and 16 on MNLI, QQP and SST-2; ``dropout`` 0 but for MNLI (0.2), MRPC (0.3) and SST-2 (0.1), as the
scripts for ``target_rank`` 2 have it; ``grow`` is 1, 2, 3, 4 for ``target_rank`` 2, 4, 6, 8. The rounds are in shares
of the steps; the scripts start after 1 to 3 % and end after 20 to 65 %. Where we differ from the code: S_k is the
paper's mean, not the sum over the root of the size; the distance is taken over all components of a matrix as the paper
writes it, where the code takes each component alone (its norm); ties and the last round cannot miss the budget; Adam
counts steps a matrix, not a component. The growth forms every update and its gradient at full size while it lasts, with
dropout before it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from peftlib.anatomy import Site
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import sites_of_rank
from peftlib.mechanisms.precision import cast
from peftlib.mechanisms.triplets import Triplets, only_kept, spread
from peftlib.methods.base import ConfigError, ForwardPass, MethodConfig, TrainingState, at_least, between
from peftlib.methods.bases.low_rank import LowRankUpdates


@dataclass(frozen=True)
class IncreLoRAConfig(MethodConfig):
    """``target_rank``, the mean rank at the end; ``alpha`` (at rank r the scale is alpha / r); ``targets`` (site
    patterns); ``top`` matrices that grow in a round and by how much, ``grow``; ``initial_warmup`` before the first
    round and ``growth_end`` by which the budget is spent (shares of the steps); ``part_warmup`` of what begins later
    (share of the steps; None: as many as the training's own); ``beta1`` and ``beta2`` of the smoothing;
    ``orthogonality`` gamma; ``dropout`` on the update's input."""

    target_rank: int = 2
    alpha: float = 32.0
    targets: tuple[str, ...] | str = "all-linear"
    top: int = 12
    grow: int = 1
    initial_warmup: float = 0.03
    growth_end: float = 0.5
    part_warmup: float | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.1
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("target_rank", "top", "grow"):
            at_least(name, getattr(self, name), 1)
        for name in ("initial_warmup", "orthogonality", "dropout"):
            at_least(name, getattr(self, name), 0)
        if self.part_warmup is not None:
            at_least("part_warmup", self.part_warmup, 0)
        for name in ("growth_end", "beta1", "beta2"):
            between(name, getattr(self, name), 0, 1)
        if self.initial_warmup > self.growth_end:
            raise ConfigError(
                f"initial_warmup={self.initial_warmup} is above growth_end={self.growth_end}: no steps to grow in"
            )

    def rounds(self, matrices: int) -> int:
        """How many rounds spend the budget of so many matrices."""
        return math.ceil(matrices * (self.target_rank - 1) / (min(self.top, matrices) * self.grow))

    def budget(self, step: int, total: int, matrices: int) -> int:
        """How many components may be active after ``step`` of ``total`` steps."""
        first, last = round(self.initial_warmup * total), round(self.growth_end * total)
        done = 1.0 if step >= last else max(0, step - first) / max(1, last - first)
        ready = int(done * self.rounds(matrices) + 1e-9) * min(self.top, matrices) * self.grow
        return min(matrices * self.target_rank, matrices + ready)


class Growing(Triplets):
    """``forward(x, y) = y + alpha / r * P Lambda Q x`` with r active triplets; the others wait, so that the rank can
    grow while an optimizer that was built at the start goes on.

    The columns of P (out, capacity) are the b, the rows of Q (capacity, in) the a, ``singular`` (capacity,) the lambda.
    ``kept`` (capacity,) marks those in use; of these ``reserve`` marks the ones that are trained in advance, with a
    fixed tiny singular value. A triplet that waits is zero and has no gradient. With ``measures`` set, a training
    forward forms the update dW, as large as the weight, and backward leaves mean |dW * its gradient| in
    ``importance.grad`` or, where a step has several passes, adds the gradient to ``gathered`` (out, in).
    """

    RESERVED = 1e-5
    gathered: torch.Tensor | None = None

    def __init__(
        self, in_features: int, out_features: int, capacity: int, alpha: float, dropout: float = 0.0, std: float = 0.02
    ):
        super().__init__(in_features, out_features, capacity, 1.0, dropout)
        self.alpha, self.std, self.measures = alpha, std, True
        self.register_buffer("reserve", torch.zeros(capacity, dtype=torch.bool))
        self.register_buffer("importance", torch.zeros(()).requires_grad_(), persistent=False)
        self.kept.fill_(False)
        with torch.no_grad():
            self.P.zero_()
            self.Q.zero_()

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.importance = self.importance.detach().requires_grad_()  # a leaf again after a change of dtype or device
        return self

    @property
    def active(self) -> torch.Tensor:
        return self.kept & ~self.reserve

    def weights(self) -> torch.Tensor:
        trained = torch.where(self.reserve, self.singular.detach(), self.singular)  # (capacity,)
        return trained * self.kept * (self.alpha / self.active.sum())  # (capacity,)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not (self.training and self.measures):
            return super().forward(x, y)
        dW = (self.P * self.weights()) @ self.Q  # (out, capacity) (capacity, in) -> (out, in)
        dW = _Measure.apply(dW, self.importance, self.gathered)
        return y + F.linear(cast(self.dropout(x), self.Q), dW).to(y.dtype)  # (..., in) -> (..., out)

    def begin(self, passes: int) -> None:
        """Before the first of a step's passes: measure anew."""
        self.importance.grad = None
        self.gathered = self.importance.new_zeros(len(self.P), self.Q.shape[1]) if passes > 1 else None

    def measured(self) -> torch.Tensor:
        """S, mean |dW * its gradient|, of the passes since :meth:`begin`."""
        S, self.importance.grad = self.importance.grad, None
        if self.gathered is not None:
            S = (self.delta().to(self.importance) * self.gathered).abs().mean()  # (out, in) -> ()
        return self.importance.new_zeros(()) if S is None else S

    def _identity(self) -> torch.Tensor:
        return torch.diag(self.kept.to(self.P.dtype))

    @torch.no_grad()
    def start(self, places: torch.Tensor, reserve: bool) -> None:
        """Take waiting triplets into use: P and Q from N(0, std), drawn on the CPU, and singular values 0 or, in
        reserve, 1e-5."""
        for tensor in (self.P.T, self.Q):
            drawn = self.std * torch.randn(len(places), tensor.shape[1], device="cpu")
            tensor[places] = drawn.to(tensor)
        self.singular[places] = self.RESERVED if reserve else 0.0
        self.kept[places] = True
        self.reserve[places] = reserve

    @torch.no_grad()
    def drop(self, places: torch.Tensor) -> None:
        """Put triplets out of use."""
        for tensor in (self.P.T, self.Q, self.singular):
            tensor[places] = 0
        self.kept[places] = False
        self.reserve[places] = False


class IncreLoRA(LowRankUpdates):
    Config = IncreLoRAConfig
    learning_rate = 1e-2
    child = "increlora"
    restarts = True

    def targets(self, host: Host) -> list[Site]:
        return sites_of_rank(host, self.config.targets, self.config.target_rank)

    def update(self, site: Site) -> Growing:
        c = self.config
        room = 1 + c.grow * max(1, c.rounds(self.matrices))
        capacity = min(room, site.in_features, site.out_features)
        update = Growing(site.in_features, site.out_features, capacity, c.alpha, c.dropout)
        update.start(torch.tensor([0]), reserve=False)
        if c.target_rank > 1:
            update.start(torch.arange(1, capacity)[: c.grow], reserve=True)
        update.measures = c.target_rank > 1
        return update

    def attach(self, host: Host) -> None:
        self.matrices = len(self.targets(host))
        super().attach(host)
        self._restart(dict.fromkeys(map(str, self.updates), 1))

    def ranks(self) -> dict[str, int]:
        """Site -> how many of its components are active."""
        return {str(site): int(update.active.sum()) for site, update in self.updates.items()}

    def penalty(self, forward: ForwardPass) -> torch.Tensor:
        norms = [norm for update in self.updates.values() for norm in update.orthogonality()]
        return self.config.orthogonality * torch.stack(norms).mean()

    def _restart(self, ranks: dict[str, int]) -> None:
        shape = len(self.updates)
        self.sensitivity, self.uncertainty = torch.zeros(shape), torch.zeros(shape)
        # The step from which a component's vectors and its singular value train, (2, capacity); -inf: no warm-up.
        self.born = {u: torch.full((2, len(u.singular)), -math.inf) for u in self.updates.values()}
        self.before: dict = {}
        self.trace = [(0, ranks)]

    def _measures(self) -> bool:
        return next(iter(self.updates.values())).measures

    def counts_passes(self, training: TrainingState) -> bool:
        return self._measures()

    def on_step_start(self, training: TrainingState) -> None:
        if training.step == 0:
            self._restart(self.ranks())
        if self._measures():
            for update in self.updates.values():
                update.begin(training.accumulation)

    @torch.no_grad()
    def on_gradients(self, training: TrainingState) -> None:
        updates = list(self.updates.values())
        if self._measures():
            scores = torch.stack([update.measured() for update in updates]) / training.loss_scale  # S, (n,)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(scores)
            scores = scores.float().cpu()
            self.sensitivity.lerp_(scores, 1 - self.config.beta1)
            self.uncertainty.lerp_((scores - self.sensitivity).abs(), 1 - self.config.beta2)
        rate = self._rate(training)
        for update in updates:
            vectors, values = _rates(self.born[update], rate)
            if bool((vectors != 1).any() | (values != 1).any()):
                pairs = ((update.P, vectors), (update.Q, vectors[:, None]), (update.singular, values))
                self.before[update] = [(p, p.detach().clone(), rate.to(p)) for p, rate in pairs]

    def _rate(self, training: TrainingState) -> Callable[[float], float]:
        """By the step at which something began to train: the factor of the optimizer's learning rate, at this step."""
        share, main = self.config.part_warmup, training.rate()
        rising = None if share is None else round(share * training.total)
        return functools.cache(lambda start: training.rate_since(int(start), rising) / main if main else 0.0)

    @torch.no_grad()
    def on_step_end(self, training: TrainingState) -> None:
        for tensors in self.before.values():
            for parameter, before, rate in tensors:
                parameter.copy_(torch.where(rate == 1, parameter, before + rate * (parameter - before)))
        self.before = {}
        if not self._measures():
            return
        step = training.step + 1
        budget = self.config.budget(step, training.total, len(self.updates))
        spent = start = sum(self.ranks().values())
        while spent < budget:
            spent += self._round(budget - spent, step)
        if spent > start:
            self.trace.append((step, self.ranks()))
        if spent == self.config.target_rank * len(self.updates):
            for update in self.updates.values():
                update.drop(update.reserve.nonzero().flatten())
                update.measures = False

    def _round(self, left: int, step: int) -> int:
        """Activate the reserves of the most important matrices that have room, at most ``left``; gives how many."""
        updates, given, grown = list(self.updates.values()), 0, 0
        for index in (self.sensitivity * self.uncertainty).argsort(descending=True, stable=True).tolist():
            update = updates[index]
            ready = update.reserve.nonzero().flatten()[: min(self.config.grow, left - given)]
            if len(ready):
                update.reserve[ready] = False
                self.born[update][1, ready.cpu()] = step
                waiting = (~update.kept).nonzero().flatten()[: len(ready)]
                update.start(waiting, reserve=True)
                self.born[update][0, waiting.cpu()] = step
                given, grown = given + len(ready), grown + 1
            if given == left or grown == self.config.top:
                break
        return given

    def run_state(self) -> dict[str, torch.Tensor]:
        born = {f"{path}.born": self.born[update] for path, update in self.named().items()}
        return born | {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}

    def load_run_state(self, state: dict[str, torch.Tensor]) -> None:
        self.sensitivity, self.uncertainty = state["sensitivity"].clone(), state["uncertainty"].clone()
        for path, update in self.named().items():
            self.born[update] = state[f"{path}.born"].clone()
        self._measure_while_growing()

    def _measure_while_growing(self) -> None:
        growing = any(bool(update.reserve.any()) for update in self.updates.values())
        for update in self.updates.values():
            update.measures = growing

    def state(self) -> dict[str, torch.Tensor]:
        return only_kept(self.host.state(), self.named())

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.host.load_state(spread(state, self.named()))
        self._measure_while_growing()


def _rates(born: torch.Tensor, rate: Callable[[float], float]) -> torch.Tensor:
    """The factors of vectors and singular values, (2, capacity): one for what trains from the start."""
    rates = torch.ones_like(born)
    for start in born[born.isfinite()].unique().tolist():
        rates[born == start] = rate(start)
    return rates


class _Measure(torch.autograd.Function):
    """The update dW as it is; its gradient G gives ``importance`` the gradient mean |dW * G|, or is added to
    ``gathered``."""

    @staticmethod
    def forward(dW: torch.Tensor, importance: torch.Tensor, gathered: torch.Tensor | None) -> torch.Tensor:
        return dW.view_as(dW)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: torch.Tensor) -> None:
        dW, importance, ctx.gathered = inputs
        ctx.save_for_backward(dW)
        ctx.dtype = importance.dtype

    @staticmethod
    def backward(ctx, G: torch.Tensor):
        (dW,) = ctx.saved_tensors
        if ctx.gathered is not None:
            ctx.gathered.add_(G)  # (out, in)
            return G, None, None
        return G, (dW.to(ctx.dtype) * G.to(ctx.dtype)).abs().mean(), None  # (out, in), ()
