"""The seams through which a frozen network is changed.

A :class:`Host` is one backbone while a method is attached to it. Methods never touch a model directly: they ask the
host to hang a child module on a site, to parametrize a weight, to extend an attention or to train some of the
backbone's own parameters. What follows from the changes is in :mod:`peftlib.mechanisms.changes`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NoReturn, TypeVar, cast

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from peftlib import anatomy
from peftlib.anatomy import Anatomy, Layer, Site, weights
from peftlib.errors import StateError, UnsupportedError
from peftlib.mechanisms import call, pickling, precision, undo
from peftlib.mechanisms.changes import Changes
from peftlib.mechanisms.outputs import Args, state_of, with_state
from peftlib.mechanisms.tasks import Tasks, enter_model, generate_with_tasks, leave_model

Part = tuple[int, int]
"""``(index, of)``: one of so many equal parts of a fused map's output; see :class:`peftlib.anatomy.Site`."""
Change = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
"""From the module that a child hangs on, its input x and its output y to the new output."""
Gate = Callable[[Site | Layer | nn.Module, nn.Module, str], nn.Module]
"""See :meth:`Host.scope`."""
Replacement = TypeVar("Replacement", bound=nn.Module)


# Hooks find a child by its name on the module that they are handed: in a replica of the model it is another one.


