"""Where a backbone keeps its parts, by meaning.

>>> parts = anatomy.of(model)
>>> [site.path for site in parts.sites(("attention.query",))]
['bert.encoder.layer.0.attention.self.query', ...]

Site names: ``attention.query|key|value|output``, ``cross_attention.*``, ``ffn.up|gate|down``. Patterns are matched
with shell wildcards against a site's name and against its module path, so ``*attention.query`` finds the queries of
self- and cross-attention and ``bert.encoder.layer.0.*`` finds a layer.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from peftlib.anatomy import weights
from peftlib.anatomy.families import FAMILIES, Family, Stack
from peftlib.errors import TargetError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Anatomy", "Layer", "Site", "families", "of", "runs"]

_PART = re.compile(r"^(?P<path>.*)\[(?P<index>\d+)/(?P<of>\d+)\]$")


def families() -> tuple[str, ...]:
    """The ``config.model_type`` values that have a table."""
    return tuple(t for family in FAMILIES for t in family.model_types)


@dataclass(frozen=True, eq=False)
class Site:
    """One linear map of a layer, or one part of a fused one.

    ``part`` is ``(index, of)`` for a fused projection (GPT-2's ``c_attn``), else None.
    """

    name: str
    stack: str
    layer: int
    path: str
    module: nn.Module
    part: tuple[int, int] | None = None

    @property
    def _map(self) -> Any:
        """The module: an nn.Linear, a Conv1D, or one that has taken its place and has its attributes."""
        return self.module

    @property
    def transposed(self) -> bool:
        """Whether the module stores its weight as (in, out), as transformers' Conv1D does."""
        return weights.transposed(self.module)

    @property
    def in_features(self) -> int:
        return self._map.nx if self.transposed else self._map.in_features

    @property
    def out_features(self) -> int:
        total = self._map.nf if self.transposed else self._map.out_features
        return total // self.part[1] if self.part else total

    @property
    def rows(self) -> slice:
        """The part's rows of the (out, in) weight."""
        start = self.part[0] * self.out_features if self.part else 0
        return slice(start, start + self.out_features)

    @property
    def weight(self) -> torch.Tensor:
        """The (out_features, in_features) weight; a view, so writing to it changes the module. Of a packed or offloaded
        weight it is a copy in floating point (:mod:`peftlib.anatomy.weights`); within a merge a packed one is unpacked
        first."""
        return weights.of(self.module)[self.rows]

    @property
    def packed(self) -> str | None:
        """The form in which the weight is kept, where it is not plain numbers: "Params4bit", "int8", ...; else None."""
        return weights.packed(self.module)

    @property
    def bias(self) -> torch.Tensor | None:
        """The (out_features,) bias as a view, or None."""
        bias = getattr(self.module, "bias", None)
        if bias is not None and weights.offloaded(self.module):
            bias = weights.onloaded(self.module, "bias")
        return None if bias is None else bias[self.rows]

    def __str__(self) -> str:
        part = f"[{self.part[0]}/{self.part[1]}]" if self.part else ""
        return f"{self.path}{part}"


@dataclass(frozen=True, eq=False)
class Layer:
    """One transformer layer. ``attention`` and ``cross_attention`` are the modules that call the attention function."""

    stack: str
    index: int
    path: str
    module: nn.Module
    attention: nn.Module
    cross_attention: nn.Module | None
    sites: dict[str, Site]
    norms: dict[str, nn.Module]
    pre_norm: bool


@dataclass(eq=False)
class Anatomy:
    """The parts of one model. Built by :func:`of`."""

    model: PreTrainedModel
    family: Family
    layers: list[Layer] = field(default_factory=list)
    """Encoder layers first, then decoder layers."""
    whole: bool = True
    """Whether these are all layers of the model."""

    @property
    def base(self) -> nn.Module:
        """The model below the task head."""
        return self.model.base_model

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def d(self) -> int:
        """Hidden size."""
        return self.config.hidden_size

    @property
    def f(self) -> int:
        """Inner size of the feed-forward block."""
        return getattr(self.config, self.family.inner) or 4 * self.d

    @property
    def heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values; fewer than ``heads`` with grouped-query attention."""
        return getattr(self.config, "num_key_value_heads", None) or self.heads

    @property
    def head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or getattr(self.config, "d_kv", None) or self.d // self.heads

    def head_size(self, attention: nn.Module) -> int:
        """The width of a head of this attention module; the stacks of a model may differ in it."""
        return getattr(attention, "head_dim", None) or self.head_dim

    @property
    def num_layers(self) -> int:
        """Layers of all stacks together."""
        return len(self.layers)

    @property
    def vocabulary(self) -> int:
        return self.config.vocab_size

    def token_id(self, role: str) -> int | None:
        """The id of the special token "cls", "sep" or "mask" where the config knows it, as it does for a backbone from
        ``peftlib.backbones``, which asks the tokenizer; else None."""
        found = getattr(self.config, f"{role}_token_id", None)
        if found is None and (other := self.family.special_tokens.get(role)):
            found = getattr(self.config, f"{other}_token_id", None)
        return found

    @property
    def embeddings(self) -> nn.Embedding:
        """The input word embedding."""
        return cast(nn.Embedding, self.model.get_input_embeddings())

    @property
    def first_position(self) -> int:
        """The position id of the first token."""
        return self.config.pad_token_id + 1 if self.family.positions == "absolute after padding" else 0

    @property
    def max_length(self) -> int | None:
        """The longest input that the backbone has positions for; None where positions are relative or rotary."""
        if self.family.positions == "relative":
            return None
        return self.config.max_position_embeddings - self.first_position

    @property
    def sliding_window(self) -> int | None:
        """How many positions back an attention of the model looks; None where all look at the whole text."""
        return getattr(self.config, "sliding_window", None)

    @property
    def stacks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(layer.stack for layer in self.layers))

    def stack_inputs(self, stack: str) -> PreTrainedModel:
        """The module of a stack whose forward takes ``inputs_embeds`` and ``attention_mask``."""
        path = self.family.stacks[stack].inputs
        return cast("PreTrainedModel", self.base.get_submodule(path) if path else self.base)

    def position_module(self) -> nn.Module | None:
        """The module that takes the position ids of the only stack; None where they are relative or there are two."""
        (first, *more) = self.family.stacks.values()
        return self.base.get_submodule(first.positions) if first.positions and not more else None

    def holder(self, stack: str) -> nn.Module:
        """The module whose forward runs a stack's layers one after the other."""
        return self.base.get_submodule(self.family.stacks[stack].layers.rpartition(".")[0])

    def like(self, layer: Layer, module: nn.Module) -> Layer:
        """The parts of another module of a layer's class, such as a slim copy."""
        return _layer(layer.stack, self.family.stacks[layer.stack], layer.index, layer.path, module)

    def final_norm(self, stack: str) -> nn.Module | None:
        """The norm after the last layer of a stack, where the family has one."""
        path = self.family.stacks[stack].final_norm
        return _first(self.base, path) if path else None

    def final_norms(self) -> list[nn.Module]:
        """The norms after the last layer of each stack, where the family has them."""
        return [norm for norm in map(self.final_norm, self.family.stacks) if norm is not None]

    def end(self, stack: str) -> nn.Module:
        """The module whose output is a stack's last hidden state: the norm behind the last layer, or the last layer
        where a projection to another width comes behind it, or the holder of the layers."""
        projection = self.family.stacks[stack].projection
        if projection and _first(self.base, projection) is not None:
            return [layer.module for layer in self.layers if layer.stack == stack][-1]
        return self.final_norm(stack) or self.holder(stack)

    @property
    def generates(self) -> bool:
        """Whether the model has ``generate()``."""
        return bool(getattr(self.model, "can_generate", lambda: False)())

    @cached_property
    def head(self) -> dict[str, nn.Parameter]:
        """The new task head: parameters outside the base model. Empty for (pretrained) language-model heads."""
        if self.base is self.model or self.model.get_output_embeddings() is not None:
            return {}
        inside = {id(p) for p in self.base.parameters()}
        return {n: p for n, p in self.model.named_parameters() if id(p) not in inside}

    @property
    def biases(self) -> dict[str, nn.Parameter]:
        """Every bias below the task head, of linear maps and norms, by name in the model."""
        return {n: p for n, p in self.named_parameters().items() if n.rpartition(".")[2] == "bias"}

    @property
    def scorer(self) -> nn.Linear:
        """The last linear map of the task head, whose outputs are the logits."""
        weights = {id(p) for p in self.head.values()}
        return [m for m in self.model.modules() if isinstance(m, nn.Linear) and id(m.weight) in weights][-1]

    def sites(self, patterns: Sequence[str] | str | None = None, optional: bool = False) -> list[Site]:
        """The sites that match any of the patterns, in forward order; all of them for None or ``"all-linear"``.

        Raises TargetError for a pattern that matches nothing, with the nearest names, and for no pattern at all, unless
        that is meant to switch a part of a method off (``optional``).
        """
        every = [site for layer in self.layers for site in layer.sites.values()]
        if patterns is None or patterns == "all-linear":
            return every
        patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        if not patterns and not optional:
            raise TargetError('targets is empty; name at least one site, or "all-linear"')
        chosen: dict[int, Site] = {}
        names = list(dict.fromkeys(site.name for site in every))
        for pattern in patterns:
            if pattern == "all-linear":
                hits = list(range(len(every)))
            else:
                hits = [
                    i
                    for i, site in enumerate(every)
                    if fnmatch.fnmatchcase(site.name, pattern) or fnmatch.fnmatchcase(site.path, pattern)
                ]
            if not hits:
                near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
                raise TargetError(
                    f"target {pattern!r} matches nothing in {type(self.model).__name__}"
                    + (f"; did you mean {' or '.join(map(repr, near))}?" if near else ";")
                    + f" its sites are {', '.join(names)}"
                    + ' (wildcards and module paths work too, and "all-linear" takes all)'
                )
            chosen.update({i: every[i] for i in hits})
        return [chosen[i] for i in sorted(chosen)]

    def norms(self, kinds: Iterable[str] = ("attention", "cross_attention", "ffn")) -> list[nn.Module]:
        """The layers' norms of these kinds, in forward order."""
        return [layer.norms[kind] for layer in self.layers for kind in kinds if kind in layer.norms]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters below the task head by name in the model; of a view of some layers, theirs."""
        roots = [self.base] if self.whole else [layer.module for layer in self.layers]
        inside = {id(p) for root in roots for p in root.parameters()}
        return {n: p for n, p in self.model.named_parameters() if id(p) in inside}

    def describe(self, paths: Iterable[str]) -> list[str]:
        """Which parts of which layers these module paths are or lie in, one line for each set of layers:
        ``"attention.query, attention.value in encoder layers 0-5 of 6"``. Paths outside the layers are left out."""
        paths = sorted(paths)
        found: dict[tuple[str, int, tuple[int, ...]], list[str]] = {}
        for stack in self.stacks:
            mine = [layer for layer in self.layers if layer.stack == stack]
            at: dict[str, list[int]] = {}
            for layer in mine:
                for path in (p for p in paths if p == layer.path or p.startswith(f"{layer.path}.")):
                    for name in self._parts_at(layer, path):
                        at.setdefault(name, []).append(layer.index)
            order = [*mine[0].sites, *at]
            for name, layers in sorted(at.items(), key=lambda item: order.index(item[0])):
                found.setdefault((stack, len(mine), tuple(sorted(set(layers)))), []).append(name)
        return [
            f"{', '.join(names)} in {stack} {_layers(layers)} of {total}"
            for (stack, total, layers), names in found.items()
        ]

    def _parts_at(self, layer: Layer, path: str) -> list[str]:
        """What stands at a path inside a layer: its sites, else the part of it, else the layer itself."""
        sites = [s for s in layer.sites.values() if path == s.path or path.startswith(f"{s.path}.")]
        if sites:
            own = [s for s in sites if s.part is not None and path.endswith(f"_{s.part[0]}")]
            return [s.name for s in own or sites]
        parts = {"attention": layer.attention, "cross_attention": layer.cross_attention}
        parts |= {f"norms.{kind}": norm for kind, norm in layer.norms.items()}
        for name, module in parts.items():
            at = next((n for n, m in layer.module.named_modules() if m is module), None)
            if at is not None and f"{path}.".startswith(f"{layer.path}.{at}."):
                return [name]
        return ["the layer"]

    def path(self, module: nn.Module) -> str:
        """The module's name in the model."""
        for name, candidate in self.model.named_modules():
            if candidate is module:
                return name
        raise TargetError(f"{type(module).__name__} is not part of {type(self.model).__name__}")


def runs(indices: Sequence[int]) -> str:
    """``(0, 1, 2, 5)`` as "0-2, 5"."""
    found: list[list[int]] = []
    for index in indices:
        if found and index == found[-1][-1] + 1:
            found[-1].append(index)
        else:
            found.append([index])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in found)


