"""The small world in which every method is checked: a tiny random backbone of one family, eight texts, few steps."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from peftlib import anatomy, backbones
from peftlib.adapted import Adapted, attach
from peftlib.backbones import tiny
from peftlib.errors import UnsupportedError
from peftlib.mechanisms import tasks
from peftlib.methods.base import MethodConfig, SavedAdapter
from peftlib.methods.registry import config as make_config
from peftlib.methods.registry import find
from peftlib.taxonomy import entry

FAMILIES = tuple(f for f in tiny.FAMILIES if f != "xlm-roberta")  # RoBERTa's own architecture and table
ENCODERS = ("bert", "roberta", "electra", "distilbert")
ENCODER_DECODERS = ("t5", "mt5", "bart")
LABELS = (0, 1, 1, 0, 1, 0, 0, 1)

# Options of the sources of methods that build on other adapters, where they are not the source's own for tiny models.
SOURCES: dict[str, dict] = {
    "adapter_fusion": {"robust": False},  # the plain adapter of its paper
    "mera": {"robust": False},
}


def lm_head(family: str) -> str:
    """The language-model head of a family."""
    if family in ENCODERS:
        return "masked_lm"
    return "seq2seq" if family in ENCODER_DECODERS else "causal_lm"


@functools.cache
def _backbone(family: str, head: str, default: torch.dtype) -> backbones.Backbone:
    # Without dropout, so that two runs of the same steps can be compared. A new head is drawn in the default dtype, so
    # a fingerprint, which changes that, has models of its own.
    return backbones.load(f"tiny-{family}", head=head, dropout=0.0)


def tokenizer(family: str):
    return _backbone(family, "classification", torch.get_default_dtype()).tokenizer


def backbone(family: str, head: str = "classification") -> nn.Module:
    """A fresh copy of the family's tiny model, in evaluation mode."""
    return copy.deepcopy(_backbone(family, head, torch.get_default_dtype()).model)


def texts() -> list[str]:
    """Eight different texts of 3 to 10 words."""
    words, step = tiny.WORDS, 7
    return [" ".join(words[(13 * i + step * j) % len(words)] for j in range(3 + i)) for i in range(8)]


@functools.cache
def _batch(family: str, head: str) -> dict[str, torch.Tensor]:
    encoded = dict(tokenizer(family)(texts(), return_tensors="pt", padding=True))
    if head == "classification":
        return encoded | {"labels": torch.tensor(LABELS)}
    labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
    return encoded | {"labels": labels}


def batch(family: str, head: str = "classification") -> dict[str, torch.Tensor]:
    """The eight texts with labels (for a language model: the texts themselves), padded on the right."""
    return {k: v.clone() for k, v in _batch(family, head).items()}


def inputs(family: str, head: str = "classification") -> dict[str, torch.Tensor]:
    """The batch without its labels, except where the model makes its decoder's inputs from them."""
    full = batch(family, head)
    return full if head == "seq2seq" else {k: v for k, v in full.items() if k != "labels"}


@torch.no_grad()
def logits(model: nn.Module, **given: torch.Tensor) -> torch.Tensor:
    """What the model answers in evaluation mode, for its first task where several are attached and none is said."""
    model.eval()
    with tasks.unnamed_rows(0):
        return model(**given).logits


@dataclass(frozen=True)
class Case:
    """One method on one family with one head, the backbone and the sources in one dtype.

    ``options`` are set over those that fit a tiny backbone.
    """

    method: str
    family: str
    head: str = "classification"
    dtype: torch.dtype = field(default=torch.float32, kw_only=True)
    options: dict = field(default_factory=dict, kw_only=True)

    @property
    def config(self) -> MethodConfig:
        return make_config(self.method, **{**entry(self.method).tiny, **self.options})

    def backbone(self) -> nn.Module:
        return backbone(self.family, self.head).to(self.dtype)

    def batch(self) -> dict[str, torch.Tensor]:
        return batch(self.family, self.head)

    def inputs(self) -> dict[str, torch.Tensor]:
        return inputs(self.family, self.head)

    def logits(self, model: nn.Module) -> torch.Tensor:
        return logits(model, **self.inputs())

    def start(self, model: nn.Module | None = None, **options) -> Adapted:
        """The method on a fresh backbone, with sources where it builds on some."""
        model = self.backbone() if model is None else model
        given = sources(self.method, self.family, self.head, model.config.num_hidden_layers, self.dtype)
        adapted = attach(model, self.config, sources=given, **options)
        adapted.host.tasks.default = 0  # of the eight texts, where there are several tasks
        return adapted

    def attach(self, model: nn.Module | None = None, **options) -> Adapted:
        """As :meth:`start`, calibrated where it must be."""
        adapted = self.start(model, **options)
        adapted.calibrate([self.batch()])
        return adapted

    def trained(self, steps: int = 3, **options) -> Adapted:
        """The method after a few large steps, so that it computes something else than at its start."""
        adapted = self.attach(**options)
        train(adapted, self.batch(), steps)
        return adapted


def train(
    adapted: Adapted,
    data: dict[str, torch.Tensor],
    steps: int = 3,
    *,
    total: int | None = None,
    start: int = 0,
    rate: float = 0.02,
    weight_decay: float = 0.0,
    watch: Iterable = (),
) -> list[float]:
    """Steps of AdamW on one batch inside the lifecycle; gives the losses. ``watch`` are called with each step's number
    between backward and update; ``start`` is the number of the first in the lifecycle. Leaves the model in evaluation
    mode. Nothing happens where nothing trains."""
    if not adapted.trainable():
        return []
    optimizer = torch.optim.AdamW(adapted.trainable().values(), lr=rate, weight_decay=weight_decay)
    losses = []
    adapted.model.train()
    with adapted.lifecycle(total or steps, start) as life:
        for step in range(steps):
            life.step_start()
            loss = adapted.model(**data).loss
            loss.backward()
            life.gradients()
            for look in watch:
                look(step)
            optimizer.step()
            optimizer.zero_grad()
            life.step_end()
            losses.append(float(loss.detach()))
    adapted.model.eval()
    return losses


def cut(model: nn.Module, layers: int) -> nn.Module:
    """The model with the first layers of each stack only."""
    for path in {layer.path.rpartition(".")[0] for layer in anatomy.of(model).layers}:
        del model.get_submodule(path)[layers:]
    model.config.num_hidden_layers = layers
    return model


@functools.cache
def sources(
    method: str, family: str, head: str, layers: int, dtype: torch.dtype = torch.float32
) -> tuple[SavedAdapter, ...]:
    """Adapters that differ, for a method that builds on some of another method; none for the others. ``layers`` of each
    stack are those of the backbone that they are for, and ``dtype`` is its."""
    cls = find(method)
    made = []
    for seed in range(max(2, cls.fewest_sources) if set(cls.source_methods) - {method} else 0):
        kind = cls.source_methods[0]
        config = make_config(kind, **SOURCES.get(method, entry(kind).tiny))
        adapted = attach(cut(backbone(family, head), layers).to(dtype), config, seed=seed)
        adapted.model.to(dtype)
        train(adapted, batch(family, head), steps=1 + seed)
        made.append(adapted.snapshot())
    return tuple(made)


def supported_family(method: str) -> str:
    """The first family that hosts the method, for checks that run on one family only."""
    for family in FAMILIES:
        try:
            Case(method, family).start()
        except UnsupportedError:
            continue
        return family
    raise AssertionError(f"{method} supports no family")
