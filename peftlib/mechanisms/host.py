"""The seams through which a frozen network is changed, and the way back.

A :class:`Host` is one backbone while a method is attached to it. Methods never touch a model directly: they ask the
host to hang a child module on a site, to parametrize a weight, to extend an attention or to train some of the
backbone's own parameters. The host remembers each change, so that freezing, counting, saving, merging and detaching
follow from what was declared and work for every method.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn.utils import parametrize

from peftlib import anatomy
from peftlib.anatomy import Anatomy, Layer, Site
from peftlib.errors import DataError, LoadError, StateError
from peftlib.mechanisms.outputs import state_of, with_state


def _after(change: Callable, part: tuple[int, int] | None, module: nn.Module, args: tuple, output: torch.Tensor):
    if part is None:
        return change(args[0], output)
    index, of = part
    pieces = list(output.chunk(of, dim=-1))
    pieces[index] = change(args[0], pieces[index])
    return torch.cat(pieces, dim=-1)


def _before(child: nn.Module, module: nn.Module, args: tuple):
    return (child(args[0]), *args[1:])


def _keep_input(child: nn.Module, module: nn.Module, args: tuple):
    child.kept_input = args[0]


def _use_input(child: nn.Module, change: Callable, module: nn.Module, args: tuple, output: torch.Tensor):
    kept, child.kept_input = child.kept_input, None
    return change(kept, output)


def _through(child: nn.Module, gate: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y + (gate(x) * (child(x, y) - y)).to(y.dtype)


def _behind(child: nn.Module, module: nn.Module, args: tuple, output):
    return with_state(output, child(state_of(output)))


class Tasks:
    """Which task each row of the batch in the model belongs to. Children of multi-task methods ask it."""

    def __init__(self):
        self.given: torch.Tensor | None = None
        self.running = False
        self.default = 0
        self.count: int | None = None
        """How many tasks the method knows; None where it knows none, or one for all."""

    def ids(self, rows: int, device: torch.device) -> torch.Tensor:
        """Task numbers (rows,): the batch's ``task_ids``, else the default for every row.

        A part of the model that works on a multiple of the batch's rows (beams, tokens) gets them repeated.
        """
        given = self._given(rows, device)
        return given.repeat_interleave(rows // len(given))

    def grouped(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (rows, ..., n) as (groups, tokens, n), and the one task of each group, (groups,)."""
        given = self._given(len(x), x.device)
        return x.reshape(len(given), -1, x.shape[-1]), given

    def _given(self, rows: int, device: torch.device) -> torch.Tensor:
        """The tasks of equal parts of the rows. The batch's count during the model's forward and where checkpointing
        repeats a part of it; an encoder that ``generate()`` runs on its own belongs to the default task."""
        if self.given is None or not (self.running or torch.is_grad_enabled()):
            return torch.full((1,), self.default, device=device)
        given = self.given.to(device)
        if rows % len(given):
            raise DataError(f"the batch has {len(given)} task_ids, which do not fit {rows} rows")
        return given

    def check(self, ids: torch.Tensor | int) -> None:
        """Raise DataError for a task that the method does not know."""
        if self.count is None:
            return
        ids = torch.as_tensor(ids)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.count:
            wrong = low if low < 0 else high
            raise DataError(
                f"task {wrong} is not one of this adapter's tasks, 0 to {self.count - 1}; attach it with tasks=..."
            )


@dataclasses.dataclass(frozen=True)
class Pass:
    """A training forward of the whole model: what went in, what came out, and another one over the same inputs."""

    model: nn.Module
    args: tuple
    kwargs: dict
    output: object

    def again(self):
        """The output of a second forward, with draws (dropout and the like) of its own; no penalty is added to it."""
        return self.model.forward(*self.args, **self.kwargs)

    def logits(self, output=None) -> torch.Tensor:
        """The logits in this or another output."""
        output = self.output if output is None else output
        return output[1] if isinstance(output, tuple) else output.logits

    @property
    def labels(self) -> torch.Tensor | None:
        return self.kwargs.get("labels")


def _inside(child: nn.Module, source: tuple[int, int], target: tuple[int, int], module, args, output: torch.Tensor):
    pieces = list(output.chunk(target[1], dim=-1))
    pieces[target[0]] = child(pieces[source[0]], pieces[target[0]])
    return torch.cat(pieces, dim=-1)


