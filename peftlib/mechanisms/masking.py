"""Subnetworks of a shared prototype: each place, and each task, learns which entries of the prototype's tensors it
keeps."""

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
from peftlib.mechanisms.prefix import Prefix, PrefixEncoder


def top(scores: torch.Tensor, share: float) -> torch.Tensor:
    """The mask of the largest entries, all but floor((1 - share) * numel) of them, in the scores' shape."""
    kept = scores.numel() - int((1 - share) * scores.numel())
    flat = scores.flatten()
    return torch.zeros_like(flat, dtype=torch.bool).scatter(0, flat.topk(kept).indices, True).view(scores.shape)


class TopMask(nn.Module):
    """``forward(t) = t * M`` with M the mask of the largest ``|scores|``; their gradient is the mask's.

    ``scores`` have the tensor's shape and start Kaiming-uniform with a = sqrt(5). They train until :meth:`deploy` puts
    a fixed mask in their place.
    """

    def __init__(self, shape: Sequence[int], share: float):
        super().__init__()
        self.shape = tuple(shape)
        self.share = share
        self.scores = nn.Parameter(torch.empty(self.shape))
        nn.init.kaiming_uniform_(self.scores, a=math.sqrt(5))
        self.register_buffer("fixed", None, persistent=False)

    def mask(self) -> torch.Tensor:
        """What is kept, boolean."""
        return top(self.scores.detach().abs(), self.share) if self.fixed is None else self.fixed

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """The mask as zeros and ones that pass gradients to the scores."""
        mask = self.mask().to(dtype)
        if self.fixed is None:
            size = self.scores.abs()
            mask = mask + (size - size.detach())
        return mask

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * self.values(tensor.dtype)

    def pack(self) -> torch.Tensor:
        """The mask as it is now, one bit an entry."""
        return bits.pack(self.mask())

    def deploy(self, packed: torch.Tensor) -> None:
        """Use this stored mask from now on, in the place of the scores. Raises LoadError when it does not fit."""
        now = self.scores if self.fixed is None else self.fixed
        self.fixed = bits.unpack(packed, self.shape).to(now.device)
        self.scores = None


COMBINE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "or": lambda a, b: 1 - (1 - a) * (1 - b),
    "and": lambda a, b: a * b,
    "add": lambda a, b: a + b,
}
"""How a place's mask and a task's become one: both are zeros and ones, and gradients pass to both."""


class TaskMasks(nn.Module):
    """The masks of each task over a prototype, the same at all its places: for a named tensor, a list of masks."""

    def __init__(self, tasks: int, share: float, combine: str, shapes: dict[str, Sequence[int]]):
        super().__init__()
        self.combine = combine
        self.masks = nn.ModuleDict(
            {name: nn.ModuleList(TopMask(shape, share) for _ in range(tasks)) for name, shape in shapes.items()}
        )

    def __len__(self) -> int:
        return len(next(iter(self.masks.values())))

    def keep(self, task: int) -> None:
        """Forget every other task."""
        for name, masks in self.masks.items():
            self.masks[name] = nn.ModuleList([masks[task]])

    def with_place(self, name: str, place: torch.Tensor) -> torch.Tensor:
        """A place's mask, combined with each task's: (tasks, ...)."""
        return COMBINE[self.combine](place, torch.stack([mask.values(place.dtype) for mask in self.masks[name]]))


class Masked(nn.Module):
    """A place's view of ``prototype``, which places share, through one mask for each named tensor of it; with
    ``task_masks``, through one for each task of the rows, which ``tasks`` tells."""

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
        self.masks = nn.ModuleDict({name: TopMask(shape, share) for name, shape in shapes.items()})
        self.task_masks = task_masks
        self.tasks = tasks

    def masked(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor through the mask of this place, or (tasks, ...) through the masks of this place and each task."""
        if self.task_masks is None:
            return self.masks[name](tensor)
        return tensor * self.task_masks.with_place(name, self.masks[name].values(tensor.dtype))


class MaskedBottleneck(Masked):
    """``delta(z)`` of a shared bottleneck with masked W_down and W_up; its biases are shared as they are."""

    active = True

    @staticmethod
    def shapes(prototype: Bottleneck) -> dict[str, Sequence[int]]:
        return {"down": prototype.down.weight.shape, "up": prototype.up.weight.shape}

    def delta(self, z: torch.Tensor) -> torch.Tensor:
        p = self.prototype
        z = cast(z, p.down.weight)
        down, up = self.masked("down", p.down.weight), self.masked("up", p.up.weight)
        if self.task_masks is None:
            inner = p.dropout(p.activation(F.linear(z, down, p.down.bias)))
            return p.scale * F.linear(inner, up, p.up.bias)
        grouped, ids = self.tasks.grouped(z)
        inner = p.dropout(p.activation(grouped @ down[ids].mT + p.down.bias))
        return (p.scale * (inner @ up[ids].mT + p.up.bias)).view(z.shape)


class MaskedLowRank(Masked):
    """``forward(x, y) = y + scale * (B o M_B) (A o M_A) dropout(x)`` with a shared low-rank update."""

    @staticmethod
    def shapes(prototype: LowRank) -> dict[str, Sequence[int]]:
        return {"A": prototype.A.shape, "B": prototype.B.shape}

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The masked A and B, one a task where there are tasks."""
        return self.masked("A", self.prototype.A), self.masked("B", self.prototype.B)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        A, B = self.factors()
        x = cast(self.prototype.dropout(x), A)
        if self.task_masks is None:
            return update(y, F.linear(x.flatten(0, -2), A), B, self.prototype.scale)
        grouped, ids = self.tasks.grouped(x)
        delta = self.prototype.scale * (grouped @ A[ids].mT @ B[ids].mT)
        return y + delta.view(y.shape).to(y.dtype)

    @torch.no_grad()
    def delta(self, task: int = 0) -> torch.Tensor:
        """The (out, in) update, of one task where there are tasks, formed in float32 or wider."""
        A, B = self.factors()
        if self.task_masks is not None:
            A, B = A[task], B[task]
        dtype = torch.promote_types(A.dtype, torch.float32)
        return self.prototype.scale * (B.to(dtype) @ A.to(dtype))


class Table(nn.Module):
    """Keys and values beside each other, ``table`` (m, 2 width): made by a trained network until :meth:`keep`."""

    def __init__(self, maker: PrefixEncoder):
        super().__init__()
        self.maker = maker

    def forward(self) -> torch.Tensor:
        return self.table if self.maker is None else self.maker()

    def keep(self) -> None:
        """Drop the maker and train the table that it makes now."""
        if self.maker is not None:
            table = self.maker().detach()
            self.maker = None
            self.table = nn.Parameter(table)


class MaskedTable(Masked):
    """A masked :class:`Table`, or one a task; the maker of a :class:`peftlib.mechanisms.prefix.Prefix`."""

    def forward(self) -> torch.Tensor:
        return self.masked("table", self.prototype())


class TaskPrefix(Prefix):
    """The keys and values of each row's task, made by a :class:`MaskedTable` with tasks."""

    def forward(self, inputs: Inputs) -> Inputs:
        heads, length, head_dim = self.shape
        rows = len(inputs.query)
        tables = self.maker()[self.maker.tasks.ids(rows, inputs.query.device)]
        return inputs.prepend(*tables.view(rows, length, 2, heads, head_dim).permute(2, 0, 3, 1, 4).unbind())
