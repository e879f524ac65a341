"""A task's metrics of an adapted model on one split."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.errors import DataError
from peftlib.methods.base import Method

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerBase

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

Precision = Literal["no", "bf16", "fp16"]


class Task(Protocol):
    """What training and evaluation need of a task; :class:`peftlib.tasks.task.Task` is one."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def num_labels(self) -> int: ...

    def encode(self, tokenizer: PreTrainedTokenizerBase, split: str, max_length: int | None = None) -> Dataset: ...

    def loader(
        self,
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        max_length: int | None = None,
        group_by_length: bool = False,
    ) -> DataLoader[Any]: ...

    def evaluate(
        self, outputs: torch.Tensor, labels: torch.Tensor, task_ids: torch.Tensor | None = None
    ) -> dict[str, float]: ...

    def choice_logits(
        self, logits: torch.Tensor, attention_mask: torch.Tensor, tokenizer: PreTrainedTokenizerBase
    ) -> torch.Tensor: ...


class Tuned(Protocol):
    """A model with the method that is attached to it, as :func:`peftlib.attach` gives them."""

    model: nn.Module
    method: Method


@torch.no_grad()
def evaluate_task(
    adapted: Tuned,
    task: Task,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    precision: Precision = "no",
) -> dict[str, float]:
    """The task's metrics of a model on one split, and its mean ``loss``, under the precision's autocast. A method that
    is ``fitted`` answers in its model's place.

    Leaves the model in evaluation mode. Raises DataError for a split that is empty or has no labels.
    """
    check_labels(task, split, tokenizer, max_length)
    model = adapted.model
    model.eval()
    device = next(model.parameters()).device
    loader = task.loader(split, tokenizer, batch_size=batch_size, max_length=max_length, group_by_length=True)
    logits, labels, task_ids, losses, weights = [], [], [], [], []
    for batch in loader:
        batch = {k: v.to(device) for k, v in batch.items()}
        with torch.autocast(device.type, _AUTOCAST.get(precision), enabled=precision in _AUTOCAST):
            answer, asked, loss = _answer(adapted, task, batch, tokenizer)
        logits.append(answer.float().cpu())
        labels.append(asked.cpu())
        losses.append(float(loss))
        weights.append(len(asked))
        if "task_ids" in batch:
            task_ids.append(batch["task_ids"].cpu())
    outputs, targets = torch.cat(logits), torch.cat(labels)
    if task.kind in ("causal_lm", "seq2seq"):
        outputs, targets = outputs[None], targets[None]
        if task.kind == "causal_lm":
            # One position more, so that label t + 1 belongs to output t as in a causal model's row.
            outputs, targets = (F.pad(t, p, value=-100) for t, p in ((outputs, (0, 0, 0, 1)), (targets, (1, 0))))
    metrics = task.evaluate(outputs, targets, torch.cat(task_ids) if task_ids else None)
    return {**metrics, "loss": sum(n * x for n, x in zip(weights, losses)) / sum(weights)}


def _answer(
    adapted: Tuned, task: Task, batch: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is compared, (n, classes) or (n, V), its labels (n,), and their mean loss: n rows or, for text, n tokens."""
    model, labels = adapted.model, batch["labels"]
    if task.kind == "classification" and adapted.method.fitted:
        logs = adapted.method.predict(batch).clamp_min(torch.finfo(torch.float32).tiny).log()
        return logs, labels, F.nll_loss(logs, labels)
    if task.kind == "multiple_choice":
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        choices = task.choice_logits(model(**inputs).logits, batch["attention_mask"], tokenizer)
        return choices, labels, F.cross_entropy(choices.float(), labels)
    output = model(**batch)
    if task.kind not in ("causal_lm", "seq2seq"):
        return output.logits, labels, output.loss
    logits = output.logits
    if task.kind == "causal_lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    asked = labels != -100
    return logits[asked], labels[asked], output.loss


def check_labels(task: Task, split: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
    if "labels" not in task.encode(tokenizer, split, max_length).column_names:
        raise DataError(f"task {task.name!r} has no labels in split {split!r}, so there is nothing to compare with")