def _layers(indices: Sequence[int]) -> str:
    """``(0, 1, 2, 5)`` as "layers 0-2, 5"."""
    return f"layer{'s' if len(indices) > 1 else ''} {runs(indices)}"


def _first(module: nn.Module, paths: str) -> nn.Module | None:
    for path in paths.split("|"):
        try:
            return module.get_submodule(path)
        except AttributeError:
            continue
    return None


def _layer(stack: str, table: Stack, index: int, path: str, module: nn.Module) -> Layer:
    sites = {}
    for name, location in table.sites.items():
        part = None
        if match := _PART.match(location):
            location, part = match["path"], (int(match["index"]), int(match["of"]))
        found = _first(module, location)
        if found is not None:
            relative = next(n for n, m in module.named_modules() if m is found)
            sites[name] = Site(name, stack, index, f"{path}.{relative}", found, part)
    return Layer(
        stack=stack,
        index=index,
        path=path,
        module=module,
        attention=module.get_submodule(table.attention),
        cross_attention=module.get_submodule(table.cross_attention) if table.cross_attention else None,
        sites=sites,
        norms={kind: module.get_submodule(p) for kind, p in table.norms.items()},
        pre_norm=getattr(module, table.norm_first, table.pre_norm) if table.norm_first else table.pre_norm,
    )


