"""Low-rank updates in the form of a singular value decomposition, whose rank changes one triplet at a time, and their
files, which hold the triplets that count."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.errors import LoadError
from peftlib.mechanisms import low_rank
from peftlib.mechanisms.low_rank import thin
from peftlib.mechanisms.precision import cast


class Triplets(nn.Module):
    """``forward(x, y) = y + scale * P Lambda Q dropout(x)``: an update in the form of its own singular value
    decomposition, whose rank changes one triplet (column of P, singular value, row of Q) at a time.

    Shapes, with b rows of t tokens: x (b, t, in), y (b, t, out), P (out, r), Q (r, in); ``singular`` (r,) is the
    diagonal of Lambda. P and Q start N(0, std), the singular values at zero, so the start is the identity. ``kept``
    (r,) marks the triplets that count.
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
        x = cast(self.dropout(x), self.Q).flatten(0, -2)  # (b, t, in) -> (b t, in)
        LQx = F.linear(x, self.Q) * self.weights()  # (b t, in) -> (b t, r)
        return low_rank.update(y, LQx, self.P, self.scale)  # (b t, r) -> (b, t, out)

    def weights(self) -> torch.Tensor:
        """The weights of the triplets, (r,): the diagonal of Lambda."""
        return self.singular

    def delta(self) -> torch.Tensor:
        """The (out, in) update ``scale * P Lambda Q``, formed in float32 or wider."""
        dtype = torch.promote_types(self.P.dtype, torch.float32)
        P, L, Q = (t.detach().to(dtype) for t in (self.P, self.weights(), self.Q))
        return self.scale * (P * L) @ Q  # (out, r) (r, in) -> (out, in)

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


def only_kept(state: dict[str, torch.Tensor], updates: dict[str, Triplets]) -> dict[str, torch.Tensor]:
    """A model's state without the triplets that do not count, of the updates by name in the model."""
    state = dict(state)
    for path, update in updates.items():
        state.update({f"{path}.{name}": tensor.detach() for name, tensor in update.only_kept().items()})
    return state


def spread(state: dict[str, torch.Tensor], updates: dict[str, Triplets]) -> dict[str, torch.Tensor]:
    """The way back from :func:`only_kept`. Raises LoadError where it does not fit."""
    state = dict(state)
    for path, update in updates.items():
        names = [f"{path}.{name}" for name in ("P", "singular", "Q", "kept")]
        if all(name in state for name in names):
            state.update(zip(names, update.spread(*(state[name] for name in names))))
    return state
