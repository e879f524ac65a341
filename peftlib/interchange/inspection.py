"""What a folder with an adapter holds: one of ours, of HF peft's or of AdapterHub's ``adapters``.

>>> print(peftlib.inspect("my-adapter"))

No model is needed, and nothing that the folder holds is executed: settings are JSON, tensors are safetensors or, where
another library pickled them, what ``torch.load(weights_only=True)`` takes.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peftlib import saved
from peftlib.errors import LoadError, PeftlibError
from peftlib.interchange import adapters, hf_peft
from peftlib.interchange.files import read_json, read_tensors

HUGE = 1e3
"""A magnitude that no trained adapter has: of a number, or of a tensor's norm in units of the median of its kind's."""

HEADS = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
    "ForConditionalGeneration": "seq2seq",
    "ForCausalLM": "causal_lm",
    "GPT2LMHeadModel": "causal_lm",
    "ForMaskedLM": "masked_lm",
    "Model": "base",
}
"""End of a model's class name -> the head that :func:`peftlib.backbones.load` gives it."""

TASKS = {
    "SEQ_CLS": "classification",
    "TOKEN_CLS": "token_classification",
    "QUESTION_ANS": "question_answering",
    "SEQ_2_SEQ_LM": "seq2seq",
    "CAUSAL_LM": "causal_lm",
    "FEATURE_EXTRACTION": "base",
}
"""HF peft's name of a task -> the like."""

_LAYER = re.compile(r"^(.*?\.\d+)\.")
_ROWS = ("lora_A.weight", "lora_A", "adapter_down.0.weight")
"""Ends of the names of tensors in other libraries' files that have as many rows as the rank, or the bottleneck."""


