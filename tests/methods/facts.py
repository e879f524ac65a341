"""The published facts of a method: one table in its test file, from which its tests follow.

    FACTS = Facts(
        "lora",
        Default("rank", 8, "microsoft/LoRA, examples/NLG/src/gpt2_ft.py"),
        Start("*.B", zeros(), "section 4.1"),
        Start("*.A", uniform(lambda fan_in: fan_in**-0.5), "microsoft/LoRA, loralib/layers.py, reset_parameters"),
        Trains(("*.A", "*.B"), "section 4.1"),
        Count("roberta-base", 294_912, "table 2: 0.3 M", {"targets": ["attention.query", "attention.value"]}),
        Holds("the scale is alpha / r", check_scale, "section 4.1"),
    )

    @FACTS.tests
    def test_published_facts(fact):
        fact()

Each fact names its source: the paper's section or table, or the original repository with file and function. Where a
value is this library's choice because none is published, the source says "chosen here".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from scipy import stats

import peftlib
from peftlib import backbones, taxonomy
from peftlib.conformance import case
from peftlib.methods import registry
from peftlib.report import counts

DRAWS = 4000
"""How many numbers a start is judged by, at least, unless it is a constant."""


@dataclass(frozen=True)
class Distribution:
    """Numbers of a shape are ``scale(fan_in, fan_out)`` times numbers of ``unit``; without ``unit`` they all are that.

    ``fan_in`` is the last of a tensor's sizes, ``fan_out`` the one before it (of a vector: its size, twice)."""

    name: str
    scale: Callable[[int, int], float]
    unit: Any = None

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in units of its scale."""
        fan_in, fan_out = tensor.shape[-1], tensor.shape[-2] if tensor.dim() > 1 else tensor.shape[-1]
        scale = self.scale(fan_in, fan_out)
        return tensor.flatten().double() - scale if self.unit is None else tensor.flatten().double() / scale


Scale = float | Callable[..., float]


def _scale(value: Scale) -> Callable[[int, int], float]:
    """A number, or a function of ``fan_in`` or of ``fan_in, fan_out``."""
    if not callable(value):
        return lambda fan_in, fan_out: value
    if value.__code__.co_argcount == 1:
        return lambda fan_in, fan_out: value(fan_in)
    return value


def constant(value: float) -> Distribution:
    return Distribution(f"constant {value:g}", _scale(value))


def zeros() -> Distribution:
    return constant(0.0)


def ones() -> Distribution:
    return constant(1.0)


def normal(std: Scale) -> Distribution:
    return Distribution("normal", _scale(std), stats.norm())


def truncated_normal(std: Scale, bound: float = 2.0) -> Distribution:
    """A normal distribution of this ``std`` before it is cut at ``bound`` times ``std``."""
    return Distribution("truncated normal", _scale(std), stats.truncnorm(-bound, bound))


def uniform(bound: Scale) -> Distribution:
    """Uniform in (-bound, bound)."""
    return Distribution("uniform", _scale(bound), stats.uniform(-1, 2))


def kaiming_uniform(a: float = math.sqrt(5)) -> Distribution:
    """``torch.nn.init.kaiming_uniform_``; with its ``a`` the start of torch's linear map is ``fan_in**-0.5``."""
    return uniform(lambda fan_in: math.sqrt(6 / ((1 + a * a) * fan_in)))


def glorot_uniform(gain: float = 1.0) -> Distribution:
    return uniform(lambda fan_in, fan_out: gain * math.sqrt(6 / (fan_in + fan_out)))


def glorot_normal(gain: float = 1.0) -> Distribution:
    return normal(lambda fan_in, fan_out: gain * math.sqrt(2 / (fan_in + fan_out)))


@dataclass(frozen=True)
class Default:
    """The value of an option, where none is given."""

    option: str
    value: Any
    source: str

    def __str__(self) -> str:
        return f"default-{self.option}"

    def check(self, method: str) -> None:
        found = getattr(registry.config(method), self.option)
        assert found == self.value, f"{method}.{self.option} is {found!r}; {self.source} has {self.value!r}"


