r"""Multitask prompt tuning: a shared prompt times a low-rank factor of each task, distilled from single tasks' prompts.

.. math:: P_k = P^* \odot (u_k v_k^\top), \qquad
          L = L_{task} + \lambda\, \bigl(\mathrm{KL}(p_{teacher} \,\|\, p) + \|h_{teacher} - h\|^2\bigr), \qquad
          p = \mathrm{softmax}(z / T)

Shapes: P* (m, e) with e the width of the embedding; for each task k u_k (m, r), v_k (r, e), r = 1; z (b, ..., classes)
logits, T the temperature; h (b, t, d), the last layer's output for b rows of t tokens, prompt included, is compared by
its mean square over positions that are not padding; with two stacks that of the encoder and that of the decoder are.
Trained: m e and (m + e) r for each task. u and v start from N(0, 0.02^2) and P* from embeddings of the
vocabulary, so the first prompts are nearly zero. They take positions, so the start is not the backbone's output. No
merge: a prompt is input.

========================  ===========================================================================================
``sources``               what happens
========================  ===========================================================================================
prompts, one a task       the source phase: rows say their task in ``task_ids``; the teacher of a row is the prompt of
                          its task, with the task head that was saved with it. The student alone is saved; loaded, it
                          trains on without teachers
one saved ``mpt``         the target phase: P* is the source's, u and v are the mean over its tasks
                          (``start="mean"``), those of ``start_task`` ("task") or new ones ("shared"), and train at
                          ``task_rate`` times the rate of P*
none                      the decomposition alone, for ``tasks`` tasks
========================  ===========================================================================================

Source: Wang et al. 2023, arXiv:2303.02861, which could be read in part, and without its authors' code, which no archive
has. Decomposition, its start and the starts of the target phase are those of their institute in HF peft; prompts of 100
vectors, the teachers, both distances and the temperature are the paper's. From memory of the paper, not confirmed:
lambda = 0.9, rates of 0.3 for P* and 0.4 for the factors in the target phase (``task_rate``), the states of both stacks
of T5. Chosen here: T = 1, means in the place of sums, the last layer's states. The teacher's forward is in the same
mode as the student's, dropout included. The paper draws the number of tasks of a batch anew each time; here the mixture
of :func:`peftlib.tasks.mix` says what is in a batch. One output (regression) is compared by its square.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.errors import UnknownNameError, UnsupportedError
from peftlib.mechanisms import prompt
from peftlib.mechanisms.call import Local
from peftlib.mechanisms.host import Host, Tasks
from peftlib.mechanisms.outputs import state_of
from peftlib.methods.base import (
    ConfigError,
    ForwardPass,
    Method,
    MethodConfig,
    SavedAdapter,
    at_least,
    between,
    check_alike,
)
from peftlib.methods.bases import hf_peft

STARTS = ("mean", "task", "shared")


@dataclass(frozen=True)
class MPTConfig(MethodConfig):
    """``length`` m; ``rank`` r; ``tasks`` (None: as many as teachers, else 1); ``distill``, the weight lambda;
    ``temperature`` T of the compared logits; ``task_rate``: the rate of u and v in the target phase, in units of P*'s;
    ``common``: how many of the vocabulary's first embeddings P* starts from; ``start`` of the target phase: "mean",
    "task" (the source's number ``start_task``) or "shared"; ``position`` of the prompt, as in prompt tuning."""

    length: int = 100
    rank: int = 1
    tasks: int | None = None
    distill: float = 0.9
    temperature: float = 1.0
    task_rate: float = 1.3333333333333333  # 0.4 / 0.3
    common: int = 5000
    start: Literal["mean", "task", "shared"] = "mean"
    start_task: int = 0
    position: prompt.Position = "front"

    def __post_init__(self):
        for name in ("length", "rank", "common"):
            at_least(name, getattr(self, name), 1)
        if self.tasks is not None:
            at_least("tasks", self.tasks, 1)
        at_least("distill", self.distill, 0)
        between("temperature", self.temperature, 0, float("inf"))
        between("task_rate", self.task_rate, 0, float("inf"))
        at_least("start_task", self.start_task, 0)
        for name, known in (("start", STARTS), ("position", ("front", "after_first"))):
            if getattr(self, name) not in known:
                raise UnknownNameError(name, getattr(self, name), known)


class Distillation(Local):
    """What a training forward and the teachers' share: h (b, t, d), the ``states`` that the last layer of each stack
    gave.

    ``teaching``: the teachers' prompts and heads act in the student's place. ``keeps_states``: h is to be kept.
    """

    def __init__(self) -> None:
        self.teaching = self.keeps_states = False
        self.states: dict[str, torch.Tensor] = {}

    def take(self) -> dict[str, torch.Tensor]:
        """The states of the forward that has just run, which are kept no longer."""
        states, self.states = self.states, {}
        return states

    @contextmanager
    def teachers(self) -> Iterator[None]:
        """Inside ``with`` the teachers answer."""
        self.teaching = self.keeps_states = True
        try:
            yield
        finally:
            self.teaching = self.keeps_states = False


class MultitaskPrompt(nn.Module):
    """``forward(x) = P_k`` for each row of the embedded input x (b, t, e), k its task.

    ``shared`` P* (m, e), ``u`` (tasks, m, r), ``v`` (tasks, r, e), frozen ``teachers`` (tasks, m, e) or None.
    """

    def __init__(self, shared: torch.Tensor, tasks: int, rank: int, rows: Tasks, distillation: Distillation):
        super().__init__()
        m, e = shared.shape
        self.shared = nn.Parameter(shared)
        self.u = nn.Parameter(0.02 * torch.randn(tasks, m, rank))
        self.v = nn.Parameter(0.02 * torch.randn(tasks, rank, e))
        self.register_buffer("teachers", None, persistent=False)
        self.rows, self.distillation = rows, distillation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k = self.rows.ids(len(x), x.device)  # (b)
        if self.distillation.teaching:
            return self.teachers[k]  # (b, m, e)
        return self.shared * (self.u[k] @ self.v[k])  # (m, e) * (b, m, r) @ (b, r, e) -> (b, m, e)


class TeacherHead(nn.Module):
    """``forward(x, y)``: the student's y (b, ..., out), or for x (b, ..., in) the output of each row's teacher.

    One linear map of the task head as each teacher has it: ``weight`` (tasks, out, in), ``bias`` (tasks, out) or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, rows: Tasks, distillation: Distillation):
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.rows, self.distillation = rows, distillation

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not self.distillation.teaching:
            return y
        k = self.rows.ids(len(x), x.device)  # (b)
        own = torch.einsum("b...i,boi->b...o", x.to(self.weight.dtype), self.weight[k])  # (b, ..., in) -> (b, ..., out)
        if self.bias is not None:
            own = own + self.bias[k].view(len(k), *[1] * (own.dim() - 2), -1)  # (b, ..., out)
        return own.to(y.dtype)


class _Files(hf_peft.Prompt):
    """P*, u and v of all tasks."""

    kind = "MULTITASK_PROMPT_TUNING"
    encoder_alone = False
    others = ("prefix_task_cols", "prefix_task_rows")
    unused = (
        *hf_peft.Prompt.unused,
        *("prompt_tuning_init_state_dict_path", "prompt_tuning_init_task", "num_ranks", "num_tasks"),
    )

    def options(self, found: dict[str, torch.Tensor]) -> dict:
        tasks, _, rank = found["prefix_task_cols"].shape
        return {"tasks": tasks, "rank": rank}

    def parameters(self, method: Method) -> dict[str, torch.Tensor]:
        child = method.child
        return {"prompt_embeddings": child.shared, "prefix_task_cols": child.u, "prefix_task_rows": child.v}

    def more_settings(self, method: Method) -> dict:
        return {"prompt_tuning_init": "RANDOM", "num_tasks": method.tasks, "num_ranks": method.config.rank}


class MPT(Method):
    Config = MPTConfig
    learning_rate = 1e-2
    hf_peft = _Files()
    source_methods = ("prompt_tuning", "mpt")
    fewest_sources = 0

    def take_sources(self, sources: tuple[SavedAdapter, ...]) -> None:
        super().take_sources(sources)
        c = self.config
        self.learned = next((s for s in sources if s.config.method == "mpt"), None)
        self.teachers = () if self.learned else sources
        self.tasks = c.tasks or len(self.teachers) or 1
        if self.learned and len(sources) > 1:
            raise ConfigError("the target phase of mpt starts from one saved mpt, and more sources were given")
        if self.teachers and len(self.teachers) != self.tasks:
            raise ConfigError(f"tasks={self.tasks} and {len(self.teachers)} teachers: give one prompt a task, in order")
        if self.teachers:
            check_alike(self.name, sources, "length", "position")
        for name in ("length", "position"):
            mine, theirs = getattr(c, name), [getattr(source.config, name) for source in sources]
            if theirs and theirs[0] != mine:
                raise ConfigError(f"{name}={mine!r}, and the sources have {theirs[0]!r}; set it to that")

    @property
    def distills(self) -> bool:
        """Whether there are teachers; a loaded student has none."""
        return bool(self.teachers) and self.teachers[0].state is not None

    def hooks(self) -> tuple[str, ...]:
        return super().hooks() if self.distills and self.config.distill else ()

    def attach(self, host: Host) -> None:
        c = self.config
        shared = prompt.sample(prompt.embedding(host), c.length, c.common)
        self.distillation = Distillation()
        self.child = MultitaskPrompt(shared, self.tasks, c.rank, host.tasks, self.distillation)
        host.tasks.count = self.tasks
        prompt.attach(host, self.child, c.length, c.position)
        if self.learned is not None and self.learned.state is not None:
            self._start_target()
        if "penalty" in self.hooks():
            self._set_up_teachers(host)

    def _start_target(self) -> None:
        """Take P* and the factors from the source phase."""
        c = self.config
        found = {name.rpartition(".")[2]: t for name, t in self.learned.own.items()}
        with torch.no_grad():
            self.child.shared.copy_(found["shared"])
            for name in () if c.start == "shared" else ("u", "v"):
                theirs, mine = found[name], getattr(self.child, name)
                if theirs.shape[1:] != mine.shape[1:]:
                    raise ConfigError(f"rank={c.rank} differs from that of the source {self.learned.name!r}")
                if c.start == "task" and c.start_task >= len(theirs):
                    raise ConfigError(f"start_task={c.start_task}: the source has tasks 0 to {len(theirs) - 1}")
                mine.copy_(theirs.mean(0) if c.start == "mean" else theirs[c.start_task])

    def _set_up_teachers(self, host: Host) -> None:
        """Add the teachers' prompts and task heads, and the hooks that keep h."""
        parts, distillation = host.anatomy, self.distillation
        prompts = [next(iter(source.own.values())) for source in self.teachers]
        self.child.teachers = torch.stack(prompts).to(self.child.shared)
        maps = dict.fromkeys(name.rpartition(".")[0] for source in self.teachers for name in source.head)
        for path in maps:
            module = host.model.get_submodule(path)
            if not isinstance(module, nn.Linear):
                raise UnsupportedError(f"the head's {path} is no linear map, so teachers' heads cannot take its place")
            tensors = [self._of_teachers(parts.head, f"{path}.{kind}") for kind in ("weight", "bias")]
            host.after(module, "teacher", TeacherHead(*tensors, host.tasks, distillation))
        for stack, layer in {layer.stack: layer for layer in parts.layers}.items():  # the last of each stack
            host.hook(layer.module, _keep_state, distillation, stack)
        host.hook(host.model, _keep_in_training, distillation, before=True)

    def _of_teachers(self, head: dict[str, nn.Parameter], name: str) -> torch.Tensor | None:
        """A tensor of the head as each teacher has it, (tasks, ...); the model's own where a teacher has none."""
        if name not in head:
            return None
        own = head[name].detach().float()
        tensors = [source.state.get(name, own).to(own) for source in self.teachers]
        for source, tensor in zip(self.teachers, tensors):
            if tensor.shape != own.shape:
                raise ConfigError(
                    f"teacher {source.name!r} has a head of shape {tuple(tensor.shape)} at {name}, the model of "
                    f"{tuple(own.shape)}; load the backbone with the teachers' number of labels"
                )
        return torch.stack(tensors)

    def learning_rates(self) -> dict[str, float]:
        if self.learned is None:
            return {}
        fast = {id(self.child.u), id(self.child.v)}
        return {n: self.config.task_rate for n, p in self.host.trained().items() if id(p) in fast}

    def penalty(self, forward: ForwardPass) -> torch.Tensor:
        distillation = self.distillation
        mine = distillation.take()  # (b, t, d) a stack
        with distillation.teachers(), torch.no_grad():
            teacher_logits = forward.logits(forward.replay())  # (b, ..., classes)
        theirs = distillation.take()  # (b, t, d) a stack
        labels = forward.labels
        labelled = labels != -100 if labels is not None and labels.dim() == 2 else None  # (b, t)
        distance = _divergence(forward.logits(), teacher_logits, labelled, self.config.temperature)
        for number, (stack, h) in enumerate(mine.items()):
            squares = (h.float() - theirs[stack].float()).square().mean(-1)  # (b, t, d) -> (b, t)
            mask = labelled if number and labelled is not None else forward.kwargs.get("attention_mask")
            distance = distance + _masked_mean(squares, _mask_of_states(mask, squares.shape[1]))
        return self.config.distill * distance


def _divergence(
    logits: torch.Tensor, teacher: torch.Tensor, labelled: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    """KL(p_teacher || p) of logits (b, ..., classes) at a temperature, the mean over rows or labelled positions."""
    logits, teacher = logits.float(), teacher.float()
    if logits.shape[-1] == 1:
        return (logits - teacher).square().mean()
    log_p, log_target = ((z / temperature).log_softmax(-1) for z in (logits, teacher))  # (b, ..., classes)
    each = F.kl_div(log_p, log_target, reduction="none", log_target=True).sum(-1)
    return _masked_mean(each, labelled)


def _mask_of_states(mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """The text's mask with ones for the prompt in front, (b, length); None where the mask is not the states'."""
    if mask is None or mask.dim() != 2 or mask.shape[1] > length:
        return None
    return F.pad(mask, (length - mask.shape[1], 0), value=1)


def _masked_mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return values.mean()
    return (values * mask).sum() / mask.sum()


def _keep_in_training(distillation: Distillation, model: nn.Module, args: tuple, kwargs: dict) -> None:
    distillation.keeps_states = model.training and torch.is_grad_enabled()


def _keep_state(
    distillation: Distillation, stack: str, layer: nn.Module, args: tuple, kwargs: dict, output: Any
) -> None:
    # Checkpointing runs the layer once more, after the comparison.
    if distillation.keeps_states:
        distillation.states[stack] = state_of(output)
