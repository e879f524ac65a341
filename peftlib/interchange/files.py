"""Settings and tensors of a folder, without executing anything that it holds."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from peftlib.errors import LoadError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises LoadError for a file that is missing or holds something else."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise LoadError(f"{path} is not a JSON object: {error}") from error


def read_tensors(folder: Path, safe: str, pickled: str = "") -> dict[str, torch.Tensor]:
    """The tensors of the safetensors file or, where there is none, of the pickled one, of which torch reads nothing but
    tensors. Raises LoadError for files that are missing, damaged or hold something else."""
    if (folder / safe).is_file():
        try:
            return load_file(folder / safe)
        except (SafetensorError, OSError) as error:
            raise LoadError(f"{folder / safe} is not a readable safetensors file: {error}") from error
    if not pickled or not (folder / pickled).is_file():
        raise LoadError(f"{folder} has no {safe}{pickled and f' and no {pickled}'}")
    try:
        found = torch.load(folder / pickled, map_location="cpu", weights_only=True)
        if isinstance(found, dict) and all(isinstance(t, torch.Tensor) for t in found.values()):
            return {str(name): tensor for name, tensor in found.items()}
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise LoadError(f"{folder / pickled} does not hold tensors alone: {error}") from error
    raise LoadError(f"{folder / pickled} does not hold tensors by their names alone")
