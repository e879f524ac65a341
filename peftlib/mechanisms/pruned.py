"""Added tensors of which only chosen entries exist: the others are zero, do not train and are not stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from peftlib.errors import LoadError
from peftlib.mechanisms import sparse
from peftlib.mechanisms.host import Host


def added(host: Host) -> dict[str, nn.Parameter]:
    """The trained parameters of the host's children, by name in the model."""
    inside = {id(p) for child in host.paths().values() for p in child.parameters()}
    return {n: p for n, p in host.trained().items() if id(p) in inside}


def largest(scores: Sequence[torch.Tensor], k: int) -> list[torch.Tensor]:
    """Flat ascending indices, tensor by tensor, of the k largest scores over all tensors, which may be negative; among
    equals the first ones win."""
    order = torch.cat([s.flatten() for s in scores]).argsort(descending=True, stable=True)[:k].sort().values
    ends = torch.tensor([s.numel() for s in scores], device=order.device).cumsum(0)
    starts = [0, *ends.tolist()[:-1]]
    return [order[(order >= start) & (order < end)] - start for start, end in zip(starts, ends.tolist())]


def keep(
    host: Host, parameters: dict[str, nn.Parameter], indices: Iterable[torch.Tensor]
) -> dict[str, sparse.SparseValues]:
    """Train these entries of added parameters as sparse values, from their present values, and set the others to zero
    for good. A tensor without an entry has no child."""
    children = {}
    for (name, parameter), chosen in zip(parameters.items(), indices, strict=True):
        parameter.requires_grad_(False)
        values = torch.zeros_like(parameter.data.contiguous()).view(-1)
        values[chosen] = parameter.data.flatten()[chosen]
        parameter.data = values.view(parameter.shape)
        if len(chosen):
            children[name] = sparse.train_entries(host, parameter, chosen)
    return children


def state(
    host: Host, parameters: dict[str, nn.Parameter], children: dict[str, sparse.SparseValues]
) -> dict[str, torch.Tensor]:
    """What is stored after :func:`keep`: of these parameters values with indices or bits, the rest as it is."""
    dense = {f"{path.rpartition('.')[0]}.original" for path, m in host.paths().items() if m in set(children.values())}
    dense |= parameters.keys()
    return {n: t for n, t in sparse.state(host, children).items() if n not in dense}


def load_state(
    host: Host, parameters: dict[str, nn.Parameter], state: dict[str, torch.Tensor]
) -> dict[str, sparse.SparseValues]:
    """Load the rest into the host, :func:`keep` what :func:`state` stored. Raises LoadError where it does not fit."""
    rest = {n: t for n, t in host.state().items() if n not in parameters}
    if missing := sorted(rest.keys() - state.keys()):
        raise LoadError(f"the file does not fit: {len(missing)} tensors are missing {missing[:3]}")
    if wrong := [n for n, t in rest.items() if t.shape != state[n].shape]:
        raise LoadError(f"{wrong[0]} has shape {tuple(state[wrong[0]].shape)} in the file")
    found = sparse.read(parameters, {n: t for n, t in state.items() if n not in rest})
    none = torch.empty(0, dtype=torch.int64)
    chosen = [found[n][0].long() if n in found else none for n in parameters]
    children = keep(host, parameters, [i.to(p.device) for i, p in zip(chosen, parameters.values())])
    with torch.no_grad():
        for name, tensor in rest.items():
            tensor.copy_(state[name])
        for name, child in children.items():
            child.values.copy_(found[name][1])
    return children
