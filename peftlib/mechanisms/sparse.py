"""Training a few entries of a frozen tensor, as indices and values.

The optimizer sees the k values only. In the forward pass they are written into the frozen tensor's own storage, so no
copy of it is made (a functional scatter would keep a second copy of all such weights from forward to backward). The
backward pass forms the tensor's gradient, gathers the k entries and drops the rest. Every other entry stays
bit-identical, whatever weight decay or momentum an optimizer has; ``owned`` masks say which entries are written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import nn

from peftlib.errors import LoadError
from peftlib.mechanisms import bits, undo
from peftlib.mechanisms.host import Host


class _Splice(torch.autograd.Function):
    """The tensor with its chosen entries set to ``values``; the gradient of ``values`` is gathered from its own. The
    "gradient" of ``dropped``, a number, is the sum of the squares of the rest; ``rest`` sums the rest up."""

    @staticmethod
    def forward(
        values: torch.Tensor,
        tensor: torch.Tensor,
        indices: torch.Tensor,
        dropped: torch.Tensor | None,
        rest: torch.Tensor | None,
    ) -> torch.Tensor:
        # Through .data: a recomputation (gradient checkpointing) writes the same values again, which must not
        # invalidate what autograd saved of this tensor.
        tensor.data.view(-1)[indices.long()] = values.to(tensor.dtype)  # (k,) into the tensor's shape
        return tensor.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        values, _, indices, _, ctx.rest = inputs
        ctx.save_for_backward(indices)
        ctx.dtype = values.dtype

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, torch.Tensor | None, None]:
        (indices,) = ctx.saved_tensors
        chosen = gradient.reshape(-1)[indices.long()].to(ctx.dtype)  # the tensor's shape -> (k,)
        squares = None
        if ctx.rest is not None:
            ctx.rest.add_(gradient)
            ctx.rest.view(-1)[indices.long()] = 0
        elif ctx.needs_input_grad[3]:
            whole, part = (
                torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32))
                for t in (gradient, chosen)
            )
            squares = (whole.square() - part.square()).clamp(min=0)  # ()
        return chosen, None, None, squares, None


class SparseValues(nn.Module):
    """A parametrization that trains k entries of a frozen tensor in place.

    Shapes: ``indices`` (k,) of the flattened tensor, ascending, int32 where that suffices; ``values`` (k,) float32, the
    entries themselves, so the start is bit-identical. Do not step the optimizer between a forward and its backward:
    both read the same storage.

    ``dropped``, where :func:`watch` made it: its ``grad`` is the sum of the squares of the gradient's other entries;
    ``rest``, where a step has several passes: these entries' sum over the passes.
    """

    indices: torch.Tensor
    original: torch.Tensor
    dropped: torch.Tensor | None = None
    rest: torch.Tensor | None = None

    def __init__(self, tensor: torch.Tensor, indices: torch.Tensor):
        super().__init__()
        tensor.data = tensor.data.contiguous()
        original = tensor.detach().view(-1)[indices]
        small = tensor.numel() <= torch.iinfo(torch.int32).max
        self.shape = tensor.shape
        self.register_buffer("indices", indices.to(torch.int32 if small else torch.int64))
        self.register_buffer("original", original, persistent=False)
        self.values = nn.Parameter(original.to(torch.promote_types(original.dtype, torch.float32), copy=True))

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return _Splice.apply(self.values, tensor, self.indices, self.dropped, self.rest)  # the tensor's shape

    @torch.no_grad()
    def add(self, tensor: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
        """Add the differences that other values (k',) make at flat indices (k',) of the same tensor: ``indices`` grow
        to the union and ``values`` are a new parameter. Where only one has an entry, its value stays bit for bit."""
        device, flat = self.indices.device, tensor.detach().view(-1)
        together = torch.cat([self.indices.long(), indices.to(device).long()])
        union, place = together.unique(return_inverse=True)
        mine, theirs = place[: len(self.indices)], place[len(self.indices) :]
        original = flat[union].clone()
        original[mine] = self.original.to(original.dtype)
        total = original.double()
        total[mine] = self.values.double()
        alone = torch.ones_like(union, dtype=torch.bool)
        alone[mine] = False
        values = values.to(device).double()
        total[theirs] = torch.where(alone[theirs], values, total[theirs] + (values - original[theirs].double()))
        self.indices, self.original = union.to(self.indices.dtype), original
        self.values = nn.Parameter(total.to(self.values.dtype))

    @property
    def owned(self) -> torch.Tensor:
        """Boolean, of the tensor's shape: the entries of the frozen tensor that this child writes."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.indices.device)
        mask.view(-1)[self.indices.long()] = True
        return mask