def _changed(name: str, gate: str | None, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    changed = getattr(module, name)(x, y)
    return changed if gate is None else y + (getattr(module, gate)(x) * (changed - y)).to(y.dtype)


def _after(change: Change, part: Part | None, module: nn.Module, args: Args, output: torch.Tensor) -> torch.Tensor:
    x = args[0].to(output.device)  # accelerate brings it to the module after the hooks before the forward
    if part is None:
        return change(module, x, output)
    index, of = part
    pieces = list(output.chunk(of, dim=-1))
    pieces[index] = change(module, x, pieces[index])
    return torch.cat(pieces, dim=-1)


def _before(name: str, module: nn.Module, args: Args) -> Args:
    return (getattr(module, name)(args[0]), *args[1:])


def _after_layer(name: str, module: nn.Module, args: Args, output: Any) -> Any:
    return with_state(output, getattr(module, name)(state_of(output)))


def _keep_input(kept: call.Handed, module: nn.Module, args: Args) -> None:
    kept.value = args[0]


def _keep_output(kept: call.Handed, part: Part | None, module: nn.Module, args: Args, output: torch.Tensor) -> None:
    kept.value = output if part is None else output.chunk(part[1], dim=-1)[part[0]]


def _use_kept(
    kept: call.Handed, change: Change, part: Part | None, module: nn.Module, args: Args, output: torch.Tensor
) -> torch.Tensor:
    return _after(change, part, module, (kept.take(),), output)


def _from_part(
    change: Change, source: Part, target: Part, module: nn.Module, args: Args, output: torch.Tensor
) -> torch.Tensor:
    pieces = list(output.chunk(target[1], dim=-1))
    pieces[target[0]] = change(module, pieces[source[0]], pieces[target[0]])
    return torch.cat(pieces, dim=-1)


class Host(Changes):
    """A frozen backbone, its anatomy, and the seams through which a method changes it.

    Args:
        model: a transformers model of a family that :mod:`peftlib.anatomy` knows. Every parameter is frozen.
        keep_original: keep copies of backbone parameters that are trained or replaced, so that :meth:`remove` can
            restore them. Costs their memory on the CPU.
        keep_half: on a half-precision backbone let what trains be in half precision too.
    """

    root: Host

    def __init__(self, model: nn.Module, keep_original: bool = True, keep_half: bool = False):
        super().__init__(model, keep_original)
        self.keep_half = keep_half
        self.tasks = Tasks()
        self._anatomy: Anatomy | None = anatomy.of(model)
        self._layers: tuple[int, ...] | None = None
        self._gate: Gate | None = None
        self._exchange: Callable[[nn.Module], nn.Module] | None = None
        self._temporary: list[Host] = []
        for module in model.modules():
            # bitsandbytes orders 4-bit codes for a CPU kernel in an evaluation, and has no gradient from then on.
            if getattr(module, "support_avx512bf16_for_cpu", False):
                module.state_dict()  # takes the order back
                self.set(module, "support_avx512bf16_for_cpu", False)

    def scope(
        self,
        layers: Iterable[int] | None = None,
        gate: Gate | None = None,
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
        part = self._part()
        if layers is not None:
            part._layers = tuple(layers)
        if gate is not None:
            part._gate = gate
        if exchange is not None:
            part._exchange = exchange
        self._scopes.append(part)
        return part

    @contextmanager
    def temporary(self) -> Iterator[Host]:
        """Inside ``with``, a host whose changes act on the model and are no part of the method: they are not counted
        or stored, and are taken back at the end."""
        part = self._part()
        part._undo, part._merges = [], []
        self.root._temporary.append(part)
        try:
            yield part
        finally:
            for step in reversed(part._undo):
                step()
            self.root._temporary.remove(part)

    def trains_for_now(self) -> set[int]:
        """The ids of the parameters of :meth:`temporary` changes."""
        parts = [part for temporary in self.root._temporary for part in temporary._parts()]
        hung = [p for part in parts for _, _, child in part.children for p in child.parameters()]
        return {id(p) for p in (*hung, *(p for part in parts for p in part.unfrozen))}

    def dry_run(self) -> DryRun:
        """A host on which a method only says what it would hang where and train; the model stays as it is."""
        part = self._part()
        part.__class__ = DryRun
        part._undo = []
        return cast(DryRun, part)

    @property
    def anatomy(self) -> Anatomy:
        if self.root._anatomy is None:
            self.root._anatomy = anatomy.of(self.model)
        whole = self.root._anatomy
        if self._layers is None:
            return whole
        return dataclasses.replace(whole, layers=[whole.layers[i] for i in self._layers], whole=False)

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        return weights.device(self.anatomy.embeddings) or torch.device("cpu")

    @property
    def size(self) -> int:
        """How many parameters the backbone has below its task head, without what was added to it."""
        added = {id(p) for part in self.root._parts() for _, _, child in part.children for p in child.parameters()}
        found = 0
        for root in [self.anatomy.base] if self.anatomy.whole else [layer.module for layer in self.anatomy.layers]:
            here = {n for n, p in root.named_parameters() if id(p) in added}
            found += sum(torch.Size(shape).numel() for n, shape in weights.shapes(root).items() if n not in here)
        return found

    # The seams

    def add(self, module: nn.Module, name: str, child: nn.Module) -> nn.Module:
        """Make ``child`` a child of ``module``; the parameters of it that require gradients are trained."""
        if hasattr(module, name):
            raise StateError(f"{type(module).__name__} already has a part named {name!r}; detach() the method first")
        if self._exchange is not None:
            child = self._exchange(child)
        module.add_module(name, child)
        self._fit(child, module)
        child.train(module.training)
        self.children.append((module, name, child))
        self._undo.append(partial(undo.take_out, module, name))
        return child

    def after(self, where: Site | nn.Module, name: str, child: nn.Module) -> nn.Module:
        """``y <- child(x, y)`` for the input x and output y of a site or module."""
        module, part = _place(where)
        name = _part_name(name, part)
        child = self.add(module, name, child)
        self._hook(module.register_forward_hook(partial(_after, self._change(where, module, name), part)))
        return child

    def after_layer(self, layer: nn.Module, name: str, child: nn.Module) -> nn.Module:
        """``h <- child(h)`` for the hidden state h that a layer gives, alone or as the first of a tuple."""
        child = self.add(layer, name, child)
        self._hook(_before_recorders(layer, layer.register_forward_hook(partial(_after_layer, name))))
        return child

    def before(self, where: Site | nn.Module, name: str, child: nn.Module) -> nn.Module:
        """``x <- child(x)`` for the input x of a site or module."""
        module, _ = _place(where)
        child = self.add(module, name, child)
        self._hook(module.register_forward_pre_hook(partial(_before, name)))
        return child

    def connect(
        self,
        source: Site | nn.Module,
        target: Site | nn.Module,
        name: str,
        child: nn.Module,
        reads: Literal["input", "output"] = "input",
    ) -> nn.Module:
        """``y <- child(s, y)`` for the input (or output) s of ``source`` and the output y of ``target``, where the
        child lives. The source is computed first; both may be parts of one module, whose output is read."""
        (first, source_part), (last, part) = map(_place, (source, target))
        name = _part_name(name, part)
        child = self.add(last, name, child)
        change = self._change(source if reads == "input" else target, last, name)
        if reads == "output" and first is last:
            assert source_part is not None and part is not None, "the source and the target are two parts of a module"
            self._hook(last.register_forward_hook(partial(_from_part, change, source_part, part)))
            return child
        kept = call.Handed()
        if reads == "input":
            self._hook(first.register_forward_pre_hook(partial(_keep_input, kept)))
        else:
            self._hook(first.register_forward_hook(partial(_keep_output, kept, source_part)))
        self._hook(last.register_forward_hook(partial(_use_kept, kept, change, part)))
        return child

    def gate(self, where: Site | Layer | nn.Module, module: nn.Module, name: str) -> nn.Module | None:
        """What scales the change of a child ``name`` of ``module``, in a scope that gates; see :meth:`scope`."""
        return None if self._gate is None else self._gate(where, module, name)

    def _change(self, where: Site | Layer | nn.Module, module: nn.Module, name: str) -> Change:
        gate = self.gate(where, module, name)
        return partial(_changed, name, None if gate is None else undo.name_of(module, gate))

    def hook(
        self, module: nn.Module, function: Callable[..., Any], *args: Any, before: bool = False, stays: bool = False
    ) -> None:
        """A raw hook, ``function(*args, module, call_args, call_kwargs[, output])``, for inputs given by keyword. On a
        model of transformers it acts also where a program calls the model's ``forward`` itself. One
        that ``stays`` acts while the method is suspended too.

        A function that is to work in the replicas of torch's DataParallel takes no module among ``args``: it finds its
        child by name on the module that it is handed. Others are refused there.
        """
        if any(isinstance(arg, nn.Module) for arg in args):
            self.refuse_replicas()
        function = partial(function, *args)
        if isinstance(module, PreTrainedModel):
            forward = call.around(module)
            self._hook(call.Place(forward, forward.before if before else forward.behind, function), stays)
        else:
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            self._hook(_before_recorders(module, register(function, with_kwargs=True)), stays)

    def at_end(self, module: PreTrainedModel, function: Callable[..., Any], *args: Any, stays: bool = False) -> None:
        """Call ``function(*args, module)`` whenever the model's forward ends, also where it raises."""
        forward = call.around(module)
        self._hook(call.Place(forward, forward.leaving, partial(function, *args)), stays)

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
        self.check_writable([parameter])
        self._fit(child, owners[0][0])
        for module, name in owners:
            self._undo.append(partial(undo.unparametrize, module, name, list(module._parameters)))
            parametrize.register_parametrization(module, name, child, unsafe=True)
            pickling.allow(module)
        module, name = owners[0]
        lists = cast(nn.ModuleDict, module.parametrizations)
        self.children.append((lists[name], "0", child))
        self._merges.append(partial(undo.write_computed, parameter, child))
        return child

    def train(self, parameters: Iterable[nn.Parameter]) -> None:
        """Train these parameters of the backbone (biases, norms, a head) in place. Those in half precision become
        float32, and the backbone computes with them as before (:mod:`peftlib.mechanisms.precision`)."""
        new = [p for p in parameters if not any(p is other for other in self.unfrozen)]
        self.check_writable(new)
        for parameter in new:
            self.restore_on_undo(parameter)
        if not self.keep_half:
            self._undo += precision.to_float32(self.model, new)
        for parameter in new:
            parameter.requires_grad_(True)
            self.unfrozen.append(parameter)

    def check_writable(self, parameters: Iterable[nn.Parameter]) -> None:
        """Raise UnsupportedError where one of these parameters of the backbone is no plain tensor that stays where it
        is: where it is packed by a quantization, or offloaded."""
        ids = {id(p) for p in parameters}
        for path, module in self.model.named_modules():
            for name, parameter in module._parameters.items():
                if id(parameter) not in ids:
                    continue
                if weights.is_packed(parameter) or (name == "weight" and weights.packed(module)):
                    form = weights.packed(module) or parameter.dtype
                    raise UnsupportedError(
                        f"{path}.{name} is quantized ({form}), and this method trains it, changes it or needs its "
                        f"gradient. {weights.WAY_OUT}"
                    )
                if weights.offloaded(module):
                    raise UnsupportedError(
                        f"{path}.{name} is offloaded, so it cannot be trained or changed; name {path!r} in device_map "
                        "to keep it on a device, leave a head as it is with train_head=False, or choose a method that "
                        "leaves weights as they are (lora, ia3, ...)"
                    )

    def check_dense(self, sites: Iterable[Site]) -> None:
        """:meth:`check_writable` for the weights of these sites."""
        for site in sites:
            if (form := site.packed) is not None:
                raise UnsupportedError(
                    f"the weight of {site} is quantized ({form}), and this method changes it or needs its gradient. "
                    + weights.WAY_OUT
                )
            self.check_writable(p for p in [site.module._parameters.get("weight")] if p is not None)

    def _fit(self, child: nn.Module, module: nn.Module) -> None:
        """Bring a new child to the device of the module that it changes and, where half precision is kept, to its
        dtype."""
        device = weights.device(module)
        if device is not None and any(p.device != device for p in child.parameters()):
            hung = {id(p) for part in self.root._parts() for _, _, other in part.children for p in other.parameters()}
            if any(id(p) in hung for p in child.parameters()):
                raise UnsupportedError(
                    f"this method's parts share parameters, and the model has them on {self.device} and {device}; put "
                    "it on one device (device_map), or choose a method that shares nothing (lora, ia3, ...)"
                )
            child.to(device)
        if self.keep_half:
            dtype = next((p.dtype for p in module.parameters() if p.dtype in weights.PLAIN), None)
            if dtype in precision.HALF:
                child.to(dtype)

    def write(self, site: Site) -> torch.Tensor | None:
        """Declare that the method writes into a site's frozen weight, without a gradient. Gives the weight (out, in) as
        it is now, on the CPU; None where no copy is kept."""
        self.check_dense([site])
        weight = site.module._parameters.get("weight")
        if weight is None or weight.requires_grad:
            raise StateError(f"the weight of {site} is computed or trained by another method; detach() that one first")
        written = (other for part in self.root._parts() for other in part.written)
        if any(other.module is site.module and other.rows == site.rows for other in written):
            raise StateError(f"another method writes into the weight of {site}; detach() that one first")
        self.written.append(site)
        kept = [step.args[1] for step in self._undo if undo.puts_back(step, weight)]
        original = kept[0] if kept else self.restore_on_undo(weight)
        if original is None:
            return None
        return (original.T if site.transposed else original)[site.rows]

    def replace(self, path: str, module: Replacement) -> Replacement:
        """Put ``module`` in the place of the one at ``path``; sites are looked up anew.

        The old one waits on the CPU, except for parameters that ``module`` shares with it; a merge leaves ``module``
        where it is.
        """
        parent, _, name = path.rpartition(".")
        owner = self.model.get_submodule(parent)
        old = owner.get_submodule(name)
        if any(m is old for part in self.root._parts() for m, _, _ in part.children):
            raise StateError(f"another method changes what {path} computes, and this one replaces it")
        if weights.offloaded(old):
            raise UnsupportedError(
                f"{path} is offloaded, so nothing can take its place; name it in device_map to keep it on a device"
            )
        module.train(old.training)
        owner._modules[name] = module
        if self.keep_original:
            self._undo.append(partial(undo.put_module, owner, name, old))
            shared = {id(parameter) for parameter in module.parameters()}
            for parameter in old.parameters():
                if id(parameter) not in shared and not parameter.is_meta:
                    parameter.data = parameter.data.cpu()
        else:
            self.root.can_restore = False
        self.root._anatomy = None  # looked up when it is next asked for
        return module

    def swap(self, module: nn.Module, name: str, values: torch.Tensor) -> None:
        """Put a frozen parameter of these values, of any shape, in the place of one of a module's.

        The old one waits on the CPU; a merge leaves the new one where it is.
        """
        old = module.get_parameter(name)
        module._parameters[name] = nn.Parameter(values.detach(), requires_grad=False)
        if self.keep_original:
            self.on_remove(partial(undo.put_parameter, module, name, old), restores=True)
            old.data = old.data.cpu()
        else:
            self.root.can_restore = False

    def set(self, module: nn.Module, name: str, value: object) -> None:
        """Change an attribute of a module; a merge leaves it changed."""
        self.on_remove(partial(setattr, module, name, getattr(module, name)), restores=True)
        setattr(module, name, value)

    def around(self, name: str, function: Callable[..., Any], *args: object, stays: bool = False) -> None:
        """Let ``function(*args, before, ...)`` answer in the place of the model's method ``before`` of this name; one
        that ``stays`` does so while the method is suspended too."""
        model: Any = self.model
        present = vars(model).get(name)
        before = partial(_own_method, name, model) if present is None else present
        self.on_remove(partial(undo.put_attribute, model, name, present, stays))
        setattr(model, name, partial(function, *args, before))

    def around_generate(self, function: Callable[..., Any], *args: object) -> None:
        """Let ``function(*args, generate, ...)`` answer in the place of the model's ``generate(...)``."""
        self.around("generate", function, *args)

    def refuse_replicas(self) -> None:
        """Let torch's DataParallel be told that parts of the method hold each other, as its copies would hold the
        original's."""
        forward = call.around(self.model)
        self.on_remove(partial(setattr, forward, "refusal", forward.refusal))
        forward.refusal = (
            "the parts of this method know each other, and in the replicas of torch's DataParallel they would call "
            "those of the original; use DistributedDataParallel (torchrun), as torch recommends, or one device "
            "(CUDA_VISIBLE_DEVICES=0)"
        )

    def take_task_ids(self) -> None:
        """Let the forward of the model, and of the models inside it that a program may call, accept ``task_ids``
        (rows,), whether or not the method asks for them."""
        parts = self.anatomy
        inputs = [parts.stack_inputs(stack) for stack in parts.stacks]
        for module in {id(m): m for m in (self.model, parts.base, *inputs)}.values():
            self.hook(module, enter_model, self.tasks, before=True, stays=True)
            self.at_end(cast(PreTrainedModel, module), leave_model, self.tasks, stays=True)

    def name_task_ids(self) -> None:
        """Let the model's signature name ``task_ids``, so that ``transformers.Trainer`` keeps the column, and its
        ``generate()`` take them, where the method knows tasks."""
        if self.tasks.count is None:
            return
        call.around(self.model).inputs = ("task_ids",)
        if self.anatomy.generates:
            self.around_generate(generate_with_tasks, self.tasks)


def _own_method(name: str, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A method of the model's class, found by its name: transformers makes some that pickle cannot find."""
    return getattr(type(model), name)(model, *args, **kwargs)


class DryRun(Host):
    """See :meth:`Host.dry_run`: ``children`` and ``unfrozen`` are what would be there. For methods that hang children
    and train parameters; those that parametrize, write or replace have no dry run."""

    def add(self, module: nn.Module, name: str, child: nn.Module) -> nn.Module:
        self.children.append((module, name, child))
        return child

    def train(self, parameters: Iterable[nn.Parameter]) -> None:
        self.unfrozen.extend(parameters)

    def hook(
        self, module: nn.Module, function: Callable[..., Any], *args: Any, before: bool = False, stays: bool = False
    ) -> None:
        pass

    def around(self, name: str, function: Callable[..., Any], *args: object, stays: bool = False) -> None:
        pass

    def _hook(self, handle: call.Handle, stays: bool = False) -> None:
        handle.remove()

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise StateError("this method changes weights of the backbone itself, so what it would hang cannot be told")

    parametrize = write = replace = _refuse


def _before_recorders(module: nn.Module, handle: call.Handle) -> call.Handle:
    """Let the hooks with which transformers records hidden states, once a model was asked for some, see what a method
    makes of an output, and not what was there before it."""
    hooks = module._forward_hooks
    for key in [k for k, h in hooks.items() if str(getattr(h, "__module__", "")).startswith("transformers.")]:
        hooks[key] = hooks.pop(key)
    return handle


def _part_name(name: str, part: Part | None) -> str:
    return name if part is None else f"{name}_{part[0]}"


def _place(where: Site | nn.Module) -> tuple[nn.Module, Part | None]:
    """The module, and which of how many parts of its output is meant; None: all of it."""
    return (where.module, where.part) if isinstance(where, Site) else (where, None)
