"""Adapters of Hugging Face peft: its files into ours and ours into its, with equal logits on the same backbone.

As ``PeftModel.save_pretrained`` writes them: ``adapter_config.json`` and ``adapter_model.safetensors``. The methods
that both libraries have are those with a :attr:`~peftlib.methods.base.Method.hf_peft` (:func:`formats`). peft itself is
not needed, and nothing is unpickled. Every setting of a file is taken over, changes nothing, or is refused with its
name, one that this version does not know included (:class:`peftlib.methods.bases.hf_peft.Format`); so is every tensor.

What differs by nature: a prompt is part of HF peft's causal loss (its last position predicts the first token) and not
of ours. Beside a prompt, HF peft's classifiers on decoders read the last position, be it padding, ours the last token.

HF peft's prefixes for encoder-decoder backbones reach the decoder's self-attention alone: it drops what it makes for
cross-attention and has none for the encoder. On T5 that is ``prefix_tuning`` with ``attentions=("decoder",)`` and
``relative_bias=True``, and goes both ways. It takes keys and values of layer i from the places 4i and 4i + 1 of a row
that holds 2 for a layer, twice; with an even number of layers half of the row is thus used twice and half of it never.
What is written therefore says twice the number of layers, so that each layer has places of its own. BART's decoder
counts a prefix among its absolute positions, where ours leaves the text's alone: refused.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from peftlib import anatomy, saved, taxonomy
from peftlib.adapted import Adapted, attach
from peftlib.errors import LoadError, PeftlibError, StateError, UnsupportedError
from peftlib.interchange.files import read_json, read_tensors
from peftlib.methods.bases.hf_peft import Format, copy, task_of
from peftlib.methods.registry import config as method_config
from peftlib.methods.registry import find

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def formats() -> dict[str, Format]:
    """The methods that have a counterpart in HF peft, and how its files hold them."""
    return {name: find(name).hf_peft for name in taxonomy.methods() if find(name).hf_peft is not None}


def from_hf_peft(model: nn.Module, folder: str | os.PathLike[str], *, keep_original: bool = True) -> Adapted:
    """Attach an adapter that HF peft saved to the backbone it was made for; it then trains, saves and merges as ours.

    Where the file holds parts of the task head, the head trains on from them; parts that it lacks stay as they are in
    ``model``. A start that rewrote the frozen weights is converted as HF peft does it (PiSSA, OLoRA), or refused. Other
    modules that the file holds whole (``modules_to_save``, resized embeddings) must be in ``model`` already.

    Raises LoadError for files that are missing, damaged or of another backbone, UnsupportedError for what peftlib's
    method cannot compute, settings that it does not know included.
    """
    settings, tensors = read(Path(folder))
    method, format = format_of(settings, folder)
    parts = anatomy.of(model)
    tensors = {name.removeprefix(format.outer): tensor for name, tensor in tensors.items()}
    head = {name: tensors.pop(name) for name in list(tensors) if name in parts.head}
    there = {*head, *tensors}
    frozen = model.state_dict()
    tensors = {n: t for n, t in tensors.items() if not (n in frozen and _equal(t, frozen[n]))}
    try:
        options, fill = format.read(settings, tensors, parts, folder)
        _check_saved_modules(settings, parts, there, folder)
        adapted = attach(model, method_config(method, **options), train_head=bool(head), keep_original=keep_original)
    except (TypeError, ValueError, AttributeError, KeyError, re.error) as error:
        if isinstance(error, PeftlibError):
            raise
        raise LoadError(f"{Path(folder) / CONFIG} has a setting of a wrong type: {error}") from error
    try:
        with torch.no_grad():
            fill(adapted.method)
            trained = adapted.trainable()
            for name, tensor in head.items():
                copy(trained[name], tensor, name)
    except BaseException:
        adapted.detach()
        raise
    return adapted


def to_hf_peft(adapted: Adapted, folder: str | os.PathLike[str]) -> Path:
    """Write what HF peft's ``PeftModel.from_pretrained(model, folder)`` loads onto the same backbone; the folder is
    written whole or not at all, and an adapter that is there is replaced.

    Raises UnsupportedError for a method or an option that HF peft does not have, and where something trains that its
    files have no place for; StateError for a folder that holds something else.
    """
    known = formats()
    if adapted.name not in known:
        raise UnsupportedError(
            f"{adapted.name} has no counterpart that HF peft loads; it takes {', '.join(known)}. merge() gives a plain "
            "model, where the method can"
        )
    if adapted.extent.train_embeddings:
        raise UnsupportedError(
            f"the token embeddings train beside {adapted.name}, and peftlib does not write them for HF peft; attach it "
            "without train_embeddings, or save() it"
        )
    format = known[adapted.name]
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and all(p.name in (CONFIG, WEIGHTS) for p in folder.iterdir())):
        raise StateError(f"{folder} holds other files than an adapter; give a new folder")
    trained = adapted.trainable()
    _check_alone(adapted)
    settings, tensors = format.write(adapted.method)
    tensors |= {format.outer + name: trained[name] for name in adapted.head_names}
    heads = sorted({name.partition(".")[0] for name in adapted.head_names})
    settings = {
        "peft_type": format.kind,
        "task_type": task_of(adapted.model),
        "base_model_name_or_path": getattr(adapted.model.config, "_name_or_path", "") or None,
        "inference_mode": True,
        "modules_to_save": heads or None,
        **settings,
    }
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_file(plain, scratch / WEIGHTS, metadata={"format": "pt"})
        (scratch / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        os.chmod(scratch, 0o755)
        saved._swap(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _check_alone(adapted: Adapted) -> None:
    """Raise UnsupportedError where parameters of the model itself train beside the adapter and the head."""
    inside = tuple(f"{path}." for path in adapted.host.paths())
    mine = {n for n, p in adapted.model.named_parameters() if p.requires_grad} - {*adapted.head_names}
    if others := sorted(name for name in mine if not name.startswith(inside)):
        raise UnsupportedError(
            f"{others[0]} and {len(others) - 1} others train beside {adapted.name}, for which HF peft's files have no "
            "place; save() holds what the method trains, and requires_grad_(False) leaves them out"
        )


def format_of(settings: dict[str, Any], folder: str | os.PathLike[str]) -> tuple[str, Format]:
    """The method that a file is of: among those that claim it, the one that asks for most."""
    known = formats()
    claims = [name for name, format in known.items() if format.claims(settings)]
    if not claims:
        kinds = dict.fromkeys(format.kind for format in known.values())
        raise UnsupportedError(
            f"{folder} holds a {settings.get('peft_type')} adapter; peftlib takes {', '.join(kinds)} from HF peft, "
            "which itself loads the others"
        )
    name = max(claims, key=lambda name: len(known[name].marks))
    return name, known[name]


def _check_saved_modules(settings: dict[str, Any], parts: anatomy.Anatomy, there: set[str], folder: object) -> None:
    """Raise LoadError for a module that was saved whole, that the model has, and of which the file holds nothing."""
    for whole in settings.get("modules_to_save") or ():
        mine = [n for n, _ in parts.model.named_parameters() if f".{whole}." in f".{n}"]
        if mine and not there & set(mine):
            raise LoadError(f"{folder} says modules_to_save {whole!r} and holds no tensor of it, such as {mine[0]}")


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return not b.is_meta and a.shape == b.shape and torch.equal(a.to(b.device, b.dtype), b)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The settings and tensors of a folder. Raises LoadError for files that are missing or damaged."""
    if not (folder / CONFIG).is_file():
        raise LoadError(f"{folder} has no {CONFIG}; is it a folder that HF peft saved?")
    if not (folder / WEIGHTS).is_file():
        pickled = " It holds a pickled adapter_model.bin, which peftlib does not read: save it anew with HF peft."
        raise LoadError(f"{folder} has no {WEIGHTS}." + (pickled if (folder / "adapter_model.bin").exists() else ""))
    return read_json(folder / CONFIG), read_tensors(folder, WEIGHTS)
