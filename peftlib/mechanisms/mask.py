"""A learned binary mask over a frozen tensor: scores while it trains, bits once it is stored."""

from __future__ import annotations

import torch
from torch import nn

from peftlib.errors import StateError
from peftlib.mechanisms import bits


def binarize(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """``[scores > threshold]`` as 0 and 1 in the scores' dtype; the gradient passes as if this were the identity."""
    hard = (scores > threshold).to(scores.dtype)
    return hard + (scores - scores.detach())


class StraightThroughMask(nn.Module):
    """A parametrization: the tensor times ``[scores > threshold]``.

    Shapes: ``scores`` and the mask have the shape of the tensor or, with ``dim`` and ``index`` (k,), of the part of it
    that ``tensor.index_select(dim, index)`` gives; the rest of the tensor is left as it is. Scores are trained until
    :meth:`deploy` puts a fixed mask in their place.
    """

    def __init__(self, scores: torch.Tensor, threshold: float, dim: int = 0, index: torch.Tensor | None = None):
        super().__init__()
        self.scores = nn.Parameter(scores)
        self.threshold = threshold
        self.dim = dim
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("fixed", None, persistent=False)

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.fixed is None:
            mask = binarize(self.scores, self.threshold)
        elif self.training and torch.is_grad_enabled():
            raise StateError(
                "a loaded mask has its bits only, not the scores that train it: call model.eval() to use it, or "
                "attach the method anew to train one"
            )
        else:
            mask = self.fixed
        if self.index is None:
            return tensor * mask.to(tensor.dtype)
        part = tensor.index_select(self.dim, self.index) * mask.to(tensor.dtype)
        return tensor.index_copy(self.dim, self.index, part)

    def _mask(self) -> torch.Tensor:
        return self.scores.detach() > self.threshold if self.fixed is None else self.fixed

    def kept(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mask as it is now, boolean, of the whole tensor's shape: what is outside the masked part is kept."""
        if self.index is None:
            return self._mask()
        return torch.ones_like(tensor, dtype=torch.bool).index_copy(self.dim, self.index, self._mask())

    def pack(self) -> torch.Tensor:
        """The mask as it is now, one bit an entry."""
        return bits.pack(self._mask())

    def deploy(self, packed: torch.Tensor) -> None:
        """Use this stored mask from now on, in the place of the scores. Raises LoadError when it does not fit."""
        now = self.scores if self.fixed is None else self.fixed
        self.fixed = bits.unpack(packed, now.shape).to(now.device)
        self.scores = None
