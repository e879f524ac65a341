"""What a run is, in full: two runs with the same specification are the same run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from peftlib import taxonomy
from peftlib.errors import UnknownNameError
from peftlib.methods.registry import config as method_config
from peftlib.methods.registry import find


@dataclass(frozen=True)
class Track:
    """A task with its training settings: what all methods of a comparison share."""

    task: str
    backbone: str
    epochs: float
    batch_size: int
    max_length: int
    precision: str = "no"
    group_by_length: bool = True
    warmup: float = 0.1
    weight_decay: float = 0.0
    task_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """A set of tracks for one kind of machine. The first track is the one that learning rates are searched on."""

    name: str
    backbone: str
    tracks: dict[str, Track]
    summary: str
    sources: tuple[str, ...] = ()
    """The tasks on which methods that build on other adapters have those trained."""
    conversion: dict[str, Any] = field(default_factory=dict)
    """Of methods with a phase on unlabelled text: the tasks whose training ``texts`` they read, for how many
    ``steps``."""


def _embedded(task: str, epochs: float, batch_size: int, max_length: int, **options) -> Track:
    # In float32: bfloat16 is twice as fast on some CPUs and ten times as slow on others, which lack its instructions.
    return Track(task, "minilm-l6", epochs, batch_size, max_length, task_options=options)


def _glue(task: str, epochs: float, backbone: str = "roberta-base") -> Track:
    return Track(f"glue/{task}", backbone, epochs, 32, 128, precision="bf16", warmup=0.06)


GLUE = ("rte", "mrpc", "stsb", "cola", "sst2", "qnli", "qqp", "mnli")

PROFILES: dict[str, Profile] = {
    "smoke": Profile(
        "smoke",
        "tiny-bert",
        {"smoke": Track("smoke", "tiny-bert", epochs=1, batch_size=8, max_length=32)},
        "tiny random models, seconds on any CPU: proves that everything runs, measures nothing",
        sources=("smoke", "smoke-pair"),
        conversion={"texts": ["smoke"], "steps": 4},
    ),
    "embedded": Profile(
        "embedded",
        "minilm-l6",
        {
            "few-shot": _embedded("sentences-fewshot", epochs=5, batch_size=16, max_length=40, n_train=256, n_test=800),
            "sentences": _embedded("sentences", epochs=1, batch_size=32, max_length=64),
            "acceptability": _embedded("acceptability", epochs=1, batch_size=32, max_length=64),
            "coherence": _embedded("coherence", epochs=1, batch_size=32, max_length=64),
        },
        "MiniLM-L6 and movie reviews, both inside installed packages: minutes on two CPU cores",
        sources=("reviews-fewshot", "acceptability-fewshot", "coherence-fewshot"),
        conversion={"texts": ["sentences", "reviews"], "steps": 1000},
    ),
    "glue": Profile(
        "glue",
        "roberta-base",
        {
            "rte": _glue("rte", 10),
            "mrpc": _glue("mrpc", 10),
            "stsb": _glue("stsb", 10),
            "cola": _glue("cola", 10),
            "sst2": _glue("sst2", 3),
        },
        "RoBERTa-base on the five small GLUE tasks, from the hub or PEFTLIB_DATA: one GPU",
        sources=("glue/mrpc", "glue/cola", "glue/rte"),
        conversion={"texts": ["glue/sst2", "glue/mrpc", "glue/rte"], "steps": 10_000},
    ),
    "paper": Profile(
        "paper",
        "roberta-large",
        {name: _glue(name, 10, "roberta-large") for name in GLUE},
        "the survey's own GLUE track on RoBERTa-large: a large GPU",
        conversion={"texts": ["glue/sst2", "glue/mrpc", "glue/rte"], "steps": 10_000},
    ),
}


def profile(name: str) -> Profile:
    """A profile by name; UnknownNameError lists the others."""
    if name not in PROFILES:
        raise UnknownNameError("profile", name, PROFILES)
    return PROFILES[name]


@dataclass(frozen=True)
class RunSpec:
    """One run. Everything that decides its result is here; the seed orders data and starts parameters."""

    profile: str
    track: str
    method: str
    options: dict[str, Any]
    learning_rate: float
    seed: int
    settings: dict[str, Any]

    @property
    def key(self) -> str:
        """Hash of the specification, the same on every machine."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        return f"{self.method} on {self.track}, lr {self.learning_rate:g}, seed {self.seed}"


