"""A task: labelled text in splits, its batches for a tokenizer, and its metrics."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from peftlib.errors import DataError, UnknownNameError, UnsupportedError
from peftlib.tasks import metrics
from peftlib.tasks.text import fraction

KINDS = ("classification", "regression", "causal_lm", "seq2seq", "multiple_choice")
_IGNORED = -100  # transformers' losses skip this label


@dataclass(frozen=True)
class Task:
    """Rows with the columns ``text``, optionally ``text_pair``, and ``label``, in named splits.

    ``label`` is a class number (classification, multiple choice), a number (regression) or a text (causal_lm: what
    follows ``text``; seq2seq: the target). A split without ``label`` can be predicted but not trained on.
    """

    name: str
    kind: str
    splits: Mapping[str, Dataset]
    source: str
    """"embedded", "folder", "hub", "generated" or "custom"."""
    metrics: tuple[str, ...]
    """The main metric first."""
    label_names: tuple[str, ...] = ()
    max_length: int = 128
    """Tokens per row where no other limit is given; the tokenizer's own limit holds too."""
    members: tuple[str, ...] = ()
    """The tasks of a mixture, in the order of their ``task_ids``."""
    _encoded: dict = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UnknownNameError("kind of task", self.kind, KINDS)
        for split, rows in self.splits.items():
            if "text" not in rows.column_names:
                raise DataError(
                    f"task {self.name!r} has no column 'text' in split {split!r}; "
                    f"it has: {', '.join(rows.column_names)}. Rename one of them."
                )

    @property
    def num_labels(self) -> int:
        """Outputs that a classification head needs: the classes, or 1 for regression. 0 for text to text."""
        return 1 if self.kind == "regression" else len(self.label_names)

    @property
    def main_metric(self) -> str:
        return self.metrics[0]

    @property
    def greater_is_better(self) -> bool:
        """Of the main metric."""
        return self.main_metric not in metrics.LOWER_IS_BETTER

    @property
    def text_columns(self) -> tuple[str, ...]:
        rows = next(iter(self.splits.values()))
        return ("text", "text_pair") if "text_pair" in rows.column_names else ("text",)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of every row of every split, in order."""
        digest = hashlib.sha256()
        for split in sorted(self.splits):
            rows = self.splits[split]
            columns = sorted(rows.column_names)
            digest.update(json.dumps([split, columns, len(rows)]).encode())
            for values in zip(*(rows[column] for column in columns)):
                digest.update(json.dumps(values, ensure_ascii=False).encode())
        return digest.hexdigest()

    def limited(self, limit: int | Mapping[str, int]) -> Task:
        """The task with at most ``limit`` rows in each split (or in the splits that ``limit`` names)."""
        caps = limit if isinstance(limit, Mapping) else dict.fromkeys(self.splits, limit)
        for split in caps:
            self._rows(split)
        cut = {s: rows.select(range(min(len(rows), caps.get(s, len(rows))))) for s, rows in self.splits.items()}
        return self._with(splits=cut)

    def few_shot(
        self,
        n_train: int = 256,
        n_validation: int | None = None,
        n_test: int | None = None,
        *,
        seed: int = 0,
    ) -> Task:
        """A small training set, balanced over classes, and a disjoint validation set, both drawn from "train".

        Rows are drawn by a hash of seed and text, so a seed means the same rows everywhere. ``n_validation`` defaults
        to ``n_train``. The test split stays, cut to ``n_test`` rows where that is given.
        """
        n_validation = n_train if n_validation is None else n_validation
        rows = self._labelled("train")
        texts = zip(*(rows[column] for column in self.text_columns))
        labels = list(rows["label"])
        order = sorted(range(len(rows)), key=[fraction(json.dumps(t), f"few-shot {seed}") for t in texts].__getitem__)
        chosen, rest = self._draw(order, labels, n_train, "n_train")
        held_out, _ = self._draw(rest, labels, n_validation, "n_validation")
        splits = dict(self.splits) | {"train": rows.select(chosen), "validation": rows.select(held_out)}
        if n_test is not None and "test" in splits:
            splits["test"] = splits["test"].select(range(min(n_test, len(splits["test"]))))
        return self._with(name=f"{self.name}-fewshot", splits=splits)

    def _draw(self, order: Sequence[int], labels: Sequence, n: int, what: str) -> tuple[list[int], list[int]]:
        """The first n of ``order`` with equally many of each class, and the others."""
        if self.kind != "classification":
            if len(order) < n:
                raise DataError(f"{what}={n} rows cannot be drawn from {len(order)} training rows of {self.name!r}")
            return list(order[:n]), list(order[n:])
        share = {c: n // self.num_labels + (c < n % self.num_labels) for c in range(self.num_labels)}
        chosen, rest = [], []
        for index in order:
            label = labels[index]
            if share[label] > 0:
                share[label] -= 1
                chosen.append(index)
            else:
                rest.append(index)
        if short := {self.label_names[c]: k for c, k in share.items() if k}:
            raise DataError(
                f"{what}={n} balanced rows cannot be drawn from {len(order)} training rows of {self.name!r}: "
                f"too few of the classes {short}"
            )
        return chosen, rest

    def encode(self, tokenizer: PreTrainedTokenizerBase, split: str, max_length: int | None = None) -> Dataset:
        """The split as token ids: the tokenizer's inputs, ``labels`` where there are any, ``task_ids`` in a mixture.

        Nothing is padded yet. Labels of a causal_lm task are the ids of prompt and answer with the prompt masked by
        -100; those of a seq2seq task are the target's ids.
        """
        limit = min(self.max_length if max_length is None else max_length, tokenizer.model_max_length)
        key = (id(tokenizer), len(tokenizer), split, limit)
        if key not in self._encoded:
            rows = self._rows(split)
            if not len(rows):
                raise DataError(f"task {self.name!r} has no rows in split {split!r}")
            # The tokenizer is kept beside its rows so that its id cannot come to mean another one.
            self._encoded[key] = tokenizer, Dataset.from_dict(self._columns(tokenizer, rows, limit))
        return self._encoded[key][1]

    def _columns(self, tokenizer, rows: Dataset, limit: int) -> dict[str, list]:
        texts = list(rows["text"])
        pairs = list(rows["text_pair"]) if "text_pair" in rows.column_names else None
        labels = list(rows["label"]) if "label" in rows.column_names else None
        if self.kind == "causal_lm":
            columns = _causal(tokenizer, texts, labels, limit)
        elif self.kind == "multiple_choice":
            columns = _keep_end(tokenizer, texts, limit)
        else:
            columns = _tokenize(tokenizer, texts, pairs, limit)
        if labels is not None and self.kind == "seq2seq":
            columns["labels"] = tokenizer(text_target=labels, truncation=True, max_length=limit)["input_ids"]
        elif labels is not None and self.kind != "causal_lm":
            number = float if self.kind == "regression" else int
            columns["labels"] = [number(label) for label in labels]
        if "task_id" in rows.column_names:
            columns["task_ids"] = list(rows["task_id"])
        return columns

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
    ) -> DataLoader:
        """Batches of torch tensors, each padded to its longest row: model inputs, ``labels``, maybe ``task_ids``.

        ``group_by_length``: rows of a batch are of similar length, so less of it is padding; with ``shuffle`` the order
        stays random, without it the longest rows come first.

        Raises DataError where the split is missing, or is "train" and has no labels.
        """
        if split == "train":
            self._labelled(split)
        rows = self.encode(tokenizer, split, max_length)
        generator = torch.Generator()
        generator.manual_seed(seed)
        grouped = None
        if group_by_length:
            lengths = [len(ids) for ids in rows["input_ids"]]
            longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
            grouped = LengthGrouped(lengths, batch_size, generator) if shuffle else longest_first
        return DataLoader(
            rows,
            batch_size=batch_size,
            shuffle=shuffle and grouped is None,
            sampler=grouped,
            generator=generator,
            collate_fn=partial(_collate, DataCollatorWithPadding(tokenizer), causal=self.kind == "causal_lm"),
        )

    def evaluate(self, outputs, labels, task_ids=None) -> dict[str, float]:
        """Metrics of a split's outputs.

        outputs: logits (N, classes), predicted classes (N,), predicted numbers (N,) or (N, 1); for causal_lm and
            seq2seq token logits (N, T, V) with labels (N, T), or generated texts with reference texts.
        task_ids: of a mixture's rows; adds each member's metrics as "member/metric" and the mean of their main ones.
        """
        if self.kind in ("causal_lm", "seq2seq"):
            if len(outputs) and isinstance(outputs[0], str):
                return metrics.generated(outputs, labels)
            return metrics.tokens(_array(outputs), _array(labels), shifted=self.kind == "causal_lm")
        outputs, labels = _array(outputs), _array(labels)
        if len(outputs) != len(labels):
            raise DataError(f"task {self.name!r}: {len(outputs)} outputs for {len(labels)} labels")
        compute = metrics.regression if self.kind == "regression" else metrics.classification
        result = compute(outputs, labels, self.metrics)
        if task_ids is not None and self.members:
            main = []
            for number, member in enumerate(self.members):
                of_member = _array(task_ids) == number
                if of_member.any():
                    scores = compute(outputs[of_member], labels[of_member], self.metrics)
                    result |= {f"{member}/{metric}": value for metric, value in scores.items()}
                    main.append(scores[self.main_metric])
            result["mean"] = float(np.mean(main))
        return result

    def choice_logits(self, logits, attention_mask, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
        """(N, choices) of a causal model's logits (N, T, V): those of the answer names after each row's last token."""
        if self.kind != "multiple_choice":
            raise UnsupportedError(f"task {self.name!r} is of kind {self.kind!r}: only multiple_choice has choices")
        # With the space before it an answer is another token in most vocabularies, and a space follows the colon.
        ids = [tokenizer(f" {name}", add_special_tokens=False)["input_ids"][-1] for name in self.label_names]
        positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        last = (attention_mask * positions).argmax(dim=1)
        return logits[torch.arange(len(logits), device=logits.device), last][:, ids]

    def _rows(self, split: str) -> Dataset:
        if split not in self.splits:
            raise UnknownNameError(f"split of task {self.name!r}", split, self.splits)
        return self.splits[split]

    def _labelled(self, split: str) -> Dataset:
        rows = self._rows(split)
        if "label" not in rows.column_names:
            raise DataError(
                f"task {self.name!r} has no column 'label' in split {split!r}, so it cannot be trained on; "
                f"it has: {', '.join(rows.column_names)}."
            )
        return rows

    def _with(self, **changes) -> Task:
        return dataclasses.replace(self, _encoded={}, **changes)


class LengthGrouped(Sampler[int]):
    """A random order of rows in which each ``batch_size`` that follow one another are of similar length: sorted inside
    random stretches of ``WINDOW`` batches, the batches then shuffled. Another order at every pass."""

    WINDOW = 8

    def __init__(self, lengths: Sequence[int], batch_size: int, generator: torch.Generator):
        self.lengths = torch.tensor(lengths)
        self.batch_size = batch_size
        self.generator = generator

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        order = torch.randperm(len(self.lengths), generator=self.generator)
        stretches = order.split(self.WINDOW * self.batch_size)
        order = torch.cat([part[self.lengths[part].argsort(stable=True)] for part in stretches])
        whole = len(order) // self.batch_size
        batches = order[: whole * self.batch_size].view(whole, self.batch_size)
        shuffled = batches[torch.randperm(whole, generator=self.generator)].flatten()
        # The incomplete batch is the last one, as without groups.
        yield from torch.cat([shuffled, order[whole * self.batch_size :]]).tolist()


def _array(values) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def _tokenize(tokenizer, texts: list[str], pairs: list[str | None] | None, limit: int) -> dict[str, list]:
    """Single texts and pairs, which a mixture may hold side by side."""
    if pairs is None or all(pair is None for pair in pairs):
        return dict(tokenizer(texts, truncation=True, max_length=limit))
    if tokenizer.num_special_tokens_to_add(pair=True) == tokenizer.num_special_tokens_to_add(pair=False):
        # This tokenizer puts nothing between the texts of a pair: a line break shows where the second one begins.
        joined = [text if pair is None else f"{text}\n{pair}" for text, pair in zip(texts, pairs)]
        return dict(tokenizer(joined, truncation=True, max_length=limit))
    single = [i for i, pair in enumerate(pairs) if pair is None]
    double = [i for i, pair in enumerate(pairs) if pair is not None]
    encoded = tokenizer([texts[i] for i in double], [pairs[i] for i in double], truncation=True, max_length=limit)
    columns = {name: [None] * len(texts) for name in encoded}
    groups = [(double, encoded)]
    if single:
        groups.append((single, tokenizer([texts[i] for i in single], truncation=True, max_length=limit)))
    for indices, part in groups:
        for name, values in part.items():
            for index, value in zip(indices, values):
                columns[name][index] = value
    return columns


def _causal(tokenizer, prompts: list[str], answers: list[str] | None, limit: int) -> dict[str, list]:
    """Prompt and answer in one row. A row that is too long loses prompt first: at least half stays for the answer."""
    starts = tokenizer(prompts, truncation=True, max_length=limit)["input_ids"]
    if answers is None:
        return {"input_ids": starts, "attention_mask": [[1] * len(ids) for ids in starts]}
    ends = tokenizer(answers, add_special_tokens=False)["input_ids"]
    columns = {"input_ids": [], "attention_mask": [], "labels": []}
    for start, end in zip(starts, ends):
        end = [*end, tokenizer.eos_token_id][: max(limit - len(start), limit // 2)]
        start = start[: limit - len(end)]
        columns["input_ids"].append(start + end)
        columns["attention_mask"].append([1] * len(start + end))
        columns["labels"].append([_IGNORED] * len(start) + end)
    return columns


def _keep_end(tokenizer, texts: list[str], limit: int) -> dict[str, list]:
    """A long prompt loses its beginning: the question that is asked stands at its end."""
    side, tokenizer.truncation_side = tokenizer.truncation_side, "left"
    try:
        return dict(tokenizer(texts, truncation=True, max_length=limit))
    finally:
        tokenizer.truncation_side = side


def _collate(pad: DataCollatorWithPadding, rows: list[dict], *, causal: bool) -> dict[str, torch.Tensor]:
    """One padded batch. A causal model's labels lie beside its inputs and so are padded on the same side."""
    inputs = [{k: v for k, v in row.items() if k not in ("labels", "task_ids")} for row in rows]
    batch = dict(pad(inputs))
    if "labels" in rows[0]:
        labels = [row["labels"] for row in rows]
        if isinstance(labels[0], list):
            width = max(len(row) for row in labels)
            left = causal and pad.tokenizer.padding_side == "left"
            gaps = [[_IGNORED] * (width - len(row)) for row in labels]
            labels = [gap + row if left else row + gap for row, gap in zip(labels, gaps)]
        batch["labels"] = torch.tensor(labels)
    if "task_ids" in rows[0]:
        batch["task_ids"] = torch.tensor([row["task_ids"] for row in rows])
    return batch
