"""Where peftlib keeps what it derives once and reads often: ``PEFTLIB_CACHE``, else the user's cache folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def root() -> Path:
    """``$PEFTLIB_CACHE``, or ``$XDG_CACHE_HOME/peftlib``, or ``~/.cache/peftlib``. It may not exist yet."""
    if own := os.environ.get("PEFTLIB_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "peftlib"


def folder(name: str, build: Callable[[Path], None]) -> Path:
    """The cached folder ``name``; where it is missing, ``build(path)`` fills it first.

    A folder appears under its name complete or not at all: it is filled beside its place and renamed, so a
    killed process leaves no half-written one, and of two processes that build the same one, either wins.
    """
    target = root() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
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
