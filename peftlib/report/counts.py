"""Parameter counts of every method on published shapes, taken from the attached method itself on the meta device."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from peftlib import backbones, taxonomy
from peftlib.adapted import attach
from peftlib.errors import StateError, UnsupportedError
from peftlib.methods.registry import stand_ins

BACKBONES = {
    "roberta-base": ("RoBERTa-base, 2 classes", "classification"),
    "t5-base": ("T5-base", "seq2seq"),
    "llama-7b": ("LLaMA-7B", "causal_lm"),
}
"""Name in ``peftlib.backbones`` -> title, head."""

CACHE = "_build/counts.json"
_CODE = ("adapted.py", "anatomy", "backbones", "mechanisms", "methods", "saved.py", "taxonomy", "training")
"""What a count can depend on, below the package."""


def count(method: str, backbone: str, **options) -> dict[str, Any]:
    """Counts of one method on one backbone, without any weights: ``trained``, ``head``, ``stored``, ``stored_bytes``,
    ``total``, ``percent``; where the family cannot host the method, only ``unsupported``, which says why."""
    return next(iter(_counts([(method, options)], backbone).values()))


def counts(root: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """All available methods at their defaults on ``BACKBONES``: method -> backbone -> what :func:`count` gives.

    Kept in ``_build/counts.json`` until code of the library changes.
    """
    cache, code = root / CACHE, _fingerprint()
    try:
        kept = json.loads(cache.read_text())
        if kept["code"] == code:
            return kept["counts"]
    except (FileNotFoundError, ValueError, KeyError):
        pass
    names = taxonomy.methods()
    columns = {backbone: _counts([(name, {}) for name in names], backbone) for backbone in BACKBONES}
    found = {name: {backbone: columns[backbone][name] for backbone in BACKBONES} for name in names}
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps({"code": code, "counts": found}, indent=1) + "\n")
    return found


def _counts(methods: list[tuple[str, dict]], backbone: str) -> dict[str, dict[str, Any]]:
    _, head = BACKBONES.get(backbone, (backbone, "classification"))
    model, found = None, {}
    for name, options in methods:
        # A method that changed the backbone's own parameters leaves a model that is of no more use.
        model = model or backbones.shapes(backbone, head=head)
        try:
            adapted = attach(model, name, keep_original=False, sources=stand_ins(name), **options)
        except UnsupportedError as error:
            found[name] = {"unsupported": str(error)}
            continue
        result = adapted.count()
        found[name] = dataclasses.asdict(result) | {"percent": result.percent}
        try:
            adapted.detach()
        except StateError:
            model = None
    return found


def _fingerprint() -> str:
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for part in (*_CODE, "report/counts.py"):
        path = package / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]