def run_spec(
    profile_name: str,
    track_name: str | None,
    method: str,
    *,
    seed: int = 0,
    learning_rate: float | None = None,
    options: dict[str, Any] | None = None,
    changes: dict[str, Any] | None = None,
) -> RunSpec:
    """The specification of one run; the track defaults to the profile's first, the rate to the method's own.

    ``options`` are the method's; ``changes`` replace settings of the track (``epochs``, ``batch_size``, ``backbone``).
    Raises UnknownNameError for a profile, track, method, option or setting that does not exist.
    """
    tracks = profile(profile_name).tracks
    track_name = next(iter(tracks)) if track_name is None else track_name
    if track_name not in tracks:
        raise UnknownNameError(f"track of profile {profile_name}", track_name, tracks)
    settings = track_settings(profile_name, track_name, method)
    for name in changes or {}:
        if name not in settings:
            raise UnknownNameError("setting of a track", name, settings)
    cls = find(method)
    config = method_config(method, **(options or {}))
    return RunSpec(
        profile=profile_name,
        track=track_name,
        method=method,
        options=json.loads(json.dumps(config.as_dict())),
        learning_rate=cls.learning_rate if learning_rate is None else learning_rate,
        seed=seed,
        settings={**settings, **(changes or {})},
    )


def with_defaults(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a stored run; those that its method got later are at their defaults."""
    return json.loads(json.dumps(method_config(method).as_dict())) | options


def track_settings(profile_name: str, track_name: str, method: str) -> dict[str, Any]:
    """The settings of a track as a run of this method has them: with ``sources`` where it builds on other adapters,
    with ``conversion`` where it begins on unlabelled text."""
    chosen, cls = profile(profile_name), find(method)
    settings = dataclasses.asdict(chosen.tracks[track_name])
    if cls.source_methods:
        settings["sources"] = list(chosen.sources)
    if cls.converts:
        settings["conversion"] = chosen.conversion
    return settings


def source_specs(spec: RunSpec) -> list[RunSpec]:
    """The runs that train the adapters a run builds on: one a source task, of the first method that can be a source, at
    its own rate and with the run's seed and settings."""
    tasks = spec.settings.get("sources", ())
    settings = {name: value for name, value in spec.settings.items() if name != "sources"}
    method = find(spec.method).source_methods[0] if tasks else ""
    return [
        RunSpec(
            profile=spec.profile,
            track=task,
            method=method,
            options=json.loads(json.dumps(method_config(method).as_dict())),
            learning_rate=find(method).learning_rate,
            seed=spec.seed,
            settings={**settings, "task": task, "task_options": {}},
        )
        for task in tasks
    ]


def comparable(spec: dict[str, Any]) -> bool:
    """Whether a stored run, by its specification with all options of its method, is one of a comparison: the method's
    default options, the settings of its track."""
    if spec["method"] not in taxonomy.methods() or spec["track"] not in profile(spec["profile"]).tracks:
        return False
    settings = track_settings(spec["profile"], spec["track"], spec["method"])
    return spec["options"] == with_defaults(spec["method"], {}) and spec["settings"] == json.loads(json.dumps(settings))


SEARCH_RATES = (1e-4, 5e-4, 2e-3, 1e-2)
"""The learning rates that the search tries first, the same for every method."""
RATES = (4e-6, 2e-5, *SEARCH_RATES, 5e-2, 0.2, 1.0)
"""All that it may come to: where the best of those tried is the lowest or the highest, the next one is tried, and where
none learned, a higher one."""


def search_specs(profile_name: str, names: Iterable[str], seed: int = 0) -> list[RunSpec]:
    """How the stated search begins: each rate of ``SEARCH_RATES`` once, at one seed and on the first track, for each
    method; :func:`next_rate` says how it goes on.

    The best rate is chosen on validation data by ``Store.best_rate``.
    """
    return [
        run_spec(profile_name, None, name, seed=seed, learning_rate=rate) for name in names for rate in SEARCH_RATES
    ]


def next_rate(tried: Iterable[float], best: float, decided: bool = True) -> float | None:
    """The rate that the search tries next: beyond the best of those tried, where that is the lowest or the highest of
    them; None where the best is between others, or the end of ``RATES``. Where the runs did not decide, which rate is
    best is noise, and the next higher one is tried first."""
    tried = set(tried)
    known = [RATES.index(rate) for rate in RATES if rate in tried]
    if not decided and known[-1] + 1 < len(RATES):
        return RATES[known[-1] + 1]
    for end, step in ((0, -1), (-1, 1)):
        place = known[end] + step
        if best == RATES[known[end]] and 0 <= place < len(RATES):
            return RATES[place]
    return None
