r"""SPoT: a prompt learned on a source task starts the target's prompt (additive, soft prompt-based).

.. math:: P_{target} \leftarrow P_{s^*}, \qquad s^* = \arg\max_s \cos\bigl(\bar{P}_{target}, \bar{P}_s\bigr)

Shapes: P (m, e) with e the width of the embedding; P-bar (e), the mean over the m positions. Trained: m e. It is prompt
tuning with the sources' settings in everything but its start. No merge: a prompt is input.

``sources`` are saved prompts of :mod:`prompt_tuning`, the library of source tasks. With one of them, or with its name
in ``source``, the target starts from it. With several, :meth:`calibrate` trains a probe on the target's batches for a
few steps, from prompt tuning's start, ranks the library by similarity to the probe (``adapted.method.ranking``) and
starts from the nearest, or from the mean of the ``top`` nearest weighted by similarity. The probe and its task head are
then dropped. The sources' heads are never used: the target trains one of its own. ``similarity="tokens"`` is the mean
over all pairs of positions of the pairs' cosine.

Source: Vu et al. 2022, arXiv:2110.07904, whose two similarities and weighted mean these are. There m is 100, both
tasks' embeddings are prompts early in training (10,000 of 262,144 steps) and the target's own is trained that far. So
here: ``early`` names those of the sources that are such prompts, saved early in the training of the others (``save()``
works amid training). Without them a source stands for itself, as it was saved. The probe's steps and rate are chosen
here. Negative similarities count as zero in the weighted mean. Similarities compare best where all prompts start from
the same vectors, as they do with the same ``seed`` of attach(). A library of one prompt trained on a mixture of tasks
is ``peftlib.tasks.mix``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from peftlib.errors import StateError, UnknownNameError
from peftlib.mechanisms.host import Host
from peftlib.methods.base import ConfigError, Method, MethodConfig, SavedAdapter, at_least, between, check_alike
from peftlib.methods.bases.sources import attach_source

SIMILARITIES = ("mean", "tokens")


@dataclass(frozen=True)
class SPoTConfig(MethodConfig):
    """``source``: name of the one to start from ("": the nearest); ``similarity`` of prompts, "mean" or "tokens";
    ``top``: how many of the nearest are averaged; ``early``: names of sources that the probe is compared with and that
    nothing starts from, one for each of the others in their order; ``probe_steps`` and ``probe_rate`` (of AdamW)."""

    source: str = ""
    similarity: Literal["mean", "tokens"] = "mean"
    top: int = 1
    early: tuple[str, ...] = ()
    probe_steps: int = 100
    probe_rate: float = 1e-2

    def __post_init__(self):
        at_least("top", self.top, 1)
        at_least("probe_steps", self.probe_steps, 1)
        between("probe_rate", self.probe_rate, 0, float("inf"))
        if self.similarity not in SIMILARITIES:
            raise UnknownNameError("similarity", self.similarity, SIMILARITIES)


def similarity(one: torch.Tensor, other: torch.Tensor, kind: str = "mean") -> float:
    """Cosine similarity of two prompts (m, e): of their means, or the mean over all pairs of their "tokens"."""
    one, other = one.double(), other.double()
    if kind == "mean":
        return float(F.cosine_similarity(one.mean(0), other.mean(0), dim=0))  # (m, e) -> (e) -> ()
    return float((F.normalize(one, dim=1) @ F.normalize(other, dim=1).T).mean())  # (m, e) @ (e, m) -> (m, m) -> ()


class SPoT(Method):
    Config = SPoTConfig
    learning_rate = 1e-2
    source_methods = ("prompt_tuning",)
    fewest_sources = 1

    def take_sources(self, sources: tuple[SavedAdapter, ...]) -> None:
        super().take_sources(sources)
        check_alike(self.name, sources, "length", "position")
        wanted = self.config.source
        named = [s for s in sources if s.name == wanted]
        if wanted and not named:
            raise UnknownNameError("source of spot", wanted, [s.name for s in sources])
        if len(named) > 1:
            raise ConfigError(f"{len(named)} sources are named {wanted!r}; save them in folders of different names")
        self.library, self.embeddings = self._library(sources)
        if self.config.top > len(self.library):
            raise ConfigError(f"top={self.config.top} is more than the {len(self.library)} sources that were given")
        self.chosen = named[0] if named else self.library[0]
        self.calibrates = not named and len(self.library) > 1
        self.ranking: list[tuple[str, float]] = []

    def _library(self, sources: tuple[SavedAdapter, ...]) -> tuple[tuple[SavedAdapter, ...], tuple[SavedAdapter, ...]]:
        """The prompts to start from, and for each the one that it is compared by."""
        early, by_name = self.config.early, {s.name: s for s in sources}
        if not early:
            return sources, sources
        for name in early:
            if name not in by_name:
                raise UnknownNameError("source of spot", name, by_name)
        library = tuple(s for s in sources if s.name not in early)
        if len(library) != len(early) or len(sources) != len(by_name):
            raise ConfigError(
                f"early={early!r} names {len(early)} prompts for {len(library)} others; give each source an early one, "
                "in the same order, all under names of their own"
            )
        return library, tuple(by_name[name] for name in early)

    def attach(self, host: Host) -> None:
        attach_source(self.sources[0], host)
        (self.prompt,) = host.trained().values()
        if not self.calibrates and self.chosen.state is not None:
            self._start(_vectors(self.chosen))

    def calibrate(self, batches: Iterable[dict[str, torch.Tensor]], checkpoint: Path | None = None) -> None:
        if any(source.state is None for source in self.sources):
            raise StateError("this spot was loaded without its sources; attach() it with them to retrieve again")
        probe = self._probe(batches)  # (m, e)
        prompts = [_vectors(source) for source in self.library]  # each (m, e)
        near = [similarity(probe, _vectors(source), self.config.similarity) for source in self.embeddings]
        order = sorted(range(len(near)), key=lambda i: -near[i])
        self.ranking = [(self.library[i].name, near[i]) for i in order]
        best = order[: self.config.top]
        weights = torch.tensor([max(near[i], 0.0) for i in best])
        if len(best) == 1 or weights.sum() == 0:
            best, weights = best[:1], torch.ones(1)
        self._start(sum(w * prompts[i] for w, i in zip(weights / weights.sum(), best)))

    def _probe(self, batches: Iterable[dict[str, torch.Tensor]]) -> torch.Tensor:
        """The prompt (m, e) after a few steps on the target; prompt and head are then set back."""
        c, parameters = self.config, list(self.host.trained().values())
        before = [p.detach().clone() for p in parameters]
        optimizer = torch.optim.AdamW(parameters, lr=c.probe_rate, weight_decay=0.0)
        first = list(islice(batches, c.probe_steps))
        with torch.enable_grad():
            for batch in islice(chain.from_iterable(repeat(first)), c.probe_steps):
                self.host.model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        probe = self.prompt.detach().cpu().clone()
        with torch.no_grad():
            for parameter, values in zip(parameters, before):
                parameter.copy_(values)
        return probe

    def _start(self, vectors: torch.Tensor) -> None:
        with torch.no_grad():
            self.prompt.copy_(vectors)


def _vectors(source: SavedAdapter) -> torch.Tensor:
    """The prompt (m, e) of a source."""
    (vectors,) = source.own.values()
    return vectors