def _restore(child: SparseValues, tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.view(-1)[child.indices.long()] = child.original


@undo.suspends(_restore)
def _suspend(model: nn.Module, child: SparseValues, tensor: torch.Tensor) -> undo.Step:
    _write(child, tensor, child.original)
    return partial(_write, child, tensor, child.values.detach())


def _write(child: SparseValues, tensor: torch.Tensor, values: torch.Tensor) -> None:
    # Through .data, as in the forward pass.
    tensor.data.view(-1)[child.indices.long()] = values.to(tensor.dtype)


def train_entries(host: Host, parameter: nn.Parameter, indices: torch.Tensor) -> SparseValues:
    """Train the entries of a frozen backbone parameter at these flat indices; detaching restores them bit for bit."""
    child = SparseValues(parameter, indices)
    # Registered first, so undone last: after the parametrization, which still writes, has left.
    host.on_remove(partial(_restore, child, parameter), restores=True)
    host.parametrize(parameter, child)
    return child


def watch(children: Iterable[SparseValues], passes: int = 1) -> None:
    """From now on count what the children drop of their tensors' gradients; with several backward passes before the
    next :func:`clip_whole` that takes a dense tensor each."""
    for child in children:
        child.rest = child.values.new_zeros(child.shape) if passes > 1 else None
        if child.dropped is None or child.dropped.device != child.values.device:
            child.dropped = torch.zeros((), device=child.values.device, requires_grad=True)
        child.dropped.grad = None


@torch.no_grad()
def clip_whole(parameters: Iterable[nn.Parameter], children: Iterable[SparseValues], max_norm: float) -> torch.Tensor:
    """Scale the gradients of all trained parameters as if every entry of the children's tensors trained and the whole
    gradient were clipped to ``max_norm``, since :func:`watch`. Gives the whole gradient's norm.

    It is exact where each tensor is used once in a pass. Those of several uses or processes are taken to be at right
    angles, so that no dense gradient has to be kept.
    """
    parameters, children = list(parameters), list(children)
    squares = [c.dropped.grad for c in children if c.dropped is not None and c.dropped.grad is not None]
    squares += [torch.linalg.vector_norm(c.rest).square() for c in children if c.rest is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    whole = nn.utils.get_total_norm(gradients).square()
    if squares:
        dropped = torch.stack([s.to(whole.device) for s in squares]).sum()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(dropped)
            dropped /= torch.distributed.get_world_size() ** 2  # of the mean of the processes' gradients
        whole = whole + dropped
    norm = whole.sqrt()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def top_entries(scores: Sequence[torch.Tensor], k: int) -> list[torch.Tensor]:
    """The flat indices, tensor by tensor, of the k largest scores over all tensors; among equals the first ones win.

    ``scores`` are contiguous, non-negative and float32. The choice is exact and makes no long copy of them: the bits of
    such floats sort as integers, so counting their upper, then their lower halves finds the k-th largest.
    """
    if not k:
        return [torch.empty(0, dtype=torch.int64, device=s.device) for s in scores]
    codes = [s.view(torch.int32).flatten() for s in scores]
    upper = reduce(torch.add, (torch.bincount(c >> 16, minlength=1 << 15) for c in codes))
    high, above = _bucket(upper, k)
    lower = reduce(torch.add, (torch.bincount(c[c >> 16 == high] & 0xFFFF, minlength=1 << 16) for c in codes))
    low, above_low = _bucket(lower, k - above)
    threshold, ties = (high << 16) | low, k - above - above_low
    chosen = []
    for code in codes:
        equal = (code == threshold).nonzero().flatten()[:ties]
        ties -= len(equal)
        chosen.append(torch.cat([(code > threshold).nonzero().flatten(), equal]).sort().values)
    return chosen


def _bucket(histogram: torch.Tensor, k: int) -> tuple[int, int]:
    """The bucket of the k-th largest, and how many entries are in the buckets above it."""
    from_top = histogram.flip(0).cumsum(0)
    position = int((from_top < k).sum())
    above = int(from_top[position - 1]) if position else 0
    return len(histogram) - 1 - position, above


def pending(k: int, entries: int) -> tuple[int, int, int]:
    """How much choosing k of so many entries will add: trained parameters, and at most so many stored numbers and
    bytes."""
    as_bits = bits.packed_size(entries) < 4 * k
    stored, size = (bits.packed_size(entries),) * 2 if as_bits else (k, 4 * k)
    return k, k + stored, 4 * k + size


def state(host: Host, children: dict[str, SparseValues]) -> dict[str, torch.Tensor]:
    """The stored tensors. For each child, by its tensor's name: ``<name>.values`` with ``<name>.indices`` or, where
    that is smaller, ``<name>.bits``, one bit an entry of the tensor. All others are as the host has them."""
    tensors, paths = host.state(), {id(child): path for path, child in host.paths().items()}
    for name, child in children.items():
        path = paths[id(child)]
        tensors[f"{name}.values"] = tensors.pop(f"{path}.values")
        indices = tensors.pop(f"{path}.indices")
        if indices.numel() * indices.element_size() <= bits.packed_size(child.shape.numel()):
            tensors[f"{name}.indices"] = indices
        else:
            tensors[f"{name}.bits"] = bits.pack(child.owned)
    return tensors


def load_state(
    host: Host, parameters: dict[str, nn.Parameter], state: dict[str, torch.Tensor]
) -> dict[str, SparseValues]:
    """Make the children that :func:`state` stored, on the parameters of these names, and load the rest into the host.

    Raises LoadError for names or entries that do not fit.
    """
    state = dict(state)
    host.load_state({name: state.pop(name) for name in host.state() if name in state})
    children = {}
    for name, (indices, values) in read(parameters, state).items():
        child = train_entries(host, parameters[name], indices.to(parameters[name].device))
        with torch.no_grad():
            child.values.copy_(values)
        children[name] = child
    return children


def read(
    parameters: dict[str, nn.Parameter], state: dict[str, torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The indices and values that :func:`state` stored, by the parameters' names. Raises LoadError as
    :func:`load_state`."""
    state, found = dict(state), {}
    for name, parameter in parameters.items():
        values, indices = state.pop(f"{name}.values", None), _indices(name, parameter, state)
        if values is None and indices is None:
            continue
        if values is None or indices is None or values.shape != indices.shape:
            raise LoadError(f"the stored entries of {name} are incomplete: it needs as many values as indices")
        found[name] = indices, values
    if state:
        raise LoadError(f"the file holds {sorted(state)[:3]}, entries of tensors that the method does not choose from")
    return found


def _indices(name: str, parameter: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor | None:
    if (packed := state.pop(f"{name}.bits", None)) is not None:
        return bits.unpack(packed, (parameter.numel(),)).nonzero().flatten()
    indices = state.pop(f"{name}.indices", None)
    if indices is None:
        return None
    fits = indices.dim() == 1 and not indices.is_floating_point() and bool((indices.diff() > 0).all())
    if not fits or (len(indices) and not 0 <= int(indices[0]) <= int(indices[-1]) < parameter.numel()):
        raise LoadError(f"the stored indices of {name} are not ascending positions in its {parameter.numel()} entries")
    return indices