def _keep_output(child: nn.Module, part: tuple[int, int] | None, module: nn.Module, args: tuple, output: torch.Tensor):
    child.kept_input = output if part is None else output.chunk(part[1], dim=-1)[part[0]]


def _use_output(child: nn.Module, change: Callable, part, module: nn.Module, args: tuple, output: torch.Tensor):
    kept, child.kept_input = child.kept_input, None
    return _after(change, part, module, (kept,), output)


class Host:
    """A frozen backbone, its anatomy, and the list of changes made to it.

    Args:
        model: a transformers model of a family that :mod:`peftlib.anatomy` knows. Every parameter is frozen.
        keep_original: keep copies of backbone parameters that are trained or replaced, so that :meth:`remove` can
            restore them. Costs their memory on the CPU.
    """

    def __init__(self, model: nn.Module, keep_original: bool = True):
        self.model = model
        self.keep_original = keep_original
        self.can_restore = True
        self.children: list[tuple[nn.Module, str, nn.Module]] = []
        self.unfrozen: list[nn.Parameter] = []
        self.written: list[Site] = []
        self.root = self
        self.tasks = Tasks()
        self._anatomy: Anatomy | None = anatomy.of(model)
        self._pass: Pass | None = None
        self._scopes: list[Host] = []
        self._layers: tuple[int, ...] | None = None
        self._gate: Callable | None = None
        self._exchange: Callable[[nn.Module], nn.Module] | None = None
        self._undo: list[Callable[[], None]] = []
        self._baked: list[Callable[[], None]] = []
        self._flags = {name: p.requires_grad for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def scope(
        self,
        layers: Iterable[int] | None = None,
        gate: Callable | None = None,
        exchange: Callable[[nn.Module], nn.Module] | None = None,
    ) -> Host:
        """A host for one part of a combination: it knows its own changes, and the whole undoes them.

        Args:
            layers: positions in ``anatomy.layers``; the part's anatomy has no others.
            gate: ``gate(where, module, name) -> g`` is called for each child ``name`` of ``module`` that computes
                y' from the input x of ``where`` (a site or a layer) and the output y; what it gives scales the child's
                change: y + g(x) (y' - y).
            exchange: ``exchange(child)`` is hung where the part hangs ``child``.
        """
        part = copy.copy(self)
        part.children, part.unfrozen, part.written, part._scopes = [], [], [], []
        if layers is not None:
            part._layers = tuple(layers)
        if gate is not None:
            part._gate = gate
        if exchange is not None:
            part._exchange = exchange
        self._scopes.append(part)
        return part

    @contextmanager
    def trial(self) -> Iterator[Host]:
        """Inside ``with``, a host whose changes act on the model and are no part of the method: they are not counted
        or stored, and are taken back at the end."""
        part = copy.copy(self)
        part.children, part.unfrozen, part.written, part._scopes = [], [], [], []
        part._undo, part._baked = [], []
        try:
            yield part
        finally:
            for undo in reversed(part._undo):
                undo()

    def rehearse(self) -> Rehearsal:
        """A host on which a method only says what it would hang where and train; the model stays as it is."""
        part = copy.copy(self)
        part.__class__ = Rehearsal
        part.children, part.unfrozen, part.written, part._scopes, part._undo = [], [], [], [], []
        return part

    @property
    def anatomy(self) -> Anatomy:
        if self.root._anatomy is None:
            self.root._anatomy = anatomy.of(self.model)
        whole = self.root._anatomy
        if self._layers is None:
            return whole
        return dataclasses.replace(whole, layers=[whole.layers[i] for i in self._layers], whole=False)

    @property
    def passed(self) -> Pass | None:
        """The training forward that just ended, while its penalty is asked for."""
        return self.root._pass

    @passed.setter
    def passed(self, value: Pass | None) -> None:
        self.root._pass = value

    @property
    def device(self) -> torch.device:
        return self.anatomy.embeddings.weight.device

    @property
    def size(self) -> int:
        """How many parameters the backbone has below its task head, without what was added to it."""
        added = {id(p) for part in self.root._parts() for _, _, child in part.children for p in child.parameters()}
        return sum(p.numel() for p in self.anatomy.named_parameters().values() if id(p) not in added)

    # The seams

    def add(self, module: nn.Module, name: str, child: nn.Module) -> nn.Module:
        """Make ``child`` a child of ``module``; the parameters of it that require gradients are trained."""
        if hasattr(module, name):
            raise StateError(f"{type(module).__name__} already has a part named {name!r}; detach() the method first")
        if self._exchange is not None:
            child = self._exchange(child)
        module.add_module(name, child)
        child.train(module.training)
        self.children.append((module, name, child))
        self._undo.append(partial(_take_out, module, name))
        return child

    def after(self, where: Site | nn.Module, name: str, child: nn.Module) -> nn.Module:
        """``y <- child(x, y)`` for the input x and output y of a site or module."""
        module, part = (where.module, where.part) if isinstance(where, Site) else (where, None)
        name = _part_name(name, part)
        child = self.add(module, name, child)
        self._hook(module.register_forward_hook(partial(_after, self._change(where, module, name, child), part)))
        return child

    def behind(self, layer: nn.Module, name: str, child: nn.Module) -> nn.Module:
        """``h <- child(h)`` for the hidden state h that a layer gives, alone or as the first of a tuple."""
        child = self.add(layer, name, child)
        self._hook(layer.register_forward_hook(partial(_behind, child)))
        return child

    def before(self, where: Site | nn.Module, name: str, child: nn.Module) -> nn.Module:
        """``x <- child(x)`` for the input x of a site or module."""
        module = where.module if isinstance(where, Site) else where
        child = self.add(module, name, child)
        self._hook(module.register_forward_pre_hook(partial(_before, child)))
        return child

    def across(self, first: Site | nn.Module, last: Site | nn.Module, name: str, child: nn.Module) -> nn.Module:
        """``y <- child(x, y)`` for the input x of ``first`` and the output y of ``last``, where the child lives."""
        start, last = (w.module if isinstance(w, Site) else w for w in (first, last))
        child = self.add(last, name, child)
        child.kept_input = None
        self._hook(start.register_forward_pre_hook(partial(_keep_input, child)))
        change = self._change(first, last, name, child)
        self._hook(last.register_forward_hook(partial(_use_input, child, change)))
        return child

    def gate(self, where: Site | Layer | nn.Module, module: nn.Module, name: str) -> nn.Module | None:
        """What scales the change of a child ``name`` of ``module``, in a scope that gates; see :meth:`scope`."""
        return None if self._gate is None else self._gate(where, module, name)

    def _change(self, where: Site | Layer | nn.Module, module: nn.Module, name: str, child: nn.Module) -> Callable:
        gate = self.gate(where, module, name)
        return child if gate is None else partial(_through, child, gate)

    def between(self, source: Site, target: Site, name: str, child: nn.Module) -> nn.Module:
        """``y <- child(s, y)`` for the outputs s of ``source`` and y of ``target``, where the child lives; the source
        is computed first, or both are parts of one module."""
        name = _part_name(name, target.part)
        child = self.add(target.module, name, child)
        change = self._change(target, target.module, name, child)
        if source.module is target.module:
            self._hook(target.module.register_forward_hook(partial(_inside, change, source.part, target.part)))
            return child
        child.kept_input = None
        self._hook(source.module.register_forward_hook(partial(_keep_output, child, source.part)))
        self._hook(target.module.register_forward_hook(partial(_use_output, child, change, target.part)))
        return child

    def hook(self, module: nn.Module, function: Callable, *args, before: bool = False) -> None:
        """A raw hook, ``function(*args, module, call_args, call_kwargs[, output])``, for inputs given by keyword."""
        register = module.register_forward_pre_hook if before else module.register_forward_hook
        self._hook(register(partial(function, *args), with_kwargs=True))

    def parametrize(self, parameter: nn.Parameter, child: nn.Module) -> nn.Module:
        """Compute a backbone parameter as ``child(parameter)`` at every use, on each module that shares it."""
        owners = [
            (m, n)
            for m in self.model.modules()
            if not isinstance(m, parametrize.ParametrizationList)
            for n, p in m._parameters.items()
            if p is parameter
        ]
        if not owners:
            raise StateError("a weight is computed by another method already; detach() that one, or combine others")
        child.to(parameter.device)
        for module, name in owners:
            self._undo.append(partial(_unparametrize, module, name, list(module._parameters)))
            parametrize.register_parametrization(module, name, child, unsafe=True)
        module, name = owners[0]
        self.children.append((module.parametrizations[name], "0", child))
        self._baked.append(partial(_bake, parameter, child))
        return child

    def train(self, parameters: Iterable[nn.Parameter]) -> None:
        """Train these parameters of the backbone (biases, norms, a head) in place."""
        for parameter in parameters:
            if any(parameter is p for p in self.unfrozen):
                continue
            parameter.requires_grad_(True)
            self.unfrozen.append(parameter)
            self.restore_on_undo(parameter)

    def write(self, site: Site) -> torch.Tensor | None:
        """Declare that the method writes into a site's frozen weight, without a gradient. Gives the weight (out, in) as
        it is now, on the CPU; None where no copy is kept."""
        weight = site.module._parameters.get("weight")
        if weight is None or weight.requires_grad:
            raise StateError(f"the weight of {site} is computed or trained by another method; detach() that one first")
        self.written.append(site)
        kept = [undo.args[1] for undo in self._undo if _puts_back(undo, weight)]
        original = kept[0] if kept else self.restore_on_undo(weight)
        if original is None:
            return None
        return (original.T if site.transposed else original)[site.rows]

    def restore_on_undo(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """Promise that :meth:`remove` puts this parameter's present values back; gives the copy of them."""
        if not self.keep_original or parameter.is_meta:
            self.root.can_restore = self.root.can_restore and self.keep_original
            return None
        original = parameter.detach().cpu().clone()
        self._undo.append(partial(_copy, parameter, original))
        return original

    def replace(self, path: str, module: nn.Module) -> nn.Module:
        """Put ``module`` in the place of the one at ``path``; sites are looked up anew.

        The old one waits on the CPU, except for parameters that ``module`` shares with it; a merge leaves ``module``
        where it is.
        """
        parent, _, name = path.rpartition(".")
        owner = self.model.get_submodule(parent)
        old = owner._modules[name]
        module.train(old.training)
        owner._modules[name] = module
        if self.keep_original:
            shared = {id(parameter) for parameter in module.parameters()}
            for parameter in old.parameters():
                if id(parameter) not in shared and not parameter.is_meta:
                    parameter.data = parameter.data.cpu()
            self._undo.append(partial(_put, owner, name, old))
        else:
            self.root.can_restore = False
        self.root._anatomy = None  # looked up when it is next asked for
        return module

    def swap(self, module: nn.Module, name: str, values: torch.Tensor) -> None:
        """Put a frozen parameter of these values, of any shape, in the place of one of a module's.

        The old one waits on the CPU; a merge leaves the new one where it is.
        """
        old = module._parameters[name]
        module._parameters[name] = nn.Parameter(values.detach(), requires_grad=False)
        if self.keep_original:
            old.data = old.data.cpu()
            self.on_remove(partial(_put_parameter, module, name, old), restores=True)
        else:
            self.root.can_restore = False

    def set(self, module: nn.Module, name: str, value: object) -> None:
        """Change an attribute of a module; a merge leaves it changed."""
        self.on_remove(partial(setattr, module, name, getattr(module, name)), restores=True)
        setattr(module, name, value)

    def on_remove(self, function: Callable[[], None], restores: bool = False) -> None:
        """Call ``function`` when the method leaves, in reverse order of registration; one that ``restores`` old values
        of the backbone is left out of a merge.

        Give ``functools.partial`` over a module-level function with the modules and tensors as arguments: a deep copy
        of the model then undoes its own changes, where a closure or a bound method of a container would undo the
        original's.
        """
        self._undo.append(partial(_restore, function) if restores else function)

    def name_once(self) -> None:
        """Let the model's state dict have one name for each tensor that children share, as files without pickle want
        it: a checkpoint of the whole model can then be written, and read back without strictness."""
        kinds = (self.model.named_parameters, self.model.named_buffers)
        first = {n for kind in kinds for n, _ in kind()}
        mine = {id(t) for child in self.paths().values() for t in (*child.parameters(), *child.buffers())}
        again = tuple(n for kind in kinds for n, t in kind(remove_duplicate=False) if id(t) in mine and n not in first)
        if again:
            self._hook(self.model.register_state_dict_post_hook(partial(_without, again)))

    def take_task_ids(self) -> None:
        """Let the model's forward accept ``task_ids`` (rows,), whether or not the method asks for them."""
        self.hook(self.model, partial(_take_task_ids, self.tasks), before=True)
        self.hook(self.model, partial(_leave_model, self.tasks))

    def _hook(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self._undo.append(handle.remove)

    # What follows from the declarations

    def trained(self) -> dict[str, nn.Parameter]:
        """Name in the model -> parameter, for every parameter that trains."""
        ids = {id(p) for part in self._parts() for p in part.unfrozen}
        ids |= {
            id(p)
            for part in self._parts()
            for _, _, child in part.children
            for p in child.parameters()
            if p.requires_grad
        }
        return {n: p for n, p in self.model.named_parameters() if id(p) in ids}

    def paths(self) -> dict[str, nn.Module]:
        """Name in the model -> child module; a child shared by several owners appears once."""
        ids = {id(child) for part in self._parts() for _, _, child in part.children}
        return {name: module for name, module in self.model.named_modules() if id(module) in ids}

    def owned(self) -> dict[str, torch.Tensor]:
        """Name in the model -> boolean mask, for frozen parameters into which a method writes: the entries that it
        owns. All other entries of every frozen parameter stay bit-identical."""
        masks = {
            f"{path.rpartition('.')[0]}.original": child.owned
            for path, child in self.paths().items()
            if hasattr(child, "owned")
        }
        names = {id(p): n for n, p in self.model.named_parameters()}
        for site in (site for part in self._parts() for site in part.written):
            weight = site.module.weight
            mask = masks.setdefault(names[id(weight)], torch.zeros_like(weight, dtype=torch.bool))
            (mask.T if site.transposed else mask)[site.rows] = True
        return masks

    def _parts(self) -> list[Host]:
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
        tensors.update(self.trained())
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

    def remove(self, bake: bool = False) -> None:
        """Take every change back: bit for bit, or, with ``bake``, after writing parametrized weights into the backbone
        and keeping trained parameters as they are."""
        if bake:
            for function in self._baked:
                function()
        for undo in reversed(self._undo):
            if not (bake and _restores(undo)):
                undo()
        self._undo.clear()
        for part in self._parts():
            part.children.clear()
            part.unfrozen.clear()
            part.written.clear()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._flags.get(name, False))
            parameter.grad = None


class Rehearsal(Host):
    """See :meth:`Host.rehearse`: ``children`` and ``unfrozen`` are what would be there. For methods that hang children
    and train parameters; those that parametrize, write or replace cannot be rehearsed."""

    def add(self, module: nn.Module, name: str, child: nn.Module) -> nn.Module:
        self.children.append((module, name, child))
        return child

    def train(self, parameters: Iterable[nn.Parameter]) -> None:
        self.unfrozen.extend(parameters)

    def _hook(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        handle.remove()

    def _refuse(self, *_) -> None:
        raise StateError("this method changes weights of the backbone itself, so what it would hang cannot be told")

    parametrize = write = replace = _refuse


def _take_task_ids(tasks: Tasks, module: nn.Module, args: tuple, kwargs: dict):
    tasks.given, tasks.running = kwargs.pop("task_ids", None), True
    if tasks.given is not None and not torch.compiler.is_compiling():
        tasks.check(tasks.given)
    return args, kwargs


def _leave_model(tasks: Tasks, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
    tasks.running = False


def _part_name(name: str, part: tuple[int, int] | None) -> str:
    return name if part is None else f"{name}_{part[0]}"


def _without(names: tuple[str, ...], module: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
    for name in names:
        state.pop(prefix + name, None)


def _take_out(module: nn.Module, name: str) -> None:
    del module._modules[name]


def _put(owner: nn.Module, name: str, module: nn.Module) -> None:
    present = owner._modules[name]
    device = next((tensor.device for tensor in (*present.parameters(), *present.buffers())), None)
    owner._modules[name] = module if device is None else module.to(device)


def _put_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    present = module._parameters[name]
    parameter.data = parameter.data.to(present.device, present.dtype)
    module._parameters[name] = parameter


def _unparametrize(module: nn.Module, name: str, order: list[str]) -> None:
    """Make the parameter plain again, in its old place among the module's."""
    # torch keeps the computed parameter on a class of the module's own and takes it from there; deep copies share that
    # class, so this module gets its own first.
    shared = type(module)
    module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    for other in order:
        if other in module._parameters:
            module._parameters[other] = module._parameters.pop(other)


def _bake(parameter: nn.Parameter, child: nn.Module) -> None:
    parameter.data.copy_(child(parameter).detach())


def _copy(parameter: nn.Parameter, original: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(original)


def _puts_back(undo: Callable, parameter: nn.Parameter) -> bool:
    return isinstance(undo, partial) and undo.func is _copy and undo.args[0] is parameter


def _restore(function: Callable[[], None]) -> None:
    function()


def _restores(undo: Callable) -> bool:
    """Whether this undo step puts old values back, which a merge must not do."""
    return isinstance(undo, partial) and undo.func in (_copy, _put, _restore)
