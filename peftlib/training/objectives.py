"""What a backbone learns from unlabelled text: the objectives of pre-training, and the one that needs no head.

=======  ===========================================================================================================
masked   15 % of the tokens are to be found again: 80 % of them are [MASK], 10 % random, 10 % as they were (BERT)
spans    15 % of the tokens, in spans of three on average, are replaced by a sentinel each; the decoder gives the
         sentinels with what they stand for (T5)
states   every layer's output is to be that of the backbone as it was: the squared error relative to the outputs'
         variance, over real tokens, the mean over layers, and as much again over first tokens, which heads read. For
         encoders that come without the head they were trained with
=======  ===========================================================================================================

Shapes: b rows, t tokens, d hidden size, L layers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from transformers import DataCollatorForLanguageModeling

from peftlib.errors import UnknownNameError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RATE, SPAN = 0.15, 3
"""The share of tokens that are corrupted, and the mean length of a span (Devlin et al. 2019, Raffel et al. 2020)."""


class Objective:
    """Made before a method is attached to ``model``, which is then trained on :meth:`loss`.

    ``head`` is the head that the model needs, ``dropout`` whether it trains with its dropout.
    """

    head: ClassVar[str]
    dropout: ClassVar[bool] = True

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer

    def loss(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """The loss on rows of token ids, special tokens included."""
        raise NotImplementedError

    def padded(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``attention_mask`` (b, t) on the model's device."""
        batch = self.tokenizer.pad({"input_ids": [list(row) for row in rows]}, return_tensors="pt")
        return {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}


class Masked(Objective):
    head = "masked_lm"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__(model, tokenizer)
        self.collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=RATE)

    def loss(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        batch = self.collate([{"input_ids": list(row)} for row in rows])
        return self.model(**batch.to(self.model.device)).loss


class Spans(Objective):
    head = "seq2seq"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__(model, tokenizer)
        names = [f"<extra_id_{number}>" for number in range(100)]
        ids = cast("list[int]", tokenizer.convert_tokens_to_ids(names))
        self.sentinels = [i for i in ids if i not in (None, tokenizer.unk_token_id)]
        if not self.sentinels:
            raise UnsupportedError(
                f"the tokenizer of this {type(model).__name__} has no <extra_id_0> and so on, which stand for "
                "corrupted spans; train an encoder on its states instead"
            )

    def loss(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        pairs = [corrupt(row[:-1], self.sentinels) for row in rows]  # without </s>
        batch = self.padded([[*source, row[-1]] for (source, _), row in zip(pairs, rows)])
        targets = self.padded([[*target, row[-1]] for (_, target), row in zip(pairs, rows)])
        labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, -100)  # (b, t)
        return self.model(**batch, labels=labels).loss


class States(Objective):
    head = "base"
    dropout = False

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__(model, tokenizer)
        if model.config.is_encoder_decoder:
            raise UnsupportedError(f"states are those of an encoder alone; {type(model).__name__} has a decoder too")
        self.teacher = copy.deepcopy(model).requires_grad_(False).eval()

    def loss(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        batch = self.padded(rows)
        real = batch["attention_mask"].bool()  # (b, t)
        with torch.no_grad():
            theirs = self.teacher(**batch, output_hidden_states=True).hidden_states[1:]  # L of (b, t, d)
        mine = self.model(**batch, output_hidden_states=True).hidden_states[1:]  # L of (b, t, d)
        every = [relative(h[real], wanted[real]) for h, wanted in zip(mine, theirs)]  # L of (tokens, d) and (tokens, d)
        place = torch.arange(len(real), device=real.device), real.int().argmax(1)  # (b) and (b)
        # Over all layers at once: in the first ones such a token's state has next to no variance.
        first = relative(*(torch.stack([h[place] for h in states], 1) for states in (mine, theirs)))  # (b, L, d) twice
        return (sum(every[1:], every[0]) / len(every) + first) / 2


OBJECTIVES: dict[str, type[Objective]] = {"masked": Masked, "spans": Spans, "states": States}


def find(name: str) -> type[Objective]:
    """An objective by name. Raises UnknownNameError for another."""
    if name not in OBJECTIVES:
        raise UnknownNameError("objective", name, OBJECTIVES)
    return OBJECTIVES[name]


def corrupt(ids: Sequence[int], sentinels: Sequence[int]) -> tuple[list[int], list[int]]:
    """What is left of a text's tokens with a sentinel for each dropped span, and the spans, each behind its sentinel,
    with one more sentinel at the end.

    T5's way: the number of dropped tokens and of spans is fixed by the length, their lengths and places are drawn.
    """
    n = len(ids)
    dropped = min(max(round(n * RATE), 1), max(n - 1, 1))
    spans = min(max(round(dropped / SPAN), 1), len(sentinels) - 1, max(n - dropped, 1))
    noise, rest = _parts(dropped, spans), _parts(n - dropped, spans)
    source: list[int] = []
    target: list[int] = []
    at = 0
    for sentinel, keep, drop in zip(sentinels, rest, noise):
        source += [*ids[at : at + keep], sentinel]
        target += [sentinel, *ids[at + keep : at + keep + drop]]
        at += keep + drop
    return source + list(ids[at:]), [*target, sentinels[spans]]


def _parts(total: int, parts: int) -> list[int]:
    """``total`` in so many whole numbers, all above 0 where that is possible, each way with the same probability."""
    if total < parts:
        return [1] * total + [0] * (parts - total)
    cuts = sorted((torch.randperm(total - 1)[: parts - 1] + 1).tolist())
    return [b - a for a, b in zip([0, *cuts], [*cuts, total])]


def relative(h: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The squared error of h (rows, ...) in units of the variance of the wanted states (rows, ...) over rows."""
    h, wanted = h.float(), wanted.float()
    return (h - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum().clamp(min=1e-6)
