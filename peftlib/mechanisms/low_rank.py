"""A low-rank update beside a linear map: y + scale * B (A x). LoRA and its kin are this, with other lives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.anatomy import Site
from peftlib.errors import LoadError, TargetError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.precision import cast

Init = Literal["kaiming", "gaussian", "truncated"]


def check_rank(rank: int, site: Site) -> None:
    """Raise TargetError when no matrix of this site can have the rank."""
    largest = min(site.in_features, site.out_features)
    if not 1 <= rank <= largest:
        raise TargetError(
            f"rank {rank} does not fit {site} ({site.out_features} x {site.in_features}); "
            f"choose a rank from 1 to {largest}, or other targets"
        )


def update(y: torch.Tensor, down: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """``y + scale * B down`` for ``down`` (n, rank), B (out, rank) and y (..., out) with n rows, in y's dtype."""
    if down.dtype != y.dtype:
        return y + (F.linear(down, B) * scale).to(y.dtype).view(y.shape)
    return torch.addmm(y.flatten(0, -2), down, B.T, alpha=scale).view(y.shape)


def thin(out_features: int, rank: int) -> torch.Tensor:
    """Memory for an (out, rank) matrix, column by column: the three products with it (forward, and both gradients) are
    then up to four times as fast on a CPU as in the usual order, because every one of them reads whole rows."""
    return torch.empty(rank, out_features).T


def factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B (out, rank) and A (rank, in) whose product is the best approximation of an (out, in) matrix, the singular
    values' roots in each, in float64.

    They come from the eigenvectors of the smaller Gram matrix, which takes a fraction of a whole decomposition's time.
    """
    matrix = matrix.double()
    wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if wide else matrix.T
    vectors = torch.linalg.eigh(short @ short.T).eigenvectors[:, -rank:].flip(1)
    scaled = vectors.T @ short
    roots = scaled.norm(dim=1).sqrt()
    left, right = vectors * roots, scaled / roots.clamp(min=1e-150)[:, None]
    return (left, right) if wide else (right.T, left.T)


class LowRank(nn.Module):
    """``forward(x, y) = y + scale * B A dropout(x)``.

    Shapes: x (..., in), y (..., out), A (rank, in), B (out, rank). A starts Kaiming-uniform with a = sqrt(5), as the
    original LoRA code has it, or N(0, std), cut off at two standard deviations or not; B starts at zero, so the start
    is the identity, or without ``zero_up`` from the cut-off normal distribution. With ``train_A=False`` A stays at its
    start, and the backward pass needs A x, (n, rank), instead of x.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        init: Init = "kaiming",
        std: float = 0.02,
        train_A: bool = True,
        zero_up: bool = True,
    ):
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, in_features), requires_grad=train_A)
        self.B = nn.Parameter(thin(out_features, rank).zero_())
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        if init == "kaiming":
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        elif init == "gaussian":
            nn.init.normal_(self.A, std=std)
        else:
            nn.init.trunc_normal_(self.A, std=std, a=-2 * std, b=2 * std)
        if not zero_up:
            nn.init.trunc_normal_(self.B, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = cast(self.dropout(x), self.A).flatten(0, -2)
        return update(y, F.linear(x, self.A), self.B, self.scale)

    def select(self, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None) -> None:
        """Keep these outputs (rows) or inputs (columns) only. An optimizer from before knows the old factors."""
        if rows is not None:
            B = thin(len(rows), self.B.shape[1]).to(self.B).copy_(self.B.detach()[rows])
            self.B = nn.Parameter(B, requires_grad=self.B.requires_grad)
        if columns is not None:
            self.A = nn.Parameter(self.A.detach()[:, columns], requires_grad=self.A.requires_grad)

    @property
    def delta_dtype(self) -> torch.dtype:
        return torch.promote_types(self.A.dtype, torch.float32)

    def delta(self) -> torch.Tensor:
        """The (out, in) update ``scale * B A``, formed in float32 or wider."""
        return self.scale * (self.B.detach().to(self.delta_dtype) @ self.A.detach().to(self.delta_dtype))


class Anchored(LowRank):
    """A :class:`LowRank` that remembers its factors of one moment, for a weight that follows the product's change from
    then on."""

    A_anchor: torch.Tensor
    B_anchor: torch.Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float):
        super().__init__(in_features, out_features, rank, scale)
        self.register_buffer("A_anchor", self.A.detach().clone())
        self.register_buffer("B_anchor", self.B.detach().clone())

    @torch.no_grad()
    def anchor(self) -> None:
        """Remember the present factors."""
        self.A_anchor.copy_(self.A)
        self.B_anchor.copy_(self.B)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of A and B."""
        return self.A.detach().clone(), self.B.detach().clone()

    def change(self, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """``delta()`` now less what it was for these factors, (out, in)."""
        return self.delta() - self.scale * (B.to(self.delta_dtype) @ A.to(self.delta_dtype))

    def moved(self) -> torch.Tensor:
        """The change of ``delta()`` since the anchor."""
        return self.change(self.A_anchor, self.B_anchor)


class Tangent(LowRank):
    """``forward(x, y) = y + scale * (B A_0 + B_0 (A - A_0)) dropout(x)``: the first-order expansion of a low-rank
    update around its own start (A_0, B_0), exactly linear in A and B.

    A starts as :class:`LowRank`'s, B at N(0, std_B). With a zero B_0 the expansion does not depend on A, which then is
    not trained and stays A_0.
    """

    A_0: torch.Tensor
    B_0: torch.Tensor

    def __init__(
        self, in_features: int, out_features: int, rank: int, scale: float, dropout: float = 0.0, std_B: float = 0.0
    ):
        super().__init__(in_features, out_features, rank, scale, dropout, train_A=std_B > 0)
        self.both = std_B > 0
        if self.both:
            nn.init.normal_(self.B, std=std_B)
            self.register_buffer("A_0", self.A.detach().clone())
            self.register_buffer("B_0", self.B.detach().clone())

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not self.both:
            return super().forward(x, y)
        x = cast(self.dropout(x), self.A).flatten(0, -2)
        y = update(y, F.linear(x, self.A_0), self.B, self.scale)
        return update(y, F.linear(x, self.A - self.A_0), self.B_0, self.scale)

    def start(self) -> dict[str, torch.Tensor]:
        """A_0 and B_0, by the names of what trains from there."""
        if self.both:
            return {"A": self.A_0, "B": self.B_0}
        return {"A": self.A, "B": torch.zeros_like(self.B)}

    def delta(self) -> torch.Tensor:
        if not self.both:
            return super().delta()
        A, A_0, B, B_0 = (t.detach().to(self.delta_dtype) for t in (self.A, self.A_0, self.B, self.B_0))
        return self.scale * (B @ A_0 + B_0 @ (A - A_0))


class Nested(LowRank):
    """``forward(x, y) = y + alpha / b * B[:, :b] (A[:b] x)``: an update that works at every rank b up to its own.

    In training b is what :meth:`draw` says, else what :meth:`choose` says; at first both are the full rank.
    """

    drawn: torch.Tensor
    chosen: torch.Tensor
    learns: torch.Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__(in_features, out_features, rank, 1.0, dropout)
        self.alpha = alpha
        # As tensors, so that a compiled graph serves every rank.
        for name in ("drawn", "chosen", "learns"):
            self.register_buffer(name, torch.ones(rank), persistent=False)
        self._reset()

    def _reset(self) -> None:
        for name in ("drawn", "chosen"):
            setattr(self, name, self._gate(len(self.A)))
        self.learns = torch.ones_like(self.drawn)

    def _gate(self, rank: int) -> torch.Tensor:
        gate = torch.zeros(len(self.A), dtype=self.A.dtype, device=self.A.device)
        gate[:rank] = self.alpha / rank
        return gate

    def draw(self, rank: int, only_last: bool = False) -> None:
        """Train at this rank; with ``only_last`` its components below the last are used and get no gradient."""
        self.drawn.copy_(self._gate(rank))
        self.learns.fill_(1)
        if only_last:
            self.learns[: rank - 1] = 0

    def choose(self, rank: int) -> None:
        """Compute at this rank outside of training, also in :meth:`delta`."""
        self.chosen.copy_(self._gate(rank))

    def cut(self, rank: int) -> None:
        """Drop the components above this rank."""
        columns = thin(len(self.B), rank).to(self.B).copy_(self.B.detach()[:, :rank])
        self.A = nn.Parameter(self.A.detach()[:rank].clone(), requires_grad=self.A.requires_grad)
        self.B = nn.Parameter(columns, requires_grad=self.B.requires_grad)
        self._reset()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.training:
            learns, gate = self.learns.bool(), self.drawn
            A = torch.where(learns[:, None], self.A, self.A.detach())
            B = torch.where(learns, self.B, self.B.detach())
        else:
            A, B, gate = self.A, self.B, self.chosen
        x = cast(self.dropout(x), A).flatten(0, -2)
        return update(y, F.linear(x, A) * gate, B, self.scale)

    def delta(self) -> torch.Tensor:
        """The (out, in) update at the chosen rank, formed in float32 or wider."""
        A, B, gate = (t.detach().to(self.delta_dtype) for t in (self.A, self.B, self.chosen))
        return (B * gate) @ A


class PooledLowRank(LowRank):
    """``forward(x, y) = y + scale * B A mean(dropout(x))``, the mean of every ``group`` neighbouring inputs.

    Shapes: x (..., in), y (..., out), A (rank, in / group), B (out, rank). A starts Xavier-uniform, B at zero. The
    update is the same for all inputs of a group.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, group: int, dropout: float = 0.0):
        super().__init__(in_features // group, out_features, rank, scale, dropout)
        self.group = group
        nn.init.xavier_uniform_(self.A)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.dropout(x).unflatten(-1, (-1, self.group)).mean(dim=-1)
        return update(y, F.linear(cast(x, self.A).flatten(0, -2), self.A), self.B, self.scale)

    def group_delta(self) -> torch.Tensor:
        """The (out, in / group) update of every weight of a group, in float32 or wider."""
        return super().delta() / self.group

    def delta(self) -> torch.Tensor:
        """The (out, in) update, formed in float32 or wider."""
        return self.group_delta().repeat_interleave(self.group, dim=1)


class HeadLowRank(nn.Module):
    """A low-rank update of each head's own: ``forward(x, y) = y + [B_h A_h x_h] + bias``.

    Shapes: x (..., in), y (..., out); A (heads, rank, in_h), B (heads, out_h, rank), bias (out,). With ``split_in`` a
    head sees its own part of x (in_h = in / heads), else all of it; with ``split_out`` it writes its own part of y
    (out_h = out / heads), else the heads' results add up. Everything starts from a normal distribution with ``std``,
    cut off at two standard deviations; or, with ``zero_up``, A as LoRA's and the rest at zero.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        heads: int,
        rank: int,
        split_in: bool,
        split_out: bool,
        bias: bool = True,
        dropout: float = 0.0,
        std: float = 0.01,
        zero_up: bool = False,
    ):
        super().__init__()
        self.split_in, self.split_out = split_in, split_out
        self.A = nn.Parameter(torch.empty(heads, rank, in_features // heads if split_in else in_features))
        self.B = nn.Parameter(torch.empty(heads, out_features // heads if split_out else out_features, rank))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
            if zero_up:
                nn.init.zeros_(parameter)
        if zero_up:
            nn.init.kaiming_uniform_(self.A.flatten(0, 1), a=math.sqrt(5))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = cast(self.dropout(x), self.A)
        if self.split_in:
            down = torch.einsum("...hi,hri->...hr", x.unflatten(-1, (len(self.A), -1)), self.A)
        else:
            down = F.linear(x, self.A.flatten(0, 1)).unflatten(-1, (len(self.A), -1))
        if self.split_out:
            change = torch.einsum("...hr,hor->...ho", down, self.B).flatten(-2)
        else:
            change = torch.einsum("...hr,hor->...o", down, self.B)
        if self.bias is not None:
            change = change + self.bias
        return y + change.to(y.dtype)

    def delta(self) -> torch.Tensor:
        """The (out, in) matrix of all heads, formed in float32 or wider; the bias is not in it."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        blocks = self.B.detach().to(dtype) @ self.A.detach().to(dtype)
        if self.split_in and self.split_out:
            return torch.block_diag(*blocks)
        return torch.cat(list(blocks), dim=0 if self.split_out else 1)


class Triplets(nn.Module):
    """``forward(x, y) = y + scale * P diag(singular) Q dropout(x)``: an update in the form of its own singular value
    decomposition, so that a rank can be taken away one triplet (column of P, singular value, row of Q) at a time.

    Shapes: x (..., in), y (..., out), P (out, rank), singular (rank,), Q (rank, in). P and Q start N(0, std), the
    singular values at zero, so the start is the identity. ``kept`` (rank,) marks the triplets that count.
    """

    kept: torch.Tensor

    def __init__(
        self, in_features: int, out_features: int, rank: int, scale: float, dropout: float = 0.0, std: float = 0.02
    ):
        super().__init__()
        self.P = nn.Parameter(thin(out_features, rank).normal_(std=std))
        self.singular = nn.Parameter(torch.zeros(rank))
        self.Q = nn.Parameter(torch.empty(rank, in_features).normal_(std=std))
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool))
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = cast(self.dropout(x), self.Q).flatten(0, -2)
        return update(y, F.linear(x, self.Q) * self.weights(), self.P, self.scale)

    def weights(self) -> torch.Tensor:
        """The (rank,) weights of the triplets."""
        return self.singular

    def delta(self) -> torch.Tensor:
        """The (out, in) update ``scale * P diag(singular) Q``, formed in float32 or wider."""
        dtype = torch.promote_types(self.P.dtype, torch.float32)
        P, weights, Q = (t.detach().to(dtype) for t in (self.P, self.weights(), self.Q))
        return self.scale * (P * weights) @ Q

    def orthogonality(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Frobenius norms of ``P^T P - I`` and ``Q Q^T - I``: 0 where the singular vectors are orthonormal."""
        one = self._identity()
        return torch.linalg.norm(self.P.T @ self.P - one), torch.linalg.norm(self.Q @ self.Q.T - one)

    def _identity(self) -> torch.Tensor:
        return torch.eye(len(self.singular), dtype=self.P.dtype, device=self.P.device)

    def only_kept(self) -> dict[str, torch.Tensor]:
        """``P``, ``singular`` and ``Q`` without the triplets that do not count."""
        if self.kept.is_meta:  # nothing was trained, so nothing was dropped
            return {"P": self.P, "singular": self.singular, "Q": self.Q}
        return {"P": self.P[:, self.kept], "singular": self.singular[self.kept], "Q": self.Q[self.kept]}

    @staticmethod
    def spread(
        P: torch.Tensor, singular: torch.Tensor, Q: torch.Tensor, kept: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The way back from :meth:`only_kept`: each triplet in its place, zeros where one was dropped, and ``kept``."""
        kept = kept.bool()
        places = kept.nonzero().flatten()
        if not len(places) == P.shape[-1] == len(singular) == len(Q):
            raise LoadError(
                f"the file keeps {len(places)} triplets and holds {P.shape[-1]} columns, {len(singular)} singular "
                f"values and {len(Q)} rows; it is not what save() wrote"
            )
        return (
            P.new_zeros(len(P), len(kept)).index_copy(1, places, P),
            singular.new_zeros(len(kept)).index_copy(0, places, singular),
            Q.new_zeros(len(kept), Q.shape[-1]).index_copy(0, places, Q),
            kept,
        )


class _Weigh(torch.autograd.Function):
    """The update as it is; its gradient G gives the meter the gradient mean |update * G|."""

    @staticmethod
    def forward(delta: torch.Tensor, meter: torch.Tensor) -> torch.Tensor:
        return delta.view_as(delta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        delta, meter = inputs
        ctx.save_for_backward(delta)
        ctx.dtype = meter.dtype

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (delta,) = ctx.saved_tensors
        return gradient, (delta.to(ctx.dtype) * gradient.to(ctx.dtype)).abs().mean()


class Growing(Triplets):
    """:class:`Triplets` of which some are in use and the others wait, so that the rank can grow while an optimizer that
    was built at the start goes on: ``forward(x, y) = y + alpha / r * P diag(singular) Q x`` with r active triplets.

    ``kept`` (capacity,) marks those in use; of these ``reserve`` marks the ones that are trained in advance, with a
    fixed tiny singular value. A triplet that waits is zero, takes part in nothing and has no gradient. While
    ``weighed`` is set a training forward forms the update, as large as the weight, and backward leaves
    mean |update * its gradient| in ``meter.grad``.
    """

    RESERVED = 1e-5

    reserve: torch.Tensor
    meter: torch.Tensor

    def __init__(self, in_features: int, out_features: int, capacity: int, alpha: float, std: float = 0.02):
        super().__init__(in_features, out_features, capacity, 1.0)
        self.alpha, self.std, self.weighed = alpha, std, True
        self.register_buffer("reserve", torch.zeros(capacity, dtype=torch.bool))
        self.register_buffer("meter", torch.zeros(()).requires_grad_(), persistent=False)
        self.kept.fill_(False)
        with torch.no_grad():
            self.P.zero_()
            self.Q.zero_()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.meter = self.meter.detach().requires_grad_()  # a leaf again after a change of dtype or device
        return self

    @property
    def active(self) -> torch.Tensor:
        return self.kept & ~self.reserve

    def weights(self) -> torch.Tensor:
        trained = torch.where(self.reserve, self.singular.detach(), self.singular)
        return trained * self.kept * (self.alpha / self.active.sum())

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not (self.training and self.weighed):
            return super().forward(x, y)
        delta = _Weigh.apply((self.P * self.weights()) @ self.Q, self.meter)
        return y + F.linear(cast(x, self.Q), delta).to(y.dtype)

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


def add_to_weight(site: Site, delta: torch.Tensor) -> None:
    """Fold an (out, in) update into a site's weight, rounding once."""
    with torch.no_grad():
        weight = site.weight
        weight.copy_((weight.to(delta.dtype) + delta).to(weight.dtype))


def triplets(host: Host) -> dict[str, Triplets]:
    """The updates of this form among a host's children, by name in the model."""
    return {path: child for path, child in host.paths().items() if isinstance(child, Triplets)}


def kept_state(host: Host) -> dict[str, torch.Tensor]:
    """What the host stores, without the triplets that do not count."""
    state = host.state()
    for path, update in triplets(host).items():
        state.update({f"{path}.{name}": tensor.detach() for name, tensor in update.only_kept().items()})
    return state


def load_kept(host: Host, state: dict[str, torch.Tensor]) -> None:
    """The way back from :func:`kept_state`. Raises LoadError where it does not fit."""
    state = dict(state)
    for path, update in triplets(host).items():
        names = [f"{path}.{name}" for name in ("P", "singular", "Q", "kept")]
        if all(name in state for name in names):
            state.update(zip(names, update.spread(*(state[name] for name in names))))
    host.load_state(state)
