"""One kind of adapter in HF peft's files, which of its settings count, and what reading and writing have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from typing import Any

import torch
from torch import nn

from peftlib.anatomy import Anatomy, Site
from peftlib.errors import LoadError, UnsupportedError

Settings = dict[str, Any]
Tensors = dict[str, torch.Tensor]
Fill = Callable[[Any], None]
"""Copies a file's values into an attached method, under ``torch.no_grad``; the method is of the class that has the
format."""

TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForCausalLM": "CAUSAL_LM",
    "GPT2LMHeadModel": "CAUSAL_LM",
}
"""End of a model's class name -> HF peft's name of the task, on which its prompts and prefixes depend."""

EVERY = (
    *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("task_type", "modules_to_save"),
)
"""Settings of every kind that change nothing in what a file's tensors compute: the tensors that are there say which
modules were saved."""

MAPS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out")
"""The like for adapters of linear maps: which ones shows in the tensors' names."""


class Format:
    """One kind of adapter in HF peft's files.

    Every setting of the kind stands in one of three places, so that none is passed over:

    Attributes:
        kind: its ``peft_type``.
        outer: what its tensors' names begin with.
        marks: the settings that tell it from others of its kind: name -> value, or a function of the value.
        used: the settings that are taken over or looked at, with HF peft's defaults.
        unused: those that change nothing in what the tensors compute.
        refused: those under which a file computes, or trains on, in a way that the method does not have; "off" is what
            is not true, and "none".
        reads: False for a method whose files HF peft cannot tell from another's.
    """

    kind: str
    outer = "base_model.model."
    marks: Mapping[str, Any] = {}
    used: Mapping[str, Any] = {}
    unused: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    reads = True

    def claims(self, settings: Settings) -> bool:
        """Whether a file with these settings is one of this method."""
        if settings.get("peft_type") != self.kind or not self.reads:
            return False
        values = ((mark, settings.get(name)) for name, mark in self.marks.items())
        return all(mark(value) if callable(mark) else mark == value for mark, value in values)

    def settings(self) -> set[str]:
        """The names of all settings that this kind knows."""
        return {*EVERY, *self.used, *self.unused, *self.refused}

    def settled(self, settings: Settings, folder: object) -> Settings:
        """The settings, with HF peft's defaults for those that the file leaves out.

        Raises UnsupportedError for one that is not known, or that the method does not have.
        """
        if unknown := sorted(settings.keys() - self.settings()):
            raise UnsupportedError(
                f"{folder} is a {self.kind} adapter with {_listed(unknown, settings)}, which peftlib does not know "
                f"(peft {settings.get('peft_version', 'of an unknown version')} wrote it). Where it changes nothing in "
                "what the adapter computes, take it out of adapter_config.json"
            )
        off = (name for name in self.refused if not settings.get(name) or settings[name] == "none")
        if found := sorted({name for name in self.refused if name in settings} - set(off)):
            raise UnsupportedError(
                f"{folder} is a {self.kind} adapter with {_listed(found, settings)}, which peftlib's method does not "
                "have; HF peft itself trains on with it, and its merge_and_unload() gives a plain model"
            )
        return {**self.used, **settings}

    def read(self, settings: Settings, tensors: Tensors, parts: Anatomy, folder: object) -> tuple[Settings, Fill]:
        """The method's options, and what fills in the values once it is attached. Takes what it uses out of
        ``tensors`` (names inside the backbone); raises LoadError or UnsupportedError for what it cannot use."""
        raise NotImplementedError

    def write(self, method: Any) -> tuple[Settings, Tensors]:
        """HF peft's settings and tensors; raises UnsupportedError for what HF peft cannot load."""
        raise NotImplementedError


def _listed(names: list[str], settings: Settings) -> str:
    return ", ".join(f"{name}={settings[name]!r}"[:80] for name in names)


# What reading has in common


def sites_of(parts: Anatomy, path: str, folder: object) -> list[Site]:
    """The maps of the module at a path, in the order of their rows."""
    found = [site for site in parts.sites() if site.path == path]
    if not found:
        known = dict(parts.model.named_modules())
        why = "which peftlib does not adapt" if path in known else f"which {type(parts.model).__name__} does not have"
        error = UnsupportedError if path in known else LoadError
        raise error(f"{folder} adapts {path}, {why}; peftlib adapts the linear maps of the layers (anatomy.of(model))")
    return found


def patterns(parts: Anatomy, sites: list[Site]) -> tuple[str, ...]:
    """Site names where they say it all, else paths."""
    names = tuple(dict.fromkeys(site.name for site in sites))
    if not names or len(parts.sites(names)) == len(sites):
        return names
    return tuple(dict.fromkeys(site.path for site in sites))


def all_used(left: Tensors, used: Sized, folder: object) -> None:
    """Raise UnsupportedError for tensors that are left, LoadError where none was used."""
    if left:
        raise UnsupportedError(
            f"{folder} holds {len(left)} tensors that peftlib has no place for: {sorted(left)[:3]}. Those of whole "
            "modules (modules_to_save outside the task head, resized embeddings) belong into the model first: "
            "load_state_dict() them, then read the folder"
        )
    if not len(used):
        raise LoadError(f"{folder} holds no adapter's tensors")


def copy(parameter: torch.Tensor, value: torch.Tensor, name: str) -> None:
    """Copy a file's value; raises LoadError for another shape."""
    if parameter.shape != value.shape:
        raise LoadError(f"{name} has shape {tuple(value.shape)} in the file, {tuple(parameter.shape)} here")
    parameter.copy_(value)


# What writing has in common


def task_of(model: nn.Module) -> str | None:
    """HF peft's name of the model's task."""
    return next((task for end, task in TASKS.items() if type(model).__name__.endswith(end)), None)


def module_names(model: nn.Module, paths: list[str]) -> list[str]:
    """Last names of the modules where they say it all, as HF peft's users write them, else paths."""
    short = sorted({path.rpartition(".")[2] for path in paths})
    hits = {n for n, _ in model.named_modules() for end in short if n == end or n.endswith(f".{end}")}
    return short if hits == set(paths) else sorted(paths)


def by_module(children: dict[Site, Any]) -> dict[str, dict[Site, Any]]:
    """Path -> the children at its maps."""
    found: dict[str, dict[Site, Any]] = {}
    for site, child in children.items():
        found.setdefault(site.path, {})[site] = child
    return found
