"""Subnetworks of a shared prototype: each place learns which entries of the prototype's tensors it keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.mechanisms import bits
from peftlib.mechanisms.bottleneck import Bottleneck
from peftlib.mechanisms.low_rank import LowRank, update
from peftlib.mechanisms.precision import cast
from peftlib.mechanisms.prefix import Maker


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

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        mask = self.mask().to(tensor.dtype)
        if self.fixed is None:
            size = self.scores.abs()
            mask = mask + (size - size.detach())
        return tensor * mask

    def pack(self) -> torch.Tensor:
        """The mask as it is now, one bit an entry."""
        return bits.pack(self.mask())

    def deploy(self, packed: torch.Tensor) -> None:
        """Use this stored mask from now on, in the place of the scores. Raises LoadError when it does not fit."""
        now = self.scores if self.fixed is None else self.fixed
        self.fixed = bits.unpack(packed, self.shape).to(now.device)
        self.scores = None


class Masked(nn.Module):
    """A place's view of ``prototype``, which places share, through one mask for each named tensor of it."""

    def __init__(self, prototype: nn.Module, share: float, **shapes: Sequence[int]):
        super().__init__()
        self.prototype = prototype
        self.masks = nn.ModuleDict({name: TopMask(shape, share) for name, shape in shapes.items()})


class MaskedBottleneck(Masked):
    """``delta(z)`` of a shared bottleneck with masked W_down and W_up; its biases are shared as they are."""

    active = True

    def __init__(self, prototype: Bottleneck, share: float):
        super().__init__(prototype, share, down=prototype.down.weight.shape, up=prototype.up.weight.shape)

    def delta(self, z: torch.Tensor) -> torch.Tensor:
        p = self.prototype
        inner = F.linear(cast(z, p.down.weight), self.masks["down"](p.down.weight), p.down.bias)
        inner = p.dropout(p.activation(inner))
        return p.scale * F.linear(inner, self.masks["up"](p.up.weight), p.up.bias)


class MaskedLowRank(Masked):
    """``forward(x, y) = y + scale * (B o M_B) (A o M_A) dropout(x)`` with a shared low-rank update."""

    def __init__(self, prototype: LowRank, share: float):
        super().__init__(prototype, share, A=prototype.A.shape, B=prototype.B.shape)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The masked A and B."""
        return self.masks["A"](self.prototype.A), self.masks["B"](self.prototype.B)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        A, B = self.factors()
        x = cast(self.prototype.dropout(x), A).flatten(0, -2)
        return update(y, F.linear(x, A), B, self.prototype.scale)

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """The (out, in) update, formed in float32 or wider."""
        A, B = self.factors()
        dtype = torch.promote_types(A.dtype, torch.float32)
        return self.prototype.scale * (B.to(dtype) @ A.to(dtype))


class Table(nn.Module):
    """Keys and values beside each other, ``table`` (m, 2 width): made by a trained network until :meth:`keep`."""

    def __init__(self, maker: Maker):
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
    """A masked :class:`Table`; the maker of a :class:`peftlib.mechanisms.prefix.Prefix`."""

    def __init__(self, prototype: Table, share: float, shape: Sequence[int]):
        super().__init__(prototype, share, table=shape)

    def forward(self) -> torch.Tensor:
        return self.masks["table"](self.prototype())
