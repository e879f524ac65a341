"""What the rooms above share of the outside world: files written as one step, the folder for what is derived once and
read often, and whether a hub is there."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

import huggingface_hub


def write_text(path: Path, text: str) -> Path:
    """Write a text file as one step: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)
    return path


def cache_root() -> Path:
    """``$PEFTLIB_CACHE``, or ``$XDG_CACHE_HOME/peftlib``, or ``~/.cache/peftlib``. It may not exist yet."""
    if own := os.environ.get("PEFTLIB_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "peftlib"


def cached_folder(name: str, build: Callable[[Path], None]) -> Path:
    """The cached folder ``name``; where it is missing, ``build(path)`` fills it first.

    A folder appears under its name complete or not at all: it is filled beside its place and renamed, so a
    killed process leaves no half-written one, and of two processes that build the same one, either wins.
    """
    target = cache_root() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}-{uuid.uuid4().hex}"
    work.mkdir()
    try:
        build(work)
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def hub_reachable() -> bool:
    """Whether the Hugging Face hub answers; False in offline mode.

    One short request, through whatever proxy is set: the hub's own clients retry for most of a minute.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the transport's trouble is, the answer is the same: use what is here
        return False
    return True
