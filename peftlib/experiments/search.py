"""A search over AutoPEFT's structures, each scored by a training run: Bayesian, or random at the same cost.

Every trial is one line of a log that only grows. A search that was cut off goes on with the next trial of the same
call; all that it proposes follows from its seed and the trials before.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout

from peftlib import anatomy, backbones
from peftlib.errors import DataError, StateError, UnsupportedError
from peftlib.experiments.provenance import provenance
from peftlib.experiments.run import execute
from peftlib.experiments.spec import RunSpec, run_spec
from peftlib.experiments.store import RESULTS
from peftlib.experiments.sweep import progress_bar
from peftlib.methods.base import at_least, one_of
from peftlib.methods.hybrid.automatic.s3delta.method import SEARCHING
from peftlib.methods.registry import find

Point = tuple[int, ...]
STRATEGIES = ("bayesian", "random")
SURROGATES = ("gp", "saas")


@dataclass(frozen=True)
class Space:
    """AutoPEFT's structures on an encoder of width ``d``.

    A point is the indices of three sizes (serial, parallel, length) in :attr:`sizes` and one bit a layer.
    """

    d: int
    layers: int

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """d, d / 2, d / 4, ..., 1, 0, rounded down."""
        return (*(self.d >> k for k in range(self.d.bit_length())), 0)

    def options(self, point: Point) -> dict[str, Any]:
        """A point as options of ``autopeft``."""
        serial, parallel, length = (self.sizes[i] for i in point[:3])
        return {"serial": serial, "parallel": parallel, "length": length, "layers": list(point[3:])}

    def parameters(self, points: torch.Tensor) -> torch.Tensor:
        """Trained parameters without the task head, (...), of points (..., 3 + layers)."""
        chosen = torch.tensor(self.sizes, dtype=torch.float64)[points[..., :3].round().long()]
        adapters, length = chosen[..., :2], chosen[..., 2]
        one = ((2 * self.d + 1) * adapters + self.d * (adapters > 0)).sum(-1) + 2 * self.d * length
        return points[..., 3:].round().sum(-1) * one

    def valid(self, point: Point) -> bool:
        """Whether anything is left to train."""
        return any(point[3:]) and any(self.sizes[i] for i in point[:3])

    def sample(self, generator: np.random.Generator) -> Point:
        """A valid point, uniformly."""
        while True:
            sizes = generator.integers(len(self.sizes), size=3)
            point = tuple(int(i) for i in (*sizes, *generator.integers(2, size=self.layers)))
            if self.valid(point):
                return point

    def thrift(self, points: torch.Tensor) -> torch.Tensor:
        """How few parameters points have, on a log scale: 1 for the smallest structure, 0 for the largest."""
        most = self.parameters(torch.tensor([0, 0, 0] + self.layers * [1])).log()
        least = math.log(2 * self.d)  # a prefix of one position in one layer
        return (most - self.parameters(points).clamp(min=1).log()) / (most - least)


@dataclass(frozen=True)
class SearchSpec:
    """One search, in full but for its number of trials.

    Args:
        profile, track: where structures are trained and scored, by the track's metric on its validation split.
        strategy: "bayesian", or "random".
        seed: of the proposals and of every training. Two searches of one seed have the same first trials.
        initial: random trials before the first model; ``batch``: trials that are proposed together.
        learning_rate: of every training; the method's own by default.
        reference: the score that counts for nothing, 0.5 for two balanced classes.
        surrogate: model of the score: "gp" (Matern or squared-exponential kernel with a length scale a dimension, as
            BoTorch has it) or "saas" (priors for few dimensions that matter, at their most probable values).
        changes: settings of the track that are replaced.
    """

    profile: str
    track: str
    strategy: Literal["bayesian", "random"] = "bayesian"
    seed: int = 0
    initial: int = 8
    batch: int = 2
    learning_rate: float | None = None
    reference: float = 0.5
    surrogate: Literal["gp", "saas"] = "gp"
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        one_of("strategy", self.strategy, STRATEGIES)
        one_of("surrogate", self.surrogate, SURROGATES)
        at_least("initial", self.initial, 2)
        at_least("batch", self.batch, 1)
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", find("autopeft").learning_rate)

    @property
    def path(self) -> Path:
        """The log's place below the folder of results."""
        return Path("search", self.profile, self.track, f"autopeft-{self.strategy}-{self.seed}.jsonl")

    def run(self, options: dict[str, Any]) -> RunSpec:
        """The training of one structure."""
        return run_spec(
            self.profile,
            self.track,
            "autopeft",
            seed=self.seed,
            learning_rate=self.learning_rate,
            options=options,
            changes=self.changes,
        )