def _check_transformers(model: nn.Module) -> None:
    from transformers import PreTrainedModel  # late: the tables need no transformers

    kind = type(model).__name__
    foreign = next((m for m in model.modules() if type(m).__module__.partition(".")[0] in ("peft", "adapters")), None)
    if foreign is not None:
        raise UnsupportedError(
            f"{kind} holds layers of another library ({type(foreign).__module__}.{type(foreign).__name__}); take the "
            "plain model out of it first, as merge_and_unload() or unload() of HF peft's models do, or load the "
            "backbone again. peftlib.from_hf_peft reads HF peft's saved adapters."
        )
    if isinstance(model, PreTrainedModel):
        return
    inside: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(name.startswith(f"{outer}.") for outer in inside):
            inside.append(name)
    if not inside:
        raise UnsupportedError(
            f"{kind} is no model of transformers and holds none; peftlib knows where those keep their parts. "
            f"Known: {', '.join(families())}."
        )
    paths = ["model" + "".join(f"[{n}]" if n.isdigit() else f".{n}" for n in name.split(".")) for name in inside]
    raise UnsupportedError(
        f"{kind} is a module around {'models' if len(paths) > 1 else 'a model'} of transformers; attach to "
        f"{'one of them' if len(paths) > 1 else 'that'}: "
        f"{' or '.join(f'attach({path}, ...)' for path in paths)}. {kind} then computes with the adapter. Wrap and "
        "compile after attaching."
    )


def of(model: nn.Module) -> Anatomy:
    """The anatomy of a transformers model.

    Raises UnsupportedError for a family without a table, which lists the known ones and how to add one; for a module
    that is none of transformers' models, which names those inside it; and for one with layers of another library.
    """
    _check_transformers(model)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    family = next((f for f in FAMILIES if kind in f.model_types), None)
    if family is None:
        raise UnsupportedError(
            f"peftlib does not know where a model of type {kind or type(model).__name__!r} keeps its parts. "
            f"Known: {', '.join(families())}. To add a family, add one Family entry (paths of its attention, "
            "feed-forward and norm modules) to peftlib/anatomy/families.py."
        )
    parts = Anatomy(cast("PreTrainedModel", model), family)
    base_path = next((f"{n}." for n, m in model.named_modules() if m is parts.base and n), "")
    for stack, table in family.stacks.items():
        holder = cast("nn.ModuleList | None", _first(parts.base, table.layers))
        for index, layer in enumerate(holder if holder is not None else ()):
            parts.layers.append(_layer(stack, table, index, f"{base_path}{table.layers}.{index}", layer))
    if not parts.layers:
        raise UnsupportedError(f"{type(model).__name__} of family {family.name} has no transformer layers to adapt")
    return parts
