r"""Multitask prompt tuning: a shared prompt times a low-rank factor of each task, distilled from single tasks' prompts.

.. math:: P_k = P^* \odot (u_k v_k^\top), \qquad
          L = L_{task} + \lambda\, \bigl(\mathrm{KL}(p_{teacher} \,\|\, p) + \|h_{teacher} - h\|^2\bigr)

Shapes: P* (m, e) with e the width of the embedding; u_k (m, r), v_k (r, e), r = 1; h, the last layer's output, is
compared by its mean square over positions that are not padding. Trained: m e and (m + e) r for each task. u and v start
from N(0, 0.02^2) and P* from embeddings of the vocabulary, so the first prompts are nearly zero; they take positions,
so the start is not the backbone's output. No merge: a prompt is input.

========================  ===========================================================================================
``sources``               what happens
========================  ===========================================================================================
prompts, one a task       the source phase: rows say their task in ``task_ids``, and each row learns from the prompt
                          of its task, with the task head that was saved with it. Saved is the student alone; loaded,
                          it trains on without its teachers
one saved ``mpt``         the target phase: P* is the source's, u and v are the mean over its tasks
                          (``start="mean"``), those of ``start_task`` ("task") or new ones ("shared")
none                      the decomposition alone, for ``tasks`` tasks
========================  ===========================================================================================

Source: Wang et al. 2023, arXiv:2303.02861, which could be read in part. Decomposition, its start and the starts of the
target phase are those of the authors' institute in HF peft. Teachers and the two distances are the paper's; lambda =
0.9, means in the place of sums and the last layer's states are chosen here. The teacher sees the rows in the same mode
as the student, dropout included. The paper draws the number of tasks of a batch anew each time; here the mixture of
:func:`peftlib.tasks.mix` says what is in a batch. One output (regression) is compared by its square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.errors import UnknownNameError, UnsupportedError
from peftlib.mechanisms import prompt
from peftlib.mechanisms.host import Host, Tasks
from peftlib.mechanisms.outputs import state_of
from peftlib.methods.base import ConfigError, ForwardPass, Method, MethodConfig, SavedAdapter, at_least, check_alike

STARTS = ("mean", "task", "shared")


@dataclass(frozen=True)
class MPTConfig(MethodConfig):
    """``length`` m; ``rank`` r; ``tasks`` (None: as many as teachers, else 1); ``distill``, the weight lambda;
    ``common``: how many of the vocabulary's first embeddings P* starts from; ``start`` of the target phase: "mean",
    "task" (the source's number ``start_task``) or "shared"; ``position`` of the prompt, as in prompt tuning."""

    length: int = 20
    rank: int = 1
    tasks: int | None = None
    distill: float = 0.9
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
        at_least("start_task", self.start_task, 0)
        for name, known in (("start", STARTS), ("position", ("front", "after_first"))):
            if getattr(self, name) not in known:
                raise UnknownNameError(name, getattr(self, name), known)


class Lesson:
    """The state (B, n, d) that the last layer gave in a training forward, while ``listening``; when it is ``on``,
    the teachers speak."""

    def __init__(self, tasks: Tasks):
        self.tasks, self.on, self.listening = tasks, False, False
        self.state: torch.Tensor | None = None


class MultitaskPrompt(nn.Module):
    """``shared`` (m, e), ``u`` (tasks, m, r), ``v`` (tasks, r, e); gives each row its task's prompt, or in a lesson its
    teacher's of ``teachers`` (tasks, m, e)."""

    def __init__(self, shared: torch.Tensor, tasks: int, rank: int, lesson: Lesson):
        super().__init__()
        m, e = shared.shape
        self.shared = nn.Parameter(shared)
        self.u = nn.Parameter(0.02 * torch.randn(tasks, m, rank))
        self.v = nn.Parameter(0.02 * torch.randn(tasks, rank, e))
        self.register_buffer("teachers", None, persistent=False)
        self.lesson = lesson

    def forward(self, embedded: torch.Tensor) -> torch.Tensor:
        ids = self.lesson.tasks.ids(len(embedded), embedded.device)
        if self.lesson.on:
            return self.teachers[ids]
        return self.shared * (self.u[ids] @ self.v[ids])


class TeacherHead(nn.Module):
    """One map of the task head as each teacher has it: ``weight`` (tasks, out, in), ``bias`` (tasks, out) or None."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, lesson: Lesson):
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.lesson = lesson

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not self.lesson.on:
            return y
        ids = self.lesson.tasks.ids(len(x), x.device)
        own = torch.einsum("b...i,boi->b...o", x.to(self.weight.dtype), self.weight[ids])
        if self.bias is not None:
            own = own + self.bias[ids].view(len(ids), *[1] * (own.dim() - 2), -1)
        return own.to(y.dtype)


class MPT(Method):
    Config = MPTConfig
    learning_rate = 1e-2
    source_methods = ("prompt_tuning", "mpt")
    fewest_sources = 0
    exceptions = {  # noqa: RUF012
        f"overfits on {family}": "As prompt tuning: a prompt acts through attention alone, which random weights spread "
        "evenly, and norms behind the blocks bound what is left, of which the teachers' answers take their part."
        for family in ("bert", "roberta", "electra", "distilbert", "bart")
    }

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
    def teaches(self) -> bool:
        return bool(self.teachers) and self.teachers[0].state is not None

    def hooks(self) -> tuple[str, ...]:
        return super().hooks() if self.teaches and self.config.distill else ()

    def attach(self, host: Host) -> None:
        c = self.config
        table = prompt.embedding(host)
        ids = torch.randperm(min(c.common, table.weight.shape[0]))
        with torch.no_grad():
            shared = table(ids.repeat(-(-c.length // len(ids)))[: c.length]).float().clone()
        self.lesson = Lesson(host.tasks)
        self.child = MultitaskPrompt(shared, self.tasks, c.rank, self.lesson)
        host.tasks.count = self.tasks
        prompt.attach(host, self.child, c.length, c.position)
        if self.learned is not None and self.learned.state is not None:
            self._start()
        if "penalty" in self.hooks():
            self._hire(host)

    def _start(self) -> None:
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

    def _hire(self, host: Host) -> None:
        """Set up the teachers: their prompts, their task heads, and what a forward keeps for the comparison."""
        parts, lesson = host.anatomy, self.lesson
        prompts = [next(iter(source.own.values())) for source in self.teachers]
        self.child.teachers = torch.stack(prompts).to(self.child.shared)
        maps = dict.fromkeys(name.rpartition(".")[0] for source in self.teachers for name in source.head)
        for path in maps:
            module = host.model.get_submodule(path)
            if not isinstance(module, nn.Linear):
                raise UnsupportedError(f"the head's {path} is no linear map, so teachers' heads cannot take its place")
            tensors = [self._of_teachers(parts.head, f"{path}.{kind}") for kind in ("weight", "bias")]
            host.after(module, "teacher", TeacherHead(*tensors, lesson))
        last = [layer for layer in parts.layers if layer.stack == parts.stacks[-1]][-1]
        host.hook(last.module, _keep_state, lesson)
        host.hook(host.model, _listen, lesson, before=True)

    def _of_teachers(self, head: dict[str, nn.Parameter], name: str) -> torch.Tensor | None:
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

    def penalty(self, forward: ForwardPass) -> torch.Tensor:
        lesson, tasks = self.lesson, self.host.tasks
        student, lesson.state = lesson.state, None
        # The rows' tasks count during a forward, and this is one.
        lesson.on = lesson.listening = tasks.running = True
        try:
            with torch.no_grad():
                logits = forward.logits(forward.replay())
        finally:
            lesson.on = lesson.listening = tasks.running = False
        teacher, lesson.state = lesson.state, None
        labels, two = forward.labels, len(self.host.anatomy.stacks) > 1
        asked = labels != -100 if labels is not None and labels.dim() == 2 else None
        mask = asked if two and asked is not None else forward.kwargs.get("attention_mask")
        squares = (student.float() - teacher.float()).square().mean(-1)
        total = _distance(forward.logits(), logits, asked) + _mean(squares, _fitted(mask, squares.shape[1]))
        return self.config.distill * total


def _distance(logits: torch.Tensor, teacher: torch.Tensor, asked: torch.Tensor | None) -> torch.Tensor:
    """KL divergence from the teacher's distribution, over the positions where something is asked."""
    logits, teacher = logits.float(), teacher.float()
    if logits.shape[-1] == 1:
        return (logits - teacher).square().mean()
    each = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return _mean(each, asked)


def _fitted(mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """The text's mask (B, n) for states with a prompt in front, which counts; None where it is not theirs."""
    if mask is None or mask.dim() != 2 or mask.shape[1] > length:
        return None
    return F.pad(mask, (length - mask.shape[1], 0), value=1)


def _mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return values.mean()
    return (values * mask).sum() / mask.sum()


def _listen(lesson: Lesson, model: nn.Module, args: tuple, kwargs: dict) -> None:
    lesson.listening = model.training and torch.is_grad_enabled()


def _keep_state(lesson: Lesson, layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    # Checkpointing runs the layer once more, after the comparison.
    if lesson.listening:
        lesson.state = state_of(output)