@dataclass(frozen=True)
class Log:
    """A search as stored: ``spec`` and ``space``, where it ran (``provenance``), its ``trials`` in order.

    A trial has ``point``, ``options`` of the method, ``by`` (who proposed it), ``score`` on validation data, ``test``
    (which no search looks at), ``parameters`` (without the task head), ``proposal_seconds`` and ``seconds``.
    """

    spec: SearchSpec
    space: Space
    provenance: dict[str, Any]
    trials: list[dict[str, Any]]

    def pareto(self) -> list[dict[str, Any]]:
        """The trials that no other beats in score and size, by rising size; of equal ones the first."""
        best, kept = -math.inf, []
        for trial in sorted(self.trials, key=lambda t: (t["parameters"], -t["score"])):
            if trial["score"] > best:
                best = trial["score"]
                kept.append(trial)
        return kept

    def hypervolume(self, trials: int | None = None, split: str = "score") -> float:
        """The share of the space of outcomes that the Pareto set of the first ``trials`` dominates, in 0 to 1.

        The outcomes are the score from the reference to 1 and the number of parameters, on a log scale, from the
        largest structure to the smallest. ``split="test"`` measures the same set on test data.
        """
        volume, reached = 0.0, 0.0
        for trial in dataclasses.replace(self, trials=self.trials[:trials]).pareto():
            height = max(0.0, _height(self.spec, trial[split]))
            width = float(self.space.thrift(torch.tensor(trial["point"])))
            # By rising size, widths fall: a trial adds the strip by which it is higher than all smaller ones.
            volume += max(0.0, height - reached) * width
            reached = max(reached, height)
        return volume


def read_log(path: Path) -> Log:
    """A stored search. A last line that was cut off is left out. Raises DataError for a file that is none."""
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    try:
        head, *trials = map(json.loads, whole)
        return Log(SearchSpec(**head["spec"]), Space(**head["space"]), head["provenance"], trials)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not the log of a search ({error}); delete it and search again") from error


def logs(root: str | os.PathLike = RESULTS) -> list[Log]:
    """All stored searches below a folder of results, in the order of their paths."""
    return [read_log(path) for path in sorted(Path(root).glob("search/*/*/autopeft-*.jsonl"))]


def search(
    spec: SearchSpec,
    trials: int,
    root: str | os.PathLike = RESULTS,
    *,
    progress: bool = True,
    evaluate: Callable[[RunSpec], dict[str, Any]] = execute,
) -> Log:
    """Search until the log has so many trials, and return it.

    Args:
        spec: what is searched, and how.
        trials: training runs in all, those that the log already has included.
        root: the folder of results; the log is ``spec.path`` in it.
        progress: show a bar and a line a trial.
        evaluate: gives the record of a run; by default the run itself. A run that another stored search has done is not
            done again, and counts as if it were.

    Raises StateError where another process is at this search or the log is of other settings, UnsupportedError where
    the backbone is no encoder, or BoTorch is missing for a Bayesian search.
    """
    at_least("trials", trials, 1)
    path = Path(root) / spec.path
    with _alone(path):
        log = _open(path, spec)
        known = {trial["run"]: trial for other in logs(root) for trial in other.trials}
        if spec.strategy == "bayesian":
            _bayesian()  # takes seconds to import, which are no cost of a proposal
        with progress_bar(progress) as bar:
            shown = bar.add_task(f"{spec.strategy} search", total=trials, completed=min(trials, len(log.trials)))
            while len(log.trials) < trials:
                began = time.perf_counter()
                points, by = propose(log)
                each = (time.perf_counter() - began) / len(points)
                for point in points[: trials - len(log.trials)]:
                    trial = _trial(log, point, by, each, evaluate, known)
                    _append(path, trial)
                    log.trials.append(trial)
                    bar.advance(shown)
                    if progress:
                        bar.console.print(f"{trial['score']:.4f}  {trial['parameters']:>10,}  {trial['options']}")
    return log


