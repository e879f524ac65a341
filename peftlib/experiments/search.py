"""Searches over the structures of a method that has a ``structure_search``: its runs, done and kept.

Structures that the method lists are runs like all others, in a store of their own. Where it proposes each structure
from the scores of those before, every trial is one line of a log that only grows. A search that was cut off goes on
with the next trial of the same call; all that is proposed follows from its seed and the trials before.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from peftlib import anatomy, backbones, taxonomy
from peftlib.errors import ConfigError, DataError, StateError, UnsupportedError
from peftlib.experiments.provenance import provenance
from peftlib.experiments.run import execute
from peftlib.experiments.spec import RunSpec, profile, run_spec
from peftlib.experiments.store import RESULTS, Store
from peftlib.experiments.sweep import progress_bar, sweep
from peftlib.methods.base import at_least
from peftlib.methods.bases.search import ListedStructures, Point, ProposedStructures
from peftlib.methods.registry import find


def structure_search(method: str, **settings: Any) -> ListedStructures | ProposedStructures:
    """A method's search with these settings. Raises UnsupportedError for a method that has none, ConfigError for a
    setting that it does not have."""
    cls = find(method).structure_search
    if cls is None:
        others = ", ".join(name for name in taxonomy.methods() if find(name).structure_search is not None)
        raise UnsupportedError(f"{method} has no search over structures; methods that have one: {others}")
    names = [f.name for f in dataclasses.fields(cls)]
    for name in settings:
        if name not in names:
            raise ConfigError(f"the search of {method} has no setting {name!r}; it has {', '.join(names) or 'none'}")
    return cls(**settings)


def search_structures(
    method: str,
    profile_name: str,
    track: str | None = None,
    *,
    seeds: Iterable[int],
    trials: int | None = None,
    settings: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    learning_rate: float | None = None,
    changes: dict[str, Any] | None = None,
    root: str | os.PathLike = RESULTS,
    workers: int = 1,
    progress: bool = True,
) -> Iterator[Log | Counter]:
    """Search a method's structures: one search a seed, of so many trials each.

    Args:
        trials: by default the method's search says how many.
        settings: of the method's search.
        options: of the method, where its search lists structures; one that proposes them sets the options itself.
        workers: runs at a time, where structures are listed.

    Gives the log of each seed, or the outcomes of all runs, as :func:`sweep` does. Raises what
    :func:`structure_search` and :func:`search` raise, and ConfigError for an argument that the search has no use for.
    """
    found = structure_search(method, **(settings or {}))
    trials = found.trials if trials is None else trials
    track = track or next(iter(profile(profile_name).tracks))
    if isinstance(found, ListedStructures):
        specs = structure_specs(
            method,
            found,
            profile_name,
            track,
            seeds,
            trials,
            options=options,
            learning_rate=learning_rate,
            changes=changes,
        )
        yield sweep(specs, Store(Path(root) / "search"), workers=workers, progress=progress)
        return
    if options:
        raise ConfigError(f"the search of {method} sets its options; leave out {', '.join(options)}")
    if workers != 1:
        raise ConfigError(f"workers={workers!r}: structures of {method} are proposed one after the other; use 1")
    for seed in seeds:
        spec = SearchSpec(
            profile_name, track, method, found, seed=seed, learning_rate=learning_rate, changes=changes or {}
        )
        yield search(spec, trials, root, progress=progress)


def structure_specs(
    method: str,
    listed: ListedStructures,
    profile_name: str,
    track: str,
    seeds: Iterable[int],
    count: int,
    *,
    options: dict[str, Any] | None = None,
    learning_rate: float | None = None,
    changes: dict[str, Any] | None = None,
) -> list[RunSpec]:
    """The runs of a search that lists its structures: for each seed its ``structures(options, count)``."""
    return [
        run_spec(
            profile_name, track, method, seed=seed, learning_rate=learning_rate, options=structure, changes=changes
        )
        for seed in seeds
        for structure in listed.structures(options or {}, count)
    ]


@dataclass(frozen=True)
class SearchSpec:
    """One search that proposes its structures, in full but for its number of trials.

    Args:
        profile, track: where structures are trained and scored, by the track's metric on its validation split.
        method: whose structures they are.
        search: how they are proposed, the method's ``structure_search`` with its settings.
        seed: of the proposals and of every training.
        learning_rate: of every training; the method's own by default.
        changes: settings of the track that are replaced.
    """

    profile: str
    track: str
    method: str
    search: ProposedStructures
    seed: int = 0
    learning_rate: float | None = None
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", find(self.method).learning_rate)

    @property
    def strategy(self) -> str:
        return self.search.strategy

    @property
    def path(self) -> Path:
        """The log's place below the folder of results."""
        return Path("search", self.profile, self.track, f"{self.method}-{self.strategy}-{self.seed}.jsonl")

    def run(self, options: dict[str, Any]) -> RunSpec:
        """The training of one structure."""
        return run_spec(
            self.profile,
            self.track,
            self.method,
            seed=self.seed,
            learning_rate=self.learning_rate,
            options=options,
            changes=self.changes,
        )

    def as_dict(self) -> dict[str, Any]:
        """What the log says of it: its own fields and the search's settings. The method is in the log's name."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("method", "search")}
        return own | dataclasses.asdict(self.search)

    @classmethod
    def from_dict(cls, method: str, given: dict[str, Any]) -> SearchSpec:
        """The way back from :meth:`as_dict`."""
        names = {f.name for f in dataclasses.fields(cls)}
        own = {name: value for name, value in given.items() if name in names}
        search = structure_search(method, **{name: value for name, value in given.items() if name not in names})
        if not isinstance(search, ProposedStructures):
            raise DataError(f"the search of {method} has no log")
        return cls(method=method, search=search, **own)


@dataclass(frozen=True)
class Log:
    """A search as stored: ``spec`` and ``space``, where it ran (``provenance``), its ``trials`` in order.

    A trial has ``point``, ``options`` of the method, ``by`` (who proposed it), ``score`` on validation data, ``test``
    (which no search looks at), ``parameters`` (stored ones, without the task head), ``run``, ``proposal_seconds`` and
    ``seconds``.
    """

    spec: SearchSpec
    space: Any
    provenance: dict[str, Any]
    trials: list[dict[str, Any]]

    def points(self) -> list[Point]:
        return [tuple(trial["point"]) for trial in self.trials]

    def scores(self, split: str = "score") -> list[float]:
        """The scores on validation data, or with "test" on test data."""
        return [trial[split] for trial in self.trials]

    def pareto(self) -> list[dict[str, Any]]:
        """The trials that no other beats in score and size, by rising size; of equal ones the first."""
        return [self.trials[i] for i in self.spec.search.pareto(self.space, self.points(), self.scores())]

    def hypervolume(self, trials: int | None = None, split: str = "score") -> float:
        """The share of the space of outcomes that the Pareto set of the first ``trials`` dominates, in 0 to 1.
        ``split="test"`` measures the same set on test data."""
        return self.spec.search.hypervolume(
            self.space, self.points()[:trials], self.scores()[:trials], self.scores(split)[:trials]
        )


def read_log(path: Path) -> Log:
    """A stored search. A last line that was cut off is left out. Raises DataError for a file that is none."""
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    try:
        head, *trials = map(json.loads, whole)
        spec = SearchSpec.from_dict(path.name.partition("-")[0], head["spec"])
        return Log(spec, spec.search.space_type(**head["space"]), head["provenance"], trials)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not the log of a search ({error}); delete it and search again") from error


def logs(root: str | os.PathLike = RESULTS, method: str | None = None) -> list[Log]:
    """The stored searches of one method, or of all that peftlib has, below a folder of results, by path."""
    known = taxonomy.methods() if method is None else (method,)
    paths = sorted(Path(root).glob("search/*/*/*-*-*.jsonl"))
    return [read_log(path) for path in paths if path.name.partition("-")[0] in known]


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
    the method has no space of structures for the backbone, or lacks what it proposes with.
    """
    at_least("trials", trials, 1)
    path = Path(root) / spec.path
    with _alone(path):
        log = _open(path, spec)
        known = {trial["run"]: trial for other in logs(root, spec.method) for trial in other.trials}
        spec.search.prepare()
        with progress_bar(progress) as bar:
            shown = bar.add_task(f"{spec.strategy} search", total=trials, completed=min(trials, len(log.trials)))
            while len(log.trials) < trials:
                began = time.perf_counter()
                points, by = spec.search.propose(log.space, log.points(), log.scores(), spec.seed)
                each = (time.perf_counter() - began) / len(points)
                for point in points[: trials - len(log.trials)]:
                    trial = _trial(log, point, by, each, evaluate, known)
                    _append(path, trial)
                    log.trials.append(trial)
                    bar.advance(shown)
                    if progress:
                        bar.console.print(f"{trial['score']:.4f}  {trial['parameters']:>10,}  {trial['options']}")
    return log


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
        "parameters": record["count"]["stored"] - record["count"]["head"],
        "run": run.key,
        "proposal_seconds": round(waited, 2),
        "seconds": round(time.perf_counter() - began, 2),
    }


def _space(spec: SearchSpec) -> Any:
    backbone = spec.run({}).settings["backbone"]
    parts = anatomy.of(backbones.load(backbone, head="classification").model)
    return spec.search.space(parts, backbone)


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
    _append(path, {"spec": spec.as_dict(), "space": dataclasses.asdict(log.space), "provenance": log.provenance})
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
