r"""ProPETL's layers: a prototype that places share, seen through masks, :math:`\theta_\ell = \theta \odot M_\ell`.

Letters in shapes: b rows, t tokens, d hidden size, r bottleneck or rank, m positions of a prefix, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.mechanisms import bits
from peftlib.mechanisms.attention import Inputs
from peftlib.mechanisms.bottleneck import Bottleneck
from peftlib.mechanisms.host import Tasks
from peftlib.mechanisms.low_rank import LowRank, update
from peftlib.mechanisms.precision import cast
from peftlib.mechanisms.prefix import Prefix


def top(scores: torch.Tensor, share: float) -> torch.Tensor:
    """The mask of the largest entries, all but floor((1 - share) * numel) of them, in the scores' shape."""
    k, flat = scores.numel() - int((1 - share) * scores.numel()), scores.flatten()
    return torch.zeros_like(flat, dtype=torch.bool).scatter(0, flat.topk(k).indices, True).view(scores.shape)


class TopMask(nn.Module):
    """``forward(theta) = theta * M`` with M the mask of the largest ``|S|``; the gradient of S is that of M.

    The scores S have the tensor's shape and start uniform in (-1, 1) / sqrt(fan), which is torch's Kaiming-uniform
    start with a = sqrt(5); ``fan`` None: the last of the tensor's sizes. They train until :meth:`deploy` puts a fixed
    mask in their place.
    """

    def __init__(self, shape: Sequence[int], share: float, fan: int | None = None):
        super().__init__()
        self.shape = tuple(shape)
        self.share = share
        bound = 1 / math.sqrt(self.shape[-1] if fan is None else fan)
        self.scores = nn.Parameter(torch.empty(self.shape).uniform_(-bound, bound))
        self.register_buffer("fixed", None, persistent=False)

    def mask(self) -> torch.Tensor:
        """M, boolean."""
        return top(self.scores.detach().abs(), self.share) if self.fixed is None else self.fixed

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """M as zeros and ones that pass gradients to the scores."""
        M = self.mask().to(dtype)
        if self.fixed is None:
            size = self.scores.abs()
            M = M + (size - size.detach())
        return M

    def forward(self, theta: torch.Tensor) -> torch.Tensor:
        return theta * self.values(theta.dtype)  # the tensor's shape

    def pack(self) -> torch.Tensor:
        """The mask as it is now, one bit an entry."""
        return bits.pack(self.mask())

    def deploy(self, packed: torch.Tensor) -> None:
        """Use this stored mask from now on, in the place of the scores. Raises LoadError when it does not fit."""
        now = self.scores if self.fixed is None else self.fixed
        self.fixed = bits.unpack(packed, self.shape).to(now.device)
        self.scores = None


COMBINE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "or": lambda M_l, M_i: 1 - (1 - M_l) * (1 - M_i),
    "and": lambda M_l, M_i: M_l * M_i,
    "add": lambda M_l, M_i: M_l + M_i,
}
"""How a place's mask and a task's become one: both are zeros and ones, and gradients pass to both."""


class TaskMasks(nn.Module):
    """Each task's masks of a prototype, the same at all places: for a named tensor, a list of T masks."""

    def __init__(
        self, tasks: int, share: float, combine: str, shapes: dict[str, Sequence[int]], fan: Callable[..., int]
    ):
        super().__init__()
        self.combine = combine
        self.masks = nn.ModuleDict()
        for name, shape in shapes.items():
            self.masks[name] = nn.ModuleList(TopMask(shape, share, fan(shape)) for _ in range(tasks))

    def __len__(self) -> int:
        return len(next(iter(self.masks.values())))

    def keep(self, task: int) -> None:
        """Forget every other task."""
        for name, masks in self.masks.items():
            self.masks[name] = nn.ModuleList([masks[task]])

    def with_place(self, name: str, M_l: torch.Tensor) -> torch.Tensor:
        """A place's mask, combined with each task's: (...) -> (T, ...)."""
        return COMBINE[self.combine](M_l, torch.stack([mask.values(M_l.dtype) for mask in self.masks[name]]))


class Masked(nn.Module):
    """A place's view of ``prototype``, which places share, through a mask for each named tensor of it; with
    ``task_masks`` also through those of each row's task, which ``tasks`` knows."""

    @staticmethod
    def fan(shape: Sequence[int]) -> int:
        """The fan of the start of a mask's scores."""
        return shape[-1]

    def __init__(
        self,
        prototype: nn.Module,
        share: float,
        shapes: dict[str, Sequence[int]],
        task_masks: TaskMasks | None = None,
        tasks: Tasks | None = None,
    ):
        super().__init__()
        self.prototype = prototype
        self.masks = nn.ModuleDict({name: TopMask(shape, share, self.fan(shape)) for name, shape in shapes.items()})
        self.task_masks = task_masks
        self.tasks = tasks

    def masked(self, name: str, theta: torch.Tensor) -> torch.Tensor:
        """The tensor through the mask of this place; or (T, ...) through the masks of this place and of each task."""
        if self.task_masks is None:
            return self.masks[name](theta)
        return theta * self.task_masks.with_place(name, self.masks[name].values(theta.dtype))


