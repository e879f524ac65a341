"""Saved adapters: files that are written whole or not at all, read strictly, and never unpickled.

A folder holds ``adapter.safetensors`` and ``config.json``; a signature ties the two together.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from peftlib import anatomy
from peftlib.errors import LoadError, StateError, UnsupportedError
from peftlib.methods.base import SavedAdapter
from peftlib.methods.registry import config as method_config

FORMAT = 1
TRIES = 20
"""How often a folder is put in its place, where other processes do the same."""
WEIGHTS, CONFIG = "adapter.safetensors", "config.json"
INSIDE = "adapter"
"""The folder of the adapter in a checkpoint of ``transformers.Trainer``."""


def write(saved: SavedAdapter, folder: str | os.PathLike[str]) -> Path:
    """Write a folder whole or not at all; an adapter that is there is replaced. All processes of a distributed run may
    write the same folder.

    Raises StateError for a place that holds something else.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and not folder.is_dir():
        raise StateError(f"{folder} is a file; give a folder to save the adapter in")
    if folder.is_dir() and any(p.name not in (WEIGHTS, CONFIG) for p in folder.iterdir()):
        raise StateError(f"{folder} holds other files than an adapter; give a new folder")
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        assert saved.state is not None, "a source without its tensors cannot be written"
        save_file(saved.state, scratch / WEIGHTS, metadata={"format": "pt"})
        document = {"format": FORMAT, **_described(saved), "backbone": saved.backbone, "head": list(saved.head)}
        dtypes = {str(t.dtype).removeprefix("torch.") for t in saved.state.values() if t.is_floating_point()}
        document["dtype"] = " and ".join(sorted(dtypes))
        if saved.also:
            document["also"] = list(saved.also)
        if saved.notes:
            document["notes"] = saved.notes
        if saved.sources:
            document["sources"] = [{"name": source.name, **_described(source)} for source in saved.sources]
        for name in ("layers", "train_embeddings", "labels"):
            if value := getattr(saved, name):
                document[name] = value
        document["sha256"] = _sha256(scratch / WEIGHTS, document)
        (scratch / CONFIG).write_text(json.dumps(document, indent=2) + "\n")
        os.chmod(scratch, 0o755)
        _swap(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def read(folder: str | os.PathLike[str]) -> SavedAdapter:
    """What :meth:`Adapted.save` wrote, into memory. Its name is the folder's. In the place of it, a checkpoint that
    ``transformers.Trainer`` wrote with ``adapted.callback()``.

    Only safetensors and JSON are read; nothing is unpickled. Raises LoadError for a file that is missing, truncated,
    changed after saving, or of no method of this peftlib.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS).is_file() and (folder / INSIDE / WEIGHTS).is_file():
        folder = folder / INSIDE
    document = _read_config(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise LoadError(f"{folder} has no {WEIGHTS}; is it a folder that save() wrote?")
    if _sha256(weights, {k: v for k, v in document.items() if k != "sha256"}) != document["sha256"]:
        raise LoadError(
            f"{folder} was changed after saving, or {WEIGHTS} is truncated: its SHA-256 is not the recorded one"
        )
    try:
        state = load_file(weights)
    except SafetensorError as error:
        raise LoadError(f"{weights} is not a readable safetensors file: {error}") from error
    try:
        sources = tuple(
            SavedAdapter(name=s["name"], config=method_config(s["method"], **s["config"]))
            for s in document.get("sources", ())
        )
        config = method_config(document["method"], **document["config"])
    except (TypeError, ValueError, KeyError) as error:
        raise LoadError(f"{folder / CONFIG} does not describe a method of this peftlib: {error}") from error
    return SavedAdapter(
        name=folder.name,
        config=config,
        state=state,
        head=tuple(document["head"]),
        also=tuple(document.get("also", ())),
        backbone=document["backbone"],
        sources=sources,
        notes=document.get("notes", {}),
        layers=tuple(document["layers"]) if "layers" in document else None,
        train_embeddings=tuple(rows) if isinstance(rows := document.get("train_embeddings", False), list) else rows,
        labels=tuple(document.get("labels", ())),
    )


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters below the head, by name there."""
    return anatomy.weights.shapes(anatomy.of(model).base)


def hashed(shapes: dict[str, tuple[int, ...]]) -> str:
    return hashlib.sha256(repr(sorted(shapes.items())).encode()).hexdigest()


def identity(model: nn.Module) -> dict[str, Any]:
    """What tells one backbone from another: class, shapes, and a hash of one weight."""
    parts = anatomy.of(model)
    first = parts.sites()[0]
    return {
        "model_type": parts.config.model_type,
        "class": type(model).__name__,
        "name": getattr(parts.config, "_name_or_path", ""),
        "parameters": anatomy.weights.count(model),
        "vocabulary": parts.embeddings.num_embeddings,
        "shapes": hashed(shapes_of(model)),
        "dtype": first.packed or str(first.module.get_parameter("weight").dtype).removeprefix("torch."),
        "weights": _hash(first),
    }


def _hash(site: anatomy.Site) -> str:
    """Of a site's weight, as the numbers that it stands for; empty where they are not there."""
    weight = site.module._parameters.get("weight")
    if weight is not None and weight.is_meta:
        return ""
    try:
        values = anatomy.weights.dequantized(site.module) if site.packed else cast(torch.Tensor, weight)
    except UnsupportedError:
        return ""
    return hashlib.sha256(_bytes(values)).hexdigest()


def check_backbone(adapter: SavedAdapter, here: dict[str, Any]) -> None:
    """Raise LoadError when an adapter was made for a backbone of another family or other shapes than that of the
    identity ``here``; warn when the weights differ. An adapter without a record of its backbone passes."""
    if adapter.backbone is None:
        return
    saved, folder = adapter.backbone, adapter.name
    if saved.get("model_type") != here["model_type"] or saved.get("shapes") != here["shapes"]:
        tokens = saved.get("vocabulary")
        if tokens is not None and tokens != here["vocabulary"] and saved.get("model_type") == here["model_type"]:
            raise LoadError(
                f"{folder} was made for a backbone with {tokens} token embeddings, and this "
                f"{here['name'] or here['class']} has {here['vocabulary']}; where it is the same one otherwise, call "
                f"model.resize_token_embeddings({tokens}) first"
            )
        raise LoadError(
            f"{folder} was made for a {saved.get('model_type')} backbone ({saved.get('name') or saved.get('class')}, "
            f"{saved.get('parameters', 0):,} parameters); this is {here['model_type']} "
            f"({here['name'] or here['class']}, {here['parameters']:,} parameters). Load the backbone it was made for."
            + ("" if saved.get("class") == here["class"] else " Under another head: load(model, ..., head=False).")
        )
    kinds = {saved.get("dtype", "float32"), here.get("dtype", "float32")}
    # The hash is of bfloat16 numbers: those of the other forms are rounded otherwise.
    comparable = len(kinds) == 1 or kinds <= {"float32", "bfloat16", "float64"}
    if comparable and saved.get("weights") and here["weights"] and saved["weights"] != here["weights"]:
        warnings.warn(
            f"{folder} was trained on {saved.get('name') or 'a backbone'} with other weights than this model has; "
            "results will differ from those it was saved with",
            stacklevel=4,
        )


def _described(saved: SavedAdapter) -> dict[str, Any]:
    return {"method": saved.config.method, "config": saved.config.as_dict()}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise LoadError(f"{folder} has no {CONFIG}; is it a folder that save() wrote?") from None
    except ValueError as error:
        raise LoadError(f"{path} is not valid JSON: {error}") from error
    required = {"format", "method", "config", "backbone", "head", "sha256"}
    if not isinstance(document, dict) or required - document.keys():
        raise LoadError(f"{path} is not an adapter's config; it must have the keys {', '.join(sorted(required))}")
    if document["format"] != FORMAT:
        raise LoadError(f"{path} has format {document['format']!r}; this peftlib reads format {FORMAT}")
    return document


def _bytes(weight: torch.Tensor) -> bytes:
    return weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()


def _sha256(weights: Path, document: dict[str, Any]) -> str:
    """Of the weights' file and of everything else that the config says."""
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps(document, sort_keys=True).encode())
    return digest.hexdigest()


def _swap(scratch: Path, folder: Path) -> None:
    """Put ``scratch`` in the place of ``folder`` in one step; what was there is then in ``scratch``.

    Where the system has no exchange of two folders there are two steps, and a kill between them leaves the old adapter
    beside the folder, under a name that starts with a dot. Several processes may save at a time; the last one stays.
    """
    for attempt in range(TRIES):
        try:
            return _put(scratch, folder)
        except OSError:  # another process has put its adapter there, or taken the old one away, in between
            if attempt == TRIES - 1 or not scratch.is_dir():
                raise


def _put(scratch: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(scratch, folder)
    elif not _exchange(scratch, folder):
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        try:
            os.rename(folder, old / folder.name)
            os.rename(scratch, folder)
        finally:
            if folder.exists() or not (old / folder.name).exists():
                shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders atomically (Linux); False where that cannot be done."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0
