"""The phase on unlabelled text with which some methods begin: done once for a backbone, kept in the cache.

>>> converted = peftlib.convert("minilm-l6", "coda", texts)
>>> adapted = peftlib.attach(classifier, "coda")
>>> adapted.start_from(converted)

The method is attached to a copy of the backbone, which goes on with its own pre-training objective where its files have
the head for it, and else learns to give the states that it gave before (:mod:`peftlib.training.objectives`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import BatchSampler

from peftlib import backbones, saved, sources
from peftlib.adapted import attach
from peftlib.backbones import Backbone
from peftlib.errors import ConfigError, DataError
from peftlib.mechanisms.schedules import Schedule
from peftlib.methods.base import MethodConfig, SavedAdapter, at_least
from peftlib.methods.registry import resolve
from peftlib.tasks.task import LengthGrouped
from peftlib.training import objectives

VERSION = 2
"""Raised whenever a conversion computes something else, so that no older cache is read."""


@dataclass(frozen=True)
class Conversion:
    """How a conversion trains: AdamW with a linear schedule, 6 % of it warm-up, gradients clipped to a norm of one."""

    steps: int = 1000
    batch_size: int = 16
    max_length: int = 64
    learning_rate: float = 3e-3
    objective: str = "auto"
    seed: int = 0


def convert(
    backbone: str | os.PathLike[str] | Backbone,
    method: str | MethodConfig,
    texts: Sequence[str],
    *,
    steps: int = Conversion.steps,
    batch_size: int = Conversion.batch_size,
    max_length: int = Conversion.max_length,
    learning_rate: float = Conversion.learning_rate,
    objective: str = Conversion.objective,
    seed: int = Conversion.seed,
    **options: Any,
) -> SavedAdapter:
    """What a method has learned from unlabelled text, for :meth:`Adapted.start_from`. A second call with the same
    arguments reads it from the cache.

    Args:
        backbone: a name, as for :func:`peftlib.backbones.load`, or a loaded one, which stays as it is.
        method: a name of a method that converts, with its ``options``, or a config object.
        texts: unlabelled; each is cut to ``max_length`` tokens, and batches have texts of similar length.
        objective: "masked", "spans" or "states"; "auto": the one that the backbone was trained with, and "states" for
            an encoder without that head.
        seed: of the method's start, the batches and what the objective draws.

    Raises ConfigError for a method that does not convert, DataError without any text, UnsupportedError for a backbone
    that cannot have the objective.
    """
    chosen = resolve(method, **options)
    if not chosen.converts:
        raise ConfigError(f"{chosen.name} has no phase before the task; attach() it, and train")
    if not texts:
        raise DataError("convert() was given no text")
    for name, value in (("steps", steps), ("batch_size", batch_size), ("max_length", max_length)):
        at_least(name, value, 1)
    how = Conversion(steps, batch_size, max_length, learning_rate, objective, seed)
    found = _with_head(backbone, objective)
    how = replace(how, objective=_objective(found, objective))
    facts = {
        "version": VERSION,
        "backbone": found.fingerprint,
        "method": chosen.name,
        "options": chosen.config.as_dict(),
        **asdict(how),
        "texts": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def build(folder: Path) -> None:
        adapter = _train(found, chosen.config, texts, how)
        saved.write(replace(adapter, notes={"conversion": facts}), folder / "adapter")

    return replace(saved.read(sources.cached_folder(f"conversions/{chosen.name}-{key}", build) / "adapter"), name=key)


def _with_head(backbone: str | os.PathLike[str] | Backbone, objective: str) -> Backbone:
    """The backbone under the head of the objective."""
    if isinstance(backbone, Backbone):
        return replace(backbone, model=copy.deepcopy(backbone.model))
    if objective != "auto":
        return backbones.load(backbone, head=objectives.find(objective).head)
    base = backbones.load(backbone, head="base")
    head = "seq2seq" if base.model.config.is_encoder_decoder else "masked_lm"
    trained = backbones.load(backbone, head=head)
    return base if head == "masked_lm" and trained.fresh else trained


def _objective(backbone: Backbone, wanted: str) -> str:
    heads = {cls.head: name for name, cls in objectives.OBJECTIVES.items()}
    name = heads.get(backbone.head, "states") if wanted == "auto" else wanted
    if objectives.find(name).head not in (backbone.head, "base"):
        raise ConfigError(
            f"objective={wanted!r} needs a backbone with head={objectives.find(name).head!r}, and this one has "
            f"{backbone.head!r}; load it so, or give its name"
        )
    return name


def _train(backbone: Backbone, config: MethodConfig, texts: Sequence[str], how: Conversion) -> SavedAdapter:
    model, tokenizer = backbone.model, backbone.tokenizer
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(how.seed)
        objective = objectives.find(how.objective)(model, tokenizer)
        adapted = attach(model, config, train_head=False, seed=how.seed)
        parameters = list(adapted.trainable().values())
        optimizer = torch.optim.AdamW(parameters, lr=how.learning_rate, weight_decay=0.0)
        life = adapted.lifecycle(how.steps)
        scheduler = life.scheduler(optimizer, Schedule("linear", warmup=0.06))
        model.train(objective.dropout)
        batches = _batches([tokenizer(t, truncation=True, max_length=how.max_length)["input_ids"] for t in texts], how)
        with life:
            for _ in range(how.steps):
                life.step_start()
                objective.loss(next(batches)).backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                life.gradients()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                life.step_end()
        model.eval()
    return adapted.snapshot()


def _batches(rows: Sequence[Sequence[int]], how: Conversion) -> Iterator[list[Sequence[int]]]:
    """Batches without end, in random order: of rows of similar length, each row once before any comes again."""
    size = min(how.batch_size, len(rows))
    order = LengthGrouped([len(row) for row in rows], size, torch.Generator().manual_seed(how.seed))
    while True:
        for batch in BatchSampler(order, size, drop_last=False):
            yield [rows[i] for i in batch]