def propose(log: Log) -> tuple[list[Point], str]:
    """The next structures to try and who proposes them, from the trials so far: none of them twice."""
    spec, done = log.spec, len(log.trials)
    seen = {tuple(trial["point"]) for trial in log.trials}
    if spec.strategy == "random" or done < spec.initial:
        generator = np.random.default_rng([spec.seed, done])
        return [next(p for p in iter(lambda: log.space.sample(generator), None) if p not in seen)], "random"
    # A batch that was cut off is proposed again from what was known before it.
    known = done - (done - spec.initial) % spec.batch
    points, space = [tuple(t["point"]) for t in log.trials[:known]], log.space
    scores = [_height(spec, t["score"]) for t in log.trials[:known]]
    levels = [len(space.sizes)] * 3 + [2] * space.layers
    # Something must be on: one layer, and one size other than 0, which is the last.
    floors = [(range(3, len(levels)), 1, 1), (range(3), -1, 1 - 3 * (len(space.sizes) - 1))]
    found = _bayesian().batch(
        points, scores, space.thrift, levels, floors, spec.batch, spec.surrogate, 1000 * spec.seed + known
    )
    return found[done - known :], spec.surrogate


def _height(spec: SearchSpec, score: float) -> float:
    """A score from the reference, 0, to the best possible, 1."""
    return (score - spec.reference) / (1 - spec.reference)


def _bayesian() -> ModuleType:
    try:
        from peftlib.experiments import bayesian
    except ImportError as error:
        raise UnsupportedError(
            'a bayesian search needs botorch: pip install "peftlib[search]", or use strategy="random"'
        ) from error
    return bayesian


def _trial(
    log: Log, point: Point, by: str, waited: float, evaluate: Callable, known: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    options = log.space.options(point)
    run = log.spec.run(options)
    if run.key in known:
        return {**known[run.key], "by": by, "proposal_seconds": round(waited, 2)}
    began = time.perf_counter()
    record = evaluate(run)
    metric = record["metric"]
    return {
        "point": list(point),
        "options": options,
        "by": by,
        "score": record["metrics"]["validation"][metric],
        "test": record["metrics"]["test"][metric],
        "parameters": record["count"]["trained"] - record["count"]["head"],
        "run": run.key,
        "proposal_seconds": round(waited, 2),
        "seconds": round(time.perf_counter() - began, 2),
    }


def _space(spec: SearchSpec) -> Space:
    settings = spec.run({}).settings
    parts = anatomy.of(backbones.load(settings["backbone"], head="classification").model)
    if parts.stacks != ("encoder",):
        raise UnsupportedError(
            f"the space of structures is that of encoders, and {settings['backbone']} has {', '.join(parts.stacks)}"
        )
    return Space(parts.d, parts.num_layers)


def _open(path: Path, spec: SearchSpec) -> Log:
    """The log as it is, without a last line that was cut off, or a new one."""
    if path.exists() and path.read_bytes().count(b"\n"):
        log = read_log(path)
        if log.spec != spec:
            raise StateError(f"{path} is the log of other settings ({log.spec}); delete it, or give another folder")
        with open(path, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
        return log
    log = Log(spec, _space(spec), provenance(), [])
    path.unlink(missing_ok=True)
    _append(
        path, {"spec": dataclasses.asdict(spec), "space": dataclasses.asdict(log.space), "provenance": log.provenance}
    )
    return log


def _append(path: Path, line: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _lock(path: Path) -> Path:
    """Where the lock of a search lies, beside those of the runs."""
    track = path.parent
    folder = track.parent.parent / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{track.parent.name}-{track.name}-{path.stem}.lock"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(_lock(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise StateError(f"another process is at the search {path}; wait for it") from None
    try:
        yield
    finally:
        lock.release()


def structure_specs(
    profile_name: str,
    track: str,
    seeds: Iterable[int],
    draws: int,
    *,
    options: dict[str, Any] | None = None,
    changes: dict[str, Any] | None = None,
) -> list[RunSpec]:
    """The runs that compare S3Delta with random structures of its budget: for each seed one search, and ``draws``
    structures of which the best on validation data counts. Options of the search are not in those: another search
    stands beside the same random structures."""
    options = options or {}
    shared = {name: value for name, value in options.items() if name not in SEARCHING}
    kinds = [
        {**options, "strategy": "search"},
        *({**shared, "strategy": "random", "draw": i} for i in range(draws)),
    ]
    return [
        run_spec(profile_name, track, "s3delta", seed=seed, options=kind, changes=changes)
        for seed in seeds
        for kind in kinds
    ]