@dataclass(frozen=True)
class Part:
    """What a folder holds for one layer, or for one module outside the layers."""

    name: str
    tensors: int
    parameters: int
    norm: float
    """The root of the sum of all squares."""
    largest: float
    """The largest magnitude."""


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found. ``library`` is "peftlib", "HF peft" or "adapters"; ``method`` is peftlib's name where
    it has one, else the other library's; ``base`` the backbone that the folder names and ``head`` its head, as
    ``peftlib.backbones.load`` takes it ("" where the folder does not say); ``rank`` the ranks, or bottleneck
    sizes, that its tensors have; ``parameters`` and ``bytes`` are of all tensors, the task head's included; ``dtypes``
    counts parameters; ``options`` are the settings; ``odd`` says what should be looked at."""

    folder: str
    library: str
    method: str
    base: str
    head: str
    rank: tuple[int, ...]
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    options: dict[str, Any]
    parts: tuple[Part, ...]
    odd: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        rows = [
            ("of", f"{self.library}, for {self.base or 'a backbone that it does not name'}"),
            ("head", self.head or "it does not say"),
            ("rank", ", ".join(map(str, self.rank)) or "none"),
            ("parameters", f"{self.parameters:,} in {self.bytes:,} bytes, {', '.join(self.dtypes)}"),
            ("options", ", ".join(f"{name}={value!r}" for name, value in self.options.items()) or "none"),
        ]
        width = max((len(part.name) for part in self.parts), default=0)
        lines = [f"{self.method} in {self.folder}", *(f"  {name:12}{text}" for name, text in rows)]
        lines += [
            f"  {p.name:{width}}  {p.parameters:>12,} parameters  norm {p.norm:<10.4g} largest {p.largest:.4g}"
            for p in self.parts
        ]
        return "\n".join(map(_plain, [*lines, *(f"  odd: {text}" for text in self.odd)]))


def inspect(folder: str | os.PathLike[str]) -> Inspection:
    """What an adapter's folder holds. Raises LoadError for one that is no adapter's, or whose files cannot be read."""
    folder = Path(folder)
    if (folder / saved.CONFIG).is_file() and (folder / saved.WEIGHTS).is_file():
        kind = _ours
    elif (folder / hf_peft.CONFIG).is_file():
        kind = _theirs if "peft_type" in read_json(folder / hf_peft.CONFIG) else _adapterhubs
    elif (folder / adapters.FUSION).is_file():
        kind = _adapterhubs
    else:
        raise LoadError(
            f"{folder} holds no adapter: neither {saved.CONFIG} with {saved.WEIGHTS} (peftlib) nor {hf_peft.CONFIG} "
            "(HF peft, adapters)"
        )
    found, tensors = kind(folder)
    return Inspection(
        folder=str(folder),
        parameters=sum(t.numel() for t in tensors.values()),
        bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
        dtypes=dict(_dtypes(tensors).most_common()),
        parts=_parts(tensors),
        **{**found, "odd": (*found["odd"], *_odd(tensors), *_unread(folder))},
    )


def _ours(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    document = read_json(folder / saved.CONFIG)
    tensors = read_tensors(folder, saved.WEIGHTS)
    odd = []
    try:
        saved.read(folder)
    except LoadError as error:
        odd.append(f"peftlib.load() refuses it: {error}")
    backbone = document.get("backbone")
    backbone = backbone if isinstance(backbone, dict) else {}
    options = document.get("config")
    options = options if isinstance(options, dict) else {}
    sizes = [options.get("rank", options.get("bottleneck")), *(r for _, r in options.get("rank_pattern", ()))]
    found = {
        "library": "peftlib",
        "method": str(document.get("method")),
        "base": " ".join(str(backbone[n]) for n in ("class", "name") if backbone.get(n)),
        "head": _head_of(backbone.get("class")),
        "rank": tuple(sorted({size for size in sizes if isinstance(size, int)})),
        "options": options,
        "odd": odd,
    }
    return found, tensors


def _theirs(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    settings = read_json(folder / hf_peft.CONFIG)
    tensors = read_tensors(folder, hf_peft.WEIGHTS, "adapter_model.bin")
    formats, odd = hf_peft.formats(), []
    name = str(settings["peft_type"])
    try:
        name, format = hf_peft.format_of(settings, folder)
        format.settled(settings, folder)
    except PeftlibError as error:
        odd.append(f"from_hf_peft() refuses it: {error}")
    used = formats[name].used if name in formats else settings.keys()
    found = {
        "library": "HF peft",
        "method": f"{name} ({settings['peft_type']})",
        "base": str(settings.get("base_model_name_or_path") or ""),
        "head": TASKS.get(str(settings.get("task_type")), ""),
        "rank": _ranks(tensors),
        "options": {n: v for n, v in settings.items() if n in used or n == "target_modules"},
        "odd": odd,
    }
    return found, tensors


def _adapterhubs(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    document, tensors = adapters.read(folder)
    config, odd = document["config"], []
    name = str(config.get("architecture") or "bottleneck")
    try:
        name = adapters.method_of(document, folder)
    except PeftlibError as error:
        odd.append(f"from_adapters() refuses it: {error}")
    found = {
        "library": "adapters",
        "method": name,
        "base": " ".join(str(document[n]) for n in ("model_class", "model_name") if document.get(n)),
        "head": _head_of(document.get("model_class")),
        "rank": _ranks(tensors),
        "options": config,
        "odd": odd,
    }
    return found, tensors


def _head_of(model_class: object) -> str:
    return next((head for end, head in HEADS.items() if str(model_class).endswith(end)), "")


def _ranks(tensors: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    return tuple(sorted({len(t) for name, t in tensors.items() if name.endswith(_ROWS) and t.dim()}))


def _dtypes(tensors: Mapping[str, torch.Tensor]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return counts


def _parts(tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
    """By layer, in the order of their numbers, then the modules outside the layers."""
    groups: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^base_model\.(model\.)?", "", name)
        layer = _LAYER.match(name)
        groups.setdefault(layer[1] if layer else name.rpartition(".")[0] or name, []).append(tensor)

    def order(name: str) -> tuple[bool, list[Any]]:
        numbers = re.split(r"(\d+)", name)
        return len(numbers) == 1, [int(text) if text.isdecimal() else text for text in numbers]

    return tuple(
        Part(
            name,
            tensors=len(group),
            parameters=sum(t.numel() for t in group),
            norm=math.hypot(*map(_norm, group)),
            largest=max(map(_largest, group)),
        )
        for name, group in sorted(groups.items(), key=lambda item: order(item[0]))
    )


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double())) if tensor.numel() else 0.0


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.double().abs().max()) if tensor.numel() else 0.0


def _odd(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """What should be looked at in the tensors."""
    found: dict[str, list[str]] = {}
    norms: dict[str, dict[str, float]] = {}
    for name, tensor in tensors.items():
        if not tensor.numel():
            found.setdefault("without any number", []).append(name)
        elif tensor.is_floating_point():
            if tensor.isnan().any():
                found.setdefault("with NaN", []).append(name)
            elif tensor.isinf().any():
                found.setdefault("with infinite numbers", []).append(name)
            elif not tensor.any():
                found.setdefault("all zero, as before training", []).append(name)
            elif _largest(tensor) > HUGE:
                found.setdefault(f"with numbers above {HUGE:g}", []).append(name)
            norms.setdefault(re.sub(r"\d+", "#", name), {})[name] = _norm(tensor)
    for alike in norms.values():
        finite = sorted(norm for norm in alike.values() if math.isfinite(norm) and norm)
        far = [n for n, norm in alike.items() if finite and norm > HUGE * finite[(len(finite) - 1) // 2]]
        if far:
            found.setdefault(f"with more than {HUGE:g} times the norm of their like", []).extend(far)
    return [f"tensors {what}: {len(names)}, such as {names[0]}" for what, names in found.items()]


def _unread(folder: Path) -> list[str]:
    """Files that could run something where another program opens them."""
    risky = (".py", ".pkl", ".pickle", ".pt", ".pth", ".bin", ".so", ".sh")
    known = {"adapter_model.bin", *adapters.PICKLED}
    names = sorted(p.name for p in folder.iterdir() if p.suffix in risky and p.name not in known)
    return [f"{name} was not opened: it can hold code" for name in names]


def _plain(text: str) -> str:
    """Without characters that a terminal takes as commands."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
