"""The behaviour of a method in numbers: what a short, exactly repeatable training of it gives.

A tiny backbone in float64, one thread, fixed seeds: attach, calibrate, a few steps of SGD inside the lifecycle (with
the method's penalty and a schedule), evaluate, save, merge. Losses, logits, counts and the stored tensors' norms and
shapes make up the fingerprint. It does not change when code moves, and does when a method computes something else, so
it tells a stored run that is out of date from one that is not.

SGD and not AdamW: where a gradient is zero but for rounding, AdamW makes a step of full size of it, and another
machine gives another result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch

from peftlib.conformance.case import Case, logits
from peftlib.errors import DataError, MergeError, UnsupportedError
from peftlib.mechanisms.schedules import Schedule
from peftlib.methods.registry import find
from peftlib.sources import write_text

FAMILIES = ("bert", "gpt2", "t5")
"""An encoder with norms after its blocks, a decoder with fused and transposed maps, and an encoder-decoder with norms
before them."""

STEPS, RATE = 6, 0.05
SCHEDULE = Schedule("polynomial", 1, {"lr_end": RATE / STEPS})
"""One step of warm-up, then a straight line down to a rate that still moves something at the last step."""
FILE = "fingerprints.json"

TOLERANCE = 1e-6
"""Relative. On one machine two fingerprints of the same behaviour agree to 1e-9; other instruction sets round
otherwise, and where a method itself trains with AdamW or in float32 before the measured steps, that grows to 1e-7."""

OPTIONS: dict[str, dict] = {
    "u_bitfit": {"density": 0.8},  # at 0.9 the last chosen are key biases, whose scores are rounding alone
}
"""Options of a fingerprint where the conformance suite's do not suit."""

Fingerprint = dict[str, Any]


def take(method: str) -> Fingerprint:
    """The fingerprint of a registered method: family -> what it did there, or why the family cannot host it.

    A method that serves several tasks has two.
    """
    options = dict(OPTIONS.get(method, {}))
    if "tasks" in {f.name for f in dataclasses.fields(find(method).Config)}:
        options["tasks"] = 2
    return {family: _one(Case(method, family, dtype=torch.float64, options=options)) for family in FAMILIES}


def digest(fingerprint: Fingerprint) -> str:
    """Twelve hexadecimal digits that stand for a recorded fingerprint."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]


def differences(recorded: Fingerprint, now: Fingerprint, tolerance: float = TOLERANCE) -> list[str]:
    """Where two fingerprints differ by more than the relative tolerance, one line each; none where they agree."""
    return list(_compare("", recorded, now, tolerance))


@dataclass(frozen=True)
class Recorded:
    """The recorded fingerprints by method, and the digest of the one that was recorded first: stored runs that are
    older than fingerprints are held to that one."""

    methods: dict[str, Fingerprint] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def digest(self, method: str) -> str | None:
        """The digest of a method's fingerprint; None where none was recorded."""
        return digest(self.methods[method]) if method in self.methods else None

    def record(self, method: str, now: Fingerprint) -> None:
        """Put a new fingerprint in the place of the old one."""
        self.methods[method] = now
        self.first.setdefault(method, digest(now))


def read(root: str | os.PathLike) -> Recorded:
    """What is recorded below a folder of results; nothing where there is no file. Raises DataError for a file that is
    none."""
    path = Path(root) / FILE
    try:
        return Recorded(**json.loads(path.read_text()))
    except FileNotFoundError:
        return Recorded()
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} holds no fingerprints ({error}); restore it, or delete it and record anew") from error


def write(root: str | os.PathLike, recorded: Recorded) -> Path:
    """Write it below a folder of results, as one step; a list of numbers takes one line."""
    text = json.dumps(dataclasses.asdict(recorded), indent=1, sort_keys=True)
    lists = re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s+", " ", found.group()), text)
    return write_text(Path(root) / FILE, lists + "\n")


def _one(case: Case) -> Fingerprint | str:
    with _exact(), tempfile.TemporaryDirectory() as scratch:
        try:
            with _double():
                adapted = case.start()
            data = case.batch()
            if case.options.get("tasks", 1) > 1:
                data["task_ids"] = torch.arange(len(data["labels"])) // 2 % 2
            halves = [{k: v[i::2] for k, v in data.items()} for i in range(2)]
            adapted.calibrate(halves)
        except UnsupportedError as error:
            return f"not supported: {error}"
        losses = _train(adapted, halves)
        answer = logits(adapted.model, **case.inputs())
        file = adapted.save(Path(scratch) / "adapter") / "adapter.safetensors"
        with safetensors.safe_open(file, "pt") as stored:
            tensors = {name: _described(stored.get_tensor(name)) for name in stored.keys()}  # noqa: SIM118
        size = adapted.count()
        found = {
            "counts": [size.trained, size.head, size.stored, size.stored_bytes, size.total],
            "losses": losses,
            "logits": _numbers(answer),
            "file": tensors,
        }
        try:
            found["merged"] = _numbers(logits(adapted.merge(), **case.inputs()))
        except MergeError:
            found["merged"] = None
        return found


def _train(adapted, batches: list[dict[str, torch.Tensor]]) -> list[float]:
    if not adapted.trainable():
        return []
    optimizer = torch.optim.SGD(adapted.parameter_groups(RATE), lr=RATE, momentum=0.9)
    life = adapted.lifecycle(STEPS, max_norm=0.1 if adapted.method.clips else None)  # a norm that is surpassed
    scheduler = life.scheduler(optimizer, SCHEDULE)
    torch.manual_seed(0)
    losses = []
    adapted.model.train()
    with life:
        for step in range(STEPS):
            life.step_start()
            loss = adapted.model(**batches[step % len(batches)]).loss
            loss.backward()
            life.gradients()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            life.step_end()
            losses.append(_rounded(loss.detach()))
    return losses


@contextmanager
def _double() -> Iterator[None]:
    """Inside ``with``, new tensors are float64."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def _exact() -> Iterator[None]:
    """Inside ``with``, one thread and a random state of our own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)


def _described(tensor: torch.Tensor) -> list:
    """Dtype, norm and shape of a stored tensor."""
    return [str(tensor.dtype).removeprefix("torch."), _rounded(tensor.double().norm()), *tensor.shape]


def _numbers(answer: torch.Tensor) -> list[float]:
    """The norm of logits, and their sum along one fixed direction, which tells entries apart."""
    flat = answer.double().flatten()
    return [_rounded(flat.norm()), _rounded(flat @ torch.arange(1, len(flat) + 1).double().sin())]


def _rounded(value: torch.Tensor) -> float:
    return float(f"{float(value):.12g}")


def _compare(path: str, a: Any, b: Any, tolerance: float) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys((*a, *b)):
            yield from _compare(f"{path}/{key}", a.get(key), b.get(key), tolerance)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b)):
            yield from _compare(f"{path}[{i}]", x, y, tolerance)
    elif isinstance(a, float | int) and isinstance(b, float | int):
        if not math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance):
            yield f"{path}: {a!r} is now {b!r}"
    elif a != b:
        yield f"{path}: {a!r} is now {b!r}"
