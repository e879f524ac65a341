"""The changes that a method made to a backbone, and what follows from them: what trains, what a file holds, which
entries a method owns, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Self

import torch
from torch import nn

from peftlib.anatomy import Site
from peftlib.errors import LoadError
from peftlib.mechanisms import atomic, call, undo


class Changes:
    """A list of changes to one model; :class:`peftlib.mechanisms.host.Host` makes them.

    ``children`` are the modules that were hung, as (owner, name, child), ``unfrozen`` the backbone's own parameters
    that train, ``written`` the sites whose frozen weights are written to.
    """

    def __init__(self, model: nn.Module, keep_original: bool = True):
        self.model = model
        self.keep_original = keep_original
        self.can_restore = True
        self.children: list[tuple[nn.Module, str, nn.Module]] = []
        self.unfrozen: list[nn.Parameter] = []
        self.written: list[Site] = []
        self.root: Changes = self
        self._scopes: list[Changes] = []
        self._undo: list[Callable[[], None]] = []
        self._merges: list[Callable[[], None]] = []
        self._flags = {name: p.requires_grad for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def _part(self) -> Self:
        """One that shares this one's model and undo steps and has no changes yet."""
        part = copy.copy(self)
        part.children, part.unfrozen, part.written, part._scopes = [], [], [], []
        return part

    def trained(self) -> dict[str, nn.Parameter]:
        """Name in the model -> parameter, for every parameter that trains: without those that were frozen since."""
        own = self._unfrozen()
        ids = {id(p) for part in self._parts() for _, _, child in part.children for p in child.parameters()}
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad and (n in own or id(p) in ids)}

    def _unfrozen(self) -> dict[str, nn.Parameter]:
        """Name in the model -> parameter of its own that was unfrozen."""
        ids = {id(p) for part in self._parts() for p in part.unfrozen}
        return {n: p for n, p in self.model.named_parameters() if id(p) in ids}

    def paths(self) -> dict[str, nn.Module]:
        """Name in the model -> child module; a child shared by several owners appears once."""
        ids = {id(child) for part in self._parts() for _, _, child in part.children}
        return {name: module for name, module in self.model.named_modules() if id(module) in ids}

    @property
    def plain(self) -> bool:
        """Whether the model's own weights say all: nothing but parameters of its own was changed or trains."""
        inside = (step for step in self._undo if not undo.is_around(step, self.model))
        return all(undo.restores_values(step) for step in inside)

    def owned(self) -> dict[str, torch.Tensor]:
        """Name in the model -> boolean mask, for frozen parameters into which a method writes: the entries that it
        owns. All other entries of every frozen parameter stay bit-identical."""
        masks: dict[str, torch.Tensor] = {
            f"{path.rpartition('.')[0]}.original": mask
            for path, child in self.paths().items()
            if (mask := getattr(child, "owned", None)) is not None
        }
        names = {id(p): n for n, p in self.model.named_parameters()}
        for site in (site for part in self._parts() for site in part.written):
            weight = site.module.get_parameter("weight")
            mask = masks.setdefault(names[id(weight)], torch.zeros_like(weight, dtype=torch.bool))
            (mask.T if site.transposed else mask)[site.rows] = True
        return masks

    def _parts(self) -> list[Changes]:
        return [self, *(p for scope in self._scopes for p in scope._parts())]

    def state(self) -> dict[str, torch.Tensor]:
        """What must be stored: the children's states and the trained backbone parameters, by name in the model. What
        several children share is there once."""
        tensors, seen = {}, set()
        for path, child in self.paths().items():
            for key, value in child.state_dict(keep_vars=True).items():
                if id(value) not in seen:
                    seen.add(id(value))
                    tensors[f"{path}.{key}"] = value
        tensors.update(self.trained() | self._unfrozen())
        return {n: t.detach() for n, t in tensors.items()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Write a stored state back. Raises LoadError that names what is missing, left over or of another shape."""
        mine = self.state()
        missing, extra = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
        if missing or extra:
            raise LoadError(
                f"the file does not fit: {len(missing)} tensors are missing {missing[:3]}, "
                f"{len(extra)} are left over {extra[:3]}"
            )
        for name, tensor in mine.items():
            if tensor.shape != state[name].shape:
                raise LoadError(f"{name} has shape {tuple(state[name].shape)} in the file, {tuple(tensor.shape)} here")
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(state[name])

    def remove(self, merge: bool = False) -> None:
        """Take every change back: bit for bit, or, with ``merge``, after :meth:`fold` and keeping written and trained
        parameters as they are."""
        if merge:
            self.fold()
        for step in reversed(self._undo):
            if not (merge and undo.restores(step)):
                step()
        self._undo.clear()
        for part in self._parts():
            part.children.clear()
            part.unfrozen.clear()
            part.written.clear()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._flags.get(name, False))
            parameter.grad = None

    # The way back

    def fold(self) -> None:
        """Write parametrized weights into the backbone, and make them plain parameters again."""
        for write in self._merges:
            write()
        if self._merges:
            for step in [step for step in reversed(self._undo) if undo.makes_plain(step)]:
                step()
                self._undo.remove(step)
        self._merges.clear()

    def restore_on_undo(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """Promise that :meth:`remove` puts this parameter's present values back; gives the copy of them."""
        if not self.keep_original or parameter.is_meta:
            self.root.can_restore = self.root.can_restore and self.keep_original
            return None
        original = parameter.detach().cpu().clone()
        self._undo.append(partial(undo.copy_back, parameter, original))
        return original

    def on_remove(self, function: Callable[[], None], restores: bool = False) -> None:
        """Call ``function`` when the method leaves, in reverse order of registration; one that ``restores`` old values
        of the backbone is left out of a merge.

        Give ``functools.partial`` over a module-level function with the modules and tensors as arguments: a deep copy
        of the model then undoes its own changes, where a closure or a bound method of a container would undo the
        original's. How its change is suspended is declared with :func:`peftlib.mechanisms.undo.suspends`.
        """
        self._undo.append(partial(undo.restore, function) if restores else function)

    def _hook(self, handle: call.Handle, stays: bool = False) -> None:
        self._undo.append(partial(undo.unhook, handle, stays))

    @contextmanager
    def all_or_nothing(self, *holders: object, writes: bool = True) -> Iterator[None]:
        """Inside ``with``, an exception takes back what happened to the model, to the list of changes and to the
        attributes of the ``holders``; see :func:`peftlib.mechanisms.atomic.all_or_nothing`."""
        with atomic.all_or_nothing(self.model, *self._parts(), *holders, writes=writes):
            yield

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside ``with``, the model computes as without the changes, bit for bit; see :meth:`Adapted.disabled`."""
        # What was compiled has the changes in it.
        with torch.compiler.set_stance("force_eager"), ExitStack() as resume:
            for step in reversed(self._undo):
                resume.callback(undo.suspend(self.model, step))
            yield
