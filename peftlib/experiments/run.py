"""One run: build, train, measure, record."""

from __future__ import annotations

import dataclasses
import datetime as dt
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlib import backbones, sources, tasks
from peftlib.adapted import Adapted, attach
from peftlib.conversion import convert
from peftlib.efficiency.measure import PeakMemory, folder_bytes
from peftlib.experiments.provenance import provenance, revision
from peftlib.experiments.spec import RunSpec, source_specs
from peftlib.experiments.store import Store
from peftlib.methods.base import SavedAdapter
from peftlib.methods.registry import config as method_config
from peftlib.saved import read
from peftlib.training import FitResult, evaluate_task, fit


@dataclass(frozen=True)
class Trained:
    """A finished run that is still in memory: the handle, its backbone and task, and the record of the run."""

    adapted: Adapted
    backbone: backbones.Backbone
    task: tasks.Task
    record: dict[str, Any]


def _build(spec: RunSpec) -> tuple[tasks.Task, backbones.Backbone]:
    """Task and backbone of a run. Its seed draws its data, its head and its parameters."""
    s = spec.settings
    task = tasks.load(s["task"], seed=spec.seed, **s["task_options"])
    return task, backbones.load(s["backbone"], head="classification", num_labels=task.num_labels, seed=spec.seed)


def _tuned(
    spec: RunSpec,
    task: tasks.Task,
    backbone: backbones.Backbone,
    built_on: Sequence[SavedAdapter] = (),
    converted: SavedAdapter | None = None,
    progress: bool = False,
) -> tuple[Adapted, FitResult]:
    """The run's method on its backbone, trained and not evaluated. A calibration that was cut off goes on from the
    state that it left in the cache."""
    s = spec.settings
    adapted = attach(
        backbone.model,
        method_config(spec.method, **spec.options),
        sources=built_on,
        seed=spec.seed,
        keep_original=False,
    )
    adapted.host.tasks.default = 0  # a run has one task, the first where its method knows several
    if converted is not None:
        adapted.start_from(converted)
    state = sources.cache_root() / "calibrations" / f"{spec.key}-{revision()}"
    result = fit(
        adapted,
        task,
        tokenizer=backbone.tokenizer,
        epochs=s["epochs"],
        batch_size=s["batch_size"],
        learning_rate=spec.learning_rate,
        weight_decay=s["weight_decay"],
        warmup=s["warmup"],
        precision=s["precision"],
        max_length=s["max_length"],
        group_by_length=s["group_by_length"],
        evaluate_on=None,
        calibration_checkpoint=state,
        seed=spec.seed,
        progress=progress,
    )
    state.unlink(missing_ok=True)
    return adapted, result


def train(spec: RunSpec, progress: bool = False) -> Trained:
    """Do one run: build, train, measure. Nothing is written.

    The record (JSON values only) has what ran (``spec``, ``key``, backbone and task fingerprints), what came out
    (``metrics`` on validation and test, ``history``, ``count``, ``bytes_on_disk`` of the saved adapter,
    ``peak_memory`` in bytes above the loaded backbone, ``seconds_per_step``, ``calibration_seconds``,
    ``inference_seconds_per_1000`` rows) and where (``provenance``).
    """
    s = spec.settings
    task, backbone = _build(spec)
    built_on = [_source(source) for source in source_specs(spec)]
    converted = _converted(spec)
    with PeakMemory() as memory:
        adapted, result = _tuned(spec, task, backbone, built_on, converted, progress)
    metrics = {}
    for split in ("validation", "test"):
        began = time.perf_counter()
        metrics[split] = evaluate_task(
            adapted,
            task,
            split,
            backbone.tokenizer,
            batch_size=64,
            max_length=s["max_length"],
            precision=s["precision"],
        )
        inference = 1000 * (time.perf_counter() - began) / len(task.splits[split])
    with tempfile.TemporaryDirectory() as scratch:
        on_disk = folder_bytes(adapted.save(Path(scratch) / "adapter"))
    count = adapted.count()
    record = {
        "spec": dataclasses.asdict(spec),
        "key": spec.key,
        "backbone": {"name": backbone.name, "source": backbone.source, "fingerprint": backbone.fingerprint},
        "task": {"name": task.name, "source": task.source, "fingerprint": task.fingerprint},
        "metric": task.main_metric,
        "metrics": metrics,
        "history": result.history,
        "steps": result.steps,
        "count": {**dataclasses.asdict(count), "percent": count.percent},
        "bytes_on_disk": on_disk,
        "peak_memory": memory.peak,
        "memory_kind": memory.kind,
        "seconds": result.seconds,
        "seconds_per_step": result.seconds_per_step,
        "calibration_seconds": result.calibration_seconds,
        "inference_seconds_per_1000": inference,
        "provenance": provenance(),
    }
    return Trained(adapted, backbone, task, record)


def _source(spec: RunSpec) -> SavedAdapter:
    """The adapter of a source run, trained once a revision of the code and kept in the cache."""

    def build(folder: Path) -> None:
        adapted, _ = _tuned(spec, *_build(spec))
        adapted.save(folder / spec.track.replace("/", "-"))

    folder = sources.cached_folder(f"adapters/{spec.method}-{spec.key}-{revision()}", build)
    return read(next(folder.iterdir()))


def _converted(spec: RunSpec) -> SavedAdapter | None:
    """What the run's method has learned from unlabelled text, once for all runs on the backbone; None for a method
    without such a phase."""
    s = spec.settings.get("conversion")
    if s is None:
        return None
    texts = [text for name in s["texts"] for text in tasks.texts(name)]
    return convert(spec.settings["backbone"], method_config(spec.method, **spec.options), texts, steps=s["steps"])


def execute(spec: RunSpec, progress: bool = False) -> dict[str, Any]:
    """Do one run and return its record; see :func:`train`."""
    return train(spec, progress).record


def run(spec: RunSpec, store: Store, progress: bool = False) -> str:
    """Do a run unless the store has it. Returns "done", "there" (nothing to do) or "failed" (recorded as such)."""
    with store.claim(spec) as mine:
        if not mine:
            return "there"
        try:
            record = execute(spec, progress=progress)
        except Exception as error:
            store.write(
                spec,
                {
                    "spec": dataclasses.asdict(spec),
                    "metrics": {},
                    "error": f"{type(error).__name__}: {error}",
                    "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
                },
                failed=True,
            )
            return "failed"
        record["fingerprint"] = store.fingerprint(spec.method)
        store.write(spec, record)
        return "done"