class MaskedBottleneck(Masked):
    """``delta(z)`` of a shared bottleneck with masked W_down and W_up; its biases are shared as they are."""

    active = True

    @staticmethod
    def fan(shape: Sequence[int]) -> int:
        return shape[0]  # the original's scores lie the other way round

    @staticmethod
    def shapes(prototype: Bottleneck) -> dict[str, Sequence[int]]:
        return {"down": prototype.down.weight.shape, "up": prototype.up.weight.shape}

    def delta(self, z: torch.Tensor) -> torch.Tensor:
        p = self.prototype
        z = cast(z, p.down.weight)  # (b, t, d)
        W_down = self.masked("down", p.down.weight)  # (r, d) or (T, r, d)
        W_up = self.masked("up", p.up.weight)  # (d, r) or (T, d, r)
        if self.task_masks is None:
            a = p.dropout(p.activation(F.linear(z, W_down, p.down.bias)))  # (b, t, d) -> (b, t, r)
            return p.scale * F.linear(a, W_up, p.up.bias)  # (b, t, r) -> (b, t, d)
        h, i = self.tasks.grouped(z)  # (b, t, d), and the tasks (b,)
        a = p.dropout(p.activation(h @ W_down[i].mT + p.down.bias))  # (b, t, d) -> (b, t, r)
        return (p.scale * (a @ W_up[i].mT + p.up.bias)).view(z.shape)  # (b, t, r) -> (b, t, d)


class MaskedLowRank(Masked):
    """``forward(x, y) = y + scale * (B o M_B) (A o M_A) dropout(x)`` with a shared low-rank update; x (b, t, in),
    y (b, t, out)."""

    @staticmethod
    def shapes(prototype: LowRank) -> dict[str, Sequence[int]]:
        return {"A": prototype.A.shape, "B": prototype.B.shape}

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The masked A (r, in) and B (out, r), one a task where there are tasks."""
        return self.masked("A", self.prototype.A), self.masked("B", self.prototype.B)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        A, B = self.factors()  # (r, in), (out, r), or (T, r, in), (T, out, r)
        x = cast(self.prototype.dropout(x), A)  # (b, t, in)
        if self.task_masks is None:
            Ax = F.linear(x.flatten(0, -2), A)  # (b, t, in) -> (b t, r)
            return update(y, Ax, B, self.prototype.scale)  # (b, t, out)
        x, i = self.tasks.grouped(x)  # (b, t, in), and the tasks (b,)
        delta = self.prototype.scale * (x @ A[i].mT @ B[i].mT)  # (b, t, in) -> (b, t, out)
        return y + delta.view(y.shape).to(y.dtype)  # (b, t, out)

    @torch.no_grad()
    def delta(self, task: int = 0) -> torch.Tensor:
        """The (out, in) update, of one task where there are tasks, formed in float32 or wider."""
        A, B = self.factors()
        if self.task_masks is not None:
            A, B = A[task], B[task]
        dtype = torch.promote_types(A.dtype, torch.float32)
        return self.prototype.scale * (B.to(dtype) @ A.to(dtype))


class Table(nn.Module):
    """Keys and values beside each other, ``table`` (m, 2 H_kv p): the output of a trained MLP until :meth:`keep`."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.maker = mlp

    def forward(self) -> torch.Tensor:
        return self.table if self.maker is None else self.maker()  # (m, 2 H_kv p)

    def keep(self) -> None:
        """Drop the MLP and train its output of now."""
        if self.maker is not None:
            table = self.maker().detach()
            self.maker = None
            self.table = nn.Parameter(table)


class MaskedTable(Masked):
    """A masked :class:`Table`, or one a task, from which a prefix takes its keys and values."""

    @staticmethod
    def fan(shape: Sequence[int]) -> int:
        return math.prod(shape)  # the original's scores are one tensor with an axis for the layers in front

    def forward(self) -> torch.Tensor:
        return self.masked("table", self.prototype())  # (m, 2 H_kv p) or (T, m, 2 H_kv p)


class TaskPrefix(Prefix):
    """The keys and values of each row's task, from a :class:`MaskedTable` with tasks."""

    def forward(self, inputs: Inputs) -> Inputs:
        H_kv, m, p = self.shape
        b = len(inputs.query)
        i = self.maker.tasks.ids(b, inputs.query.device)  # (b,)
        tables = self.maker()[i]  # (T, m, 2 H_kv p) -> (b, m, 2 H_kv p)
        P_K, P_V = tables.view(b, m, 2, H_kv, p).permute(2, 0, 3, 1, 4).unbind()  # 2 (b, H_kv, m, p)
        return inputs.prepend(P_K, P_V)
