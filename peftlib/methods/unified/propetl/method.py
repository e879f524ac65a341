r"""ProPETL: one prototype module for all layers, of which each layer learns to keep its own part (unified).

.. math:: \theta_\ell = \theta \odot M_\ell, \qquad M_\ell = \mathrm{top}_{k}(|S_\ell|)

Shapes: the scores S_l and masks M_l have the shape of each of the prototype's matrices theta, of which k percent are
kept, tensor by tensor; the scores take the mask's gradient and train at a rate of their own. Trained: the prototype and
its size in scores for every layer; stored: the prototype and one bit a score. A loaded adapter trains on with its masks
fixed, because the scores are gone.

With ``tasks`` T > 1 each task i has a mask M_i as well, one for all layers (T prototypes' sizes of scores more), and a
row is computed with theta o (M_l or M_i): an entry is kept where the layer or the row's task keeps it. Batches carry
``task_ids``; ``adapted.task(i)`` sets the task of all rows, ``adapted.method.keep(i)`` leaves one.

========  ============================================  =================================  =======================
form      prototype                                     start                              merge
========  ============================================  =================================  =======================
adapter   W_down (r, d), W_up (d, r) and unmasked bias  near: both matrices N(0, 0.02^2)   no, it is nonlinear
prefix    keys and values (m, 2d), from an MLP          changed, as prefix tuning          no
lora      A (r, in), B (out, r) for each target name    identity: B is zero                exact, as LoRA
========  ============================================  =================================  =======================

The adapter reads the output that the feed-forward block has without it (behind the residual sum and, where it stands
there, the norm) and adds to the sum. The prefix form leaves the text's positions as they are and has a prototype for
each of encoder, decoder and cross-attention; encoder and decoder share the prototypes of the other forms
(``share_stacks``), as in the paper's T5 runs.

Source: Zeng et al. 2023, arXiv:2305.17682, and its code, with its RoBERTa-base settings as defaults: adapter r = 64,
half kept, scores at 30 times the rate; LoRA r = 32, alpha = 48, a tenth kept, 300 times; prefix m = 64, a tenth kept,
the same rate. There scores start uniform below 1 / sqrt(r) for W_down and 1 / sqrt(d) for W_up (they lie transposed),
1 / sqrt(2 m d) for a prefix, 1 / sqrt(in) and 1 / sqrt(r) for A and B. Their T5 adapters, the multi-task ones, start at
N(0, 0.01^2) with scores below 1 / sqrt(d) and 1 / sqrt(r), use GELU, keep 30 % of each mask and train the scores at 10
times the rate. Masks of tasks for the prefix and LoRA forms are our extension of their adapters'.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from peftlib.anatomy import Layer
from peftlib.errors import LoadError, UnknownNameError
from peftlib.mechanisms import attention
from peftlib.mechanisms.bottleneck import Bottleneck, behind_ffn, check_activation
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import LowRank, add_to_weight, check_rank
from peftlib.mechanisms.prefix import Prefix, PrefixEmbedding, PrefixEncoder
from peftlib.methods.base import Method, MethodConfig, at_least, between
from peftlib.methods.bases.low_rank import fit_rank
from peftlib.methods.bases.per_task import PerTask
from peftlib.methods.unified.propetl.layer import (
    COMBINE,
    Masked,
    MaskedBottleneck,
    MaskedLowRank,
    MaskedTable,
    Table,
    TaskMasks,
    TaskPrefix,
    TopMask,
)

KEEP = {"adapter": 0.5, "prefix": 0.1, "lora": 0.1}
MASK_RATE = {"adapter": 30.0, "prefix": 1.0, "lora": 300.0}


@dataclass(frozen=True)
class ProPETLConfig(MethodConfig):
    """``form``: "adapter" (``bottleneck`` r, ``activation``, ``std`` of the start), "prefix" (``length`` m, MLP of
    ``hidden`` units) or "lora" (``rank``, ``alpha``, ``targets``); ``keep``: share of each tensor that a layer keeps,
    and ``mask_rate``: factor of the learning rate for scores (None: the paper's for this form); ``share_stacks``: one
    prototype for encoder and decoder where their sizes agree; ``dropout``: of the inner activation (adapter) or the
    update's input (LoRA); ``tasks``: how many tasks have masks of their own (1: none has), and ``combine``: "or",
    "and" or "add", how a layer's mask and a task's become one."""

    form: Literal["adapter", "prefix", "lora"] = "adapter"
    keep: float | None = None
    mask_rate: float | None = None
    bottleneck: int = 64
    activation: str = "relu"
    std: float = 0.02
    length: int = 64
    hidden: int = 512
    rank: int = 32
    alpha: float = 48.0
    targets: tuple[str, ...] | str = ("*attention.query", "*attention.value")
    dropout: float = 0.0
    share_stacks: bool = True
    tasks: int = 1
    combine: Literal["or", "and", "add"] = "or"

    def __post_init__(self):
        if self.form not in KEEP:
            raise UnknownNameError("form of propetl", self.form, KEEP)
        if self.combine not in COMBINE:
            raise UnknownNameError("combine of propetl", self.combine, COMBINE)
        for name in ("bottleneck", "length", "hidden", "rank", "tasks"):
            at_least(name, getattr(self, name), 1)
        if self.keep is not None:
            between("keep", self.keep, 0, 1)
        if self.mask_rate is not None:
            between("mask_rate", self.mask_rate, 0, float("inf"))
        check_activation(self.activation)

    @property
    def share(self) -> float:
        return KEEP[self.form] if self.keep is None else self.keep


class ProPETL(PerTask):
    Config = ProPETLConfig
    each_task_has = "a mask"
    learning_rate = 5e-4

    def attach(self, host: Host) -> None:
        host.tasks.count = self.config.tasks if self.config.tasks > 1 else None
        self.prototypes: dict[tuple, nn.Module] = {}
        self.task_masks: dict[tuple, TaskMasks] = {}
        {"adapter": self._adapters, "prefix": self._prefixes, "lora": self._updates}[self.config.form](host)

    def _masked(self, kind: type[Masked], host: Host, stack: str, *key, make, shapes=None) -> Masked:
        """A place's view of the prototype that all places with this key share. The first of them makes the prototype
        and its tasks' masks."""
        c = self.config
        key = key if c.share_stacks else (stack, *key)
        if key not in self.prototypes:
            self.prototypes[key] = make()
        prototype = self.prototypes[key]
        shapes = shapes or kind.shapes(prototype)
        if c.tasks > 1 and key not in self.task_masks:
            self.task_masks[key] = TaskMasks(c.tasks, c.share, c.combine, shapes, kind.fan)
        return kind(prototype, c.share, shapes, self.task_masks.get(key), host.tasks)

    def task_parts(self) -> Iterable[TaskMasks]:
        return self.task_masks.values()

    def _adapters(self, host: Host) -> None:
        for layer in host.anatomy.layers:
            child = self._masked(MaskedBottleneck, host, layer.stack, make=lambda: self._bottleneck(host.anatomy.d))
            behind_ffn(host, layer, "propetl", child)

    def _bottleneck(self, d: int) -> Bottleneck:
        c = self.config
        bottleneck = Bottleneck(d, c.bottleneck, c.activation, dropout=c.dropout)
        for linear in (bottleneck.down, bottleneck.up):
            nn.init.normal_(linear.weight, std=c.std)
        return bottleneck

    def _updates(self, host: Host) -> None:
        c = self.config
        self.updates = {}
        sites = host.anatomy.sites(c.targets)
        self.config = c = fit_rank(c, sites)
        for site in sites:
            check_rank(c.rank, site)
            sizes = site.in_features, site.out_features
            child = self._masked(
                MaskedLowRank,
                host,
                site.stack,
                site.name,
                sizes,
                make=lambda sizes=sizes: LowRank(*sizes, c.rank, c.alpha / c.rank, c.dropout),
            )
            self.updates[site] = host.after(site, "propetl", child)

    def _prefixes(self, host: Host) -> None:
        c, parts = self.config, host.anatomy
        kind = TaskPrefix if c.tasks > 1 else Prefix
        for role, module, width in _attentions(parts.layers):
            size = parts.head_size(module)
            masked = self._masked(
                MaskedTable,
                host,
                role,
                role,
                make=lambda width=width: Table(PrefixEncoder(PrefixEmbedding(c.length, parts.d, c.hidden), width)),
                shapes={"table": (c.length, 2 * width)},
            )
            attention.attach(host, module, "propetl", kind(width // size, c.length, size, encoder=masked))

    def _parts(self, kind: type[nn.Module]) -> dict[str, nn.Module]:
        """The modules of this kind among the attached ones, each once, by name in the model."""
        found: dict[int, tuple[str, nn.Module]] = {}
        for path, child in self.host.paths().items():
            for name, module in child.named_modules(prefix=path):
                if isinstance(module, kind):
                    found.setdefault(id(module), (name, module))
        return dict(found.values())

    def learning_rates(self) -> dict[str, float]:
        factor = MASK_RATE[self.config.form] if self.config.mask_rate is None else self.config.mask_rate
        return {f"{name}.scores": factor for name, mask in self._parts(TopMask).items() if mask.scores is not None}

    def _dense(self) -> dict[str, torch.Tensor]:
        """What is stored as it is: prototypes (a table without its MLP) and the task head."""
        masks, tables = self._parts(TopMask), self._parts(Table)
        packed = {id(p) for module in (*masks.values(), *tables.values()) for p in module.parameters()}
        stored = self.host.state().keys()
        dense = {n: p for n, p in self.host.model.named_parameters() if n in stored and id(p) not in packed}
        return dense | {f"{name}.table": table() for name, table in tables.items()}

    @torch.no_grad()
    def state(self) -> dict[str, torch.Tensor]:
        return self._dense() | {f"{name}.bits": mask.pack() for name, mask in self._parts(TopMask).items()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        # The file of an adapter that kept one task has the first of the tasks' masks alone.
        if self.tasks > 1 and not any(".task_masks." in name and ".1.bits" in name for name in state):
            self.keep(0)
        if wrong := sorted(self.state().keys() ^ state.keys()):
            raise LoadError(f"the file does not fit: {len(wrong)} tensors are missing or left over {wrong[:3]}")
        for name, mask in self._parts(TopMask).items():
            mask.deploy(state[f"{name}.bits"])
        for table in self._parts(Table).values():
            table.keep()
        with torch.no_grad():
            for name, tensor in self._dense().items():
                if tensor.shape != state[name].shape:
                    raise LoadError(
                        f"{name} has shape {tuple(state[name].shape)} in the file, {tuple(tensor.shape)} here"
                    )
                tensor.copy_(state[name])

    def check_mergeable(self) -> None:
        if self.config.form != "lora":
            Method.check_mergeable(self)
        super().check_mergeable()

    def merge(self) -> None:
        for site, masked in self.updates.items():
            add_to_weight(site, masked.delta())


def _attentions(layers: list[Layer]) -> Iterator[tuple[str, nn.Module, int]]:
    """Role, module and width of the keys, of every attention."""
    for layer in layers:
        yield layer.stack, layer.attention, layer.sites["attention.key"].out_features
        if layer.cross_attention is not None:
            yield "cross", layer.cross_attention, layer.sites["cross_attention.key"].out_features
