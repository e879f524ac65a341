"""Several methods on one backbone as one. Hybrids of the survey are combinations with settings of their own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import length_hint
from pathlib import Path
from typing import Any

import torch

from peftlib.errors import ConfigError, LoadError, StateError, UnsupportedError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.schedules import Stage
from peftlib.methods import registry
from peftlib.methods.base import HOOKS, ForwardPass, Method, MethodConfig, SavedAdapter, TrainingState


@dataclass(frozen=True)
class CombinationConfig(MethodConfig):
    """``parts``: one dictionary a part, ``{"method": name, **options}``; made by :func:`combine`."""

    parts: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        # As the parts' own configs have it, also when they come from JSON.
        plain = ({k: tuple(v) if isinstance(v, list) else v for k, v in part.items()} for part in self.parts)
        object.__setattr__(self, "parts", tuple(plain))


def make_parts(configs: Iterable[dict[str, Any]]) -> list[Method]:
    """Unattached methods, one for each ``{"method": name, **options}``."""
    return [registry.resolve(c["method"], **{k: v for k, v in c.items() if k != "method"}) for c in configs]


class _Conflict(UnsupportedError):
    """Two parts want the same place; the cause says which."""


class Combination(Method):
    """Attaches its parts in order, those that calibrate last. Counts add up; the training hooks run part by part; it
    merges if every part does."""

    Config = CombinationConfig

    def part_configs(self) -> tuple[dict[str, Any], ...]:
        """The parts, as ``CombinationConfig.parts`` has them. Hybrids override this."""
        return self.config.parts

    def __init__(self, config: MethodConfig):
        super().__init__(config)
        self.parts = make_parts(self.part_configs())
        self.calibrates = any(part.calibrates for part in self.parts)
        self.clips = any(part.clips for part in self.parts)
        self.replaces = any(part.replaces for part in self.parts)
        self.source_methods = tuple(dict.fromkeys(m for part in self.parts for m in part.source_methods))
        self.fewest_sources = min((part.fewest_sources for part in self.parts if part.source_methods), default=0)

    def parts_and_itself(self) -> tuple[Method, ...]:
        return (self, *(method for part in self.parts for method in part.parts_and_itself()))

    def take_sources(self, sources: tuple[SavedAdapter, ...]) -> None:
        """Each part that builds on sources gets those of its kinds."""
        super().take_sources(sources)
        for part in self.parts:
            part.take_sources(tuple(s for s in sources if s.config.method in part.source_methods))

    def attach(self, host: Host) -> None:
        for part in self._in_order():
            part.host = self.scope(host, part)
            try:
                part.attach(part.host)
            except (StateError, _Conflict) as error:
                names = " + ".join(p.name for p in self.parts)
                # A conflict is one inside of a part that is a combination itself.
                taken = error.__cause__ if isinstance(error, _Conflict) else error
                raise _Conflict(
                    f"{names} cannot be combined: {part.name} wants a place that is taken ({taken})"
                ) from taken

    def _in_order(self) -> list[Method]:
        """The parts as they attach: first those that put maps of their own in the place of the backbone's, beside which
        others can stand; last those that choose among frozen parameters, for they leave alone what another trains."""
        return sorted(self.parts, key=lambda part: (part.calibrates, not part.replaces))

    def head(self, head: dict[str, torch.nn.Parameter]) -> dict[str, torch.nn.Parameter]:
        for part in self.parts:
            head = part.head(head)
        return head

    def scope(self, host: Host, part: Method) -> Host:
        """Where a part attaches. Hybrids that restrict or gate a part override this."""
        return host.scope()

    def calibrate(self, batches: Iterable[dict[str, torch.Tensor]], checkpoint: Path | None = None) -> None:
        calibrating = [(i, part) for i, part in enumerate(self.parts) if part.calibrates]
        if len(calibrating) > 1 and not length_hint(batches):
            # A stream that can be read once.
            batches = list(batches)
        for i, part in calibrating:
            own = checkpoint and checkpoint.with_name(f"{checkpoint.name}-{i}")
            part.calibrate(batches, own if len(calibrating) > 1 else checkpoint)

    def pending(self) -> tuple[int, int, int]:
        trained, stored, size = map(sum, zip(*(part.pending() for part in self.parts)))
        return trained, stored, size

    def searched(self) -> int:
        return sum(part.searched() for part in self.parts)

    def hooks(self) -> tuple[str, ...]:
        taken = {hook for part in self.parts for hook in part.hooks()}
        return tuple(m for m in HOOKS if m in taken)

    @property
    def restarts(self) -> bool:  # type: ignore[override]  # of its parts, so not of the class
        return any(part.restarts for part in self.parts)

    def stages(self, total: int) -> tuple[Stage, ...]:
        """Those of the parts, which must be the same where several parts have more than one."""
        found = {part.name: stages for part in self.parts if len(stages := part.stages(total)) > 1}
        if len(set(found.values())) > 1:
            raise ConfigError(
                f"{' and '.join(found)} train in different stages and cannot be trained together: train one, merge it "
                "or load it as it is, then attach the other"
            )
        return next(iter(found.values()), super().stages(total))

    def counts_passes(self, training: TrainingState) -> bool:
        return any(part.counts_passes(training) for part in self.parts)

    def on_step_start(self, training: TrainingState) -> None:
        for part in self.parts:
            part.on_step_start(training)

    def penalty(self, forward: ForwardPass) -> torch.Tensor | None:
        penalties = [p for p in (part.penalty(forward) for part in self.parts) if p is not None]
        return sum(penalties[1:], penalties[0]) if penalties else None

    def on_gradients(self, training: TrainingState) -> None:
        for part in self.parts:
            part.on_gradients(training)

    def on_step_end(self, training: TrainingState) -> None:
        for part in self.parts:
            part.on_step_end(training)

    def on_train_end(self) -> None:
        for part in self.parts:
            part.on_train_end()

    @property
    def classifies(self) -> bool:
        return any(part.classifies for part in self.parts)

    @property
    def fitted(self) -> bool:
        return any(part.fitted for part in self.parts)

    def fit(self, batches: Iterable[dict[str, torch.Tensor]]) -> None:
        for part in self.parts:
            part.fit(batches)

    def predict(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return next(part for part in self.parts if part.fitted).predict(batch)

    def learning_rates(self) -> dict[str, float]:
        return {name: factor for part in self.parts for name, factor in part.learning_rates().items()}

    def state(self) -> dict[str, torch.Tensor]:
        return {name: tensor for part in self.parts for name, tensor in part.state().items()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        # What calibration would have created is not there yet, so such a part also gets what no other part knows.
        known = {id(part): part.state().keys() for part in self.parts}
        left = state.keys() - {n for part in self.parts if not part.calibrates for n in known[id(part)]}
        for part in self.parts:
            names = known[id(part)] | (left if part.calibrates else set())
            part.load_state({n: t for n, t in state.items() if n in names})
        if left and not any(part.calibrates for part in self.parts):
            raise LoadError(f"the file does not fit: {len(left)} tensors are left over {sorted(left)[:3]}")

    def run_state(self) -> dict[str, torch.Tensor]:
        return {f"{i}.{name}": t for i, part in enumerate(self.parts) for name, t in part.run_state().items()}

    def load_run_state(self, state: dict[str, torch.Tensor]) -> None:
        for i, part in enumerate(self.parts):
            part.load_run_state({n.removeprefix(f"{i}."): t for n, t in state.items() if n.startswith(f"{i}.")})

    def check_mergeable(self) -> None:
        for part in self.parts:
            part.check_mergeable()

    def merge(self) -> None:
        for part in self._in_order():
            part.merge()

    def merge_inputs(self) -> None:
        for part in reversed(self._in_order()):
            part.merge_inputs()


def combine(*parts: str | MethodConfig) -> CombinationConfig:
    """Several methods as one: ``attach(model, combine("prefix_tuning", "parallel_adapter"))``.

    Parts are names (with their defaults) or configs. Raises UnknownNameError for a name that does not exist,
    ConfigError for fewer than two parts and, when attached, UnsupportedError for parts that want the same place.
    """
    if len(parts) < 2:
        raise ConfigError(f"a combination needs at least two methods, and {len(parts)} were given")
    configs = [registry.resolve(part).config for part in parts]
    return CombinationConfig(tuple({"method": c.method, **c.as_dict()} for c in configs))