@dataclass(frozen=True)
class Start:
    """How the parameters and buffers start whose names (in the model) match ``names``; ``options`` are the method's
    beside those of the tiny models, ``family`` the tiny model, ``attach`` another way to an adapted model."""

    names: str
    distribution: Distribution
    source: str
    options: dict[str, Any] = field(default_factory=dict)
    family: str = "bert"
    attach: Callable[[], peftlib.Adapted] | None = None

    def __str__(self) -> str:
        return f"start-{self.names}-{self.distribution.name}"

    def check(self, method: str) -> None:
        values, wanted, count = [], DRAWS if self.distribution.unit is not None else 1, 0
        for seed in range(400):
            torch.manual_seed(seed)
            adapted = self.attach() if self.attach else tiny(method, self.family, seed, **self.options)
            model = adapted.model
            tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            found = [t.detach() for n, t in tensors.items() if fnmatch(n, self.names) and t.is_floating_point()]
            assert found, f"no tensor of {method} matches {self.names!r}"
            values += [self.distribution.of(t) for t in found]
            count += sum(t.numel() for t in found)
            if count >= wanted or self.attach:  # which draws the same numbers again
                break
        drawn = torch.cat(values)
        where = f"{method}: {self.names} should start {self.distribution.name} ({self.source})"
        if self.distribution.unit is None:
            assert drawn.abs().max() <= 1e-6, f"{where}; it is off by up to {drawn.abs().max():g}"
            return
        unit = self.distribution.unit
        ratio = float(drawn.std()) / unit.std()
        # The standard error of a normal sample's standard deviation is std / sqrt(2 n); of the others' it is smaller.
        assert abs(ratio - 1) < 5 / math.sqrt(2 * len(drawn)), f"{where}; its spread is {ratio:.3f} times that"
        p = stats.kstest(drawn.numpy(), unit.cdf).pvalue
        assert p > 1e-4, f"{where}; Kolmogorov and Smirnov's test has p = {p:.1g}"


@dataclass(frozen=True)
class Trains:
    """What trains beside the task head: each trained parameter matches one of ``names``, and each of ``names`` matches
    a trained parameter."""

    names: tuple[str, ...]
    source: str
    options: dict[str, Any] = field(default_factory=dict)
    family: str = "bert"
    attach: Callable[[], peftlib.Adapted] | None = None

    def __str__(self) -> str:
        return f"trains-{self.family}" + "".join(f"-{name}" for name in self.options)

    def check(self, method: str) -> None:
        adapted = self.attach() if self.attach else tiny(method, self.family, **self.options)
        head = {id(p) for p in adapted.host.anatomy.head.values()}
        trained = [n for n, p in adapted.model.named_parameters() if p.requires_grad and id(p) not in head]
        other = [n for n in trained if not any(fnmatch(n, name) for name in self.names)]
        assert not other, f"{method} trains {other[:3]} too ({self.source})"
        missing = [name for name in self.names if not any(fnmatch(n, name) for n in trained)]
        assert not missing, f"{method} trains nothing that matches {missing} ({self.source}); it trains {trained[:5]}"


@dataclass(frozen=True)
class Count:
    """The trained parameters without the task head on a published shape (``backbones.shapes``), from the attached
    method; ``percent``, where the paper prints one: the share of the backbone's parameters, as it is rounded there."""

    backbone: str
    trained: int
    source: str
    options: dict[str, Any] = field(default_factory=dict)
    percent: str = ""

    def __str__(self) -> str:
        return f"count-{self.backbone}" + "".join(f"-{name}" for name in self.options)

    def check(self, method: str) -> None:
        found = counts.count(method, self.backbone, **self.options)
        if "unsupported" in found:
            raise AssertionError(f"{self.backbone} cannot host {method}: {found['unsupported']}")
        own = found["trained"] - found["head"]
        assert own == self.trained, f"{method} trains {own:,} on {self.backbone}; {self.source} has {self.trained:,}"
        if self.percent:
            digits = len(self.percent.partition(".")[2])
            share = 100 * own / (found["total"] - found["head"])
            assert f"{share:.{digits}f}" == self.percent, f"{share} % on {self.backbone}, not {self.percent} %"


@dataclass(frozen=True)
class Holds:
    """Any other fact, such as a stage, a schedule or a placement: a sentence, and a function that asserts it."""

    what: str
    asserts: Callable[[], None]
    source: str

    def __str__(self) -> str:
        return self.what.replace(" ", "-")

    def check(self, method: str) -> None:
        self.asserts()


Fact = Default | Start | Trains | Count | Holds


class Facts:
    """The table of one method."""

    def __init__(self, method: str, *facts: Fact):
        self.method, self.facts = method, facts
        assert method in taxonomy.methods(), f"{method} is no method"
        assert all(fact.source for fact in facts), f"each fact of {method} needs its source"

    def tests(self, function: Callable) -> Callable:
        """Decorates ``def test_published_facts(fact): fact()``: a test a fact."""
        checks = [pytest.param(functools.partial(fact.check, self.method), id=str(fact)) for fact in self.facts]
        return pytest.mark.parametrize("fact", checks)(function)


def tiny(method: str, family: str = "bert", seed: int = 0, **options) -> peftlib.Adapted:
    """The method on a fresh tiny model, with its options for such a model. ``seed`` draws its start."""
    model = backbones.load(f"tiny-{family}", head="classification", dropout=0.0).model
    chosen = taxonomy.entry(method).tiny | options
    return peftlib.attach(model, method, sources=registry.stand_ins(method), seed=seed, **chosen)


def calibrated(method: str, **options) -> Callable[[], peftlib.Adapted]:
    """For ``attach`` of a fact: the method on a fresh tiny BERT, calibrated on its eight texts."""

    def attach() -> peftlib.Adapted:
        adapted = peftlib.attach(case.backbone("bert"), method, **options)
        adapted.calibrate([case.batch("bert")])
        return adapted

    return attach
