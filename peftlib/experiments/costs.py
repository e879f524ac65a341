"""What training steps cost, as measured by ``peftlib bench``: stored, one file a kind and backbone."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peftlib.efficiency.bench import Row
from peftlib.efficiency.memory import Memory
from peftlib.efficiency.speed import Speed
from peftlib.errors import DataError
from peftlib.experiments.provenance import provenance
from peftlib.experiments.store import RESULTS, write_json


def costs_path(kind: str, backbone: str, root: str | os.PathLike = RESULTS) -> Path:
    """Where measurements lie; ``kind`` is "step" (time), "memory" or "variants" (of a method: FLOPs and time)."""
    return Path(root) / "costs" / f"{kind}-{backbone.replace('/', '-')}.json"


def write_costs(
    kind: str, backbone: str, rows: Iterable[Row | Memory | Speed], root: str | os.PathLike = RESULTS
) -> Path:
    """Store measurements, each with where it comes from; those of other methods stay."""
    path = costs_path(kind, backbone, root)
    known = read_costs(kind, backbone, root) if path.exists() else {}
    where = provenance()
    new = {row.name: {**dataclasses.asdict(row), "provenance": where} for row in rows}
    write_json(path, {**known, **new})
    return path


def read_costs(kind: str, backbone: str, root: str | os.PathLike = RESULTS) -> dict[str, dict[str, Any]]:
    """Stored measurements by name; none where there is no file. Raises DataError for a file that is none."""
    path = costs_path(kind, backbone, root)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{path} holds no measurements ({error}); delete it and measure again") from error
