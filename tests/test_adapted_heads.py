"""Task heads of every kind: three steps of training, and a padded row answers as alone."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

import peftlib
from peftlib.errors import DataError, UnsupportedError
from peftlib.mechanisms import tasks
from peftlib.taxonomy import entry
from tests.methods.helpers import perturb

SHAPE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
LENGTHS = (9, 6, 9, 4)
IDS = torch.randint(5, 90, (4, 9), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(9) < torch.tensor(LENGTHS)[:, None]).long()
IDS[torch.arange(4), torch.tensor(LENGTHS) - 1] = 1  # T5 pools at </s>
RIGHT = {"input_ids": IDS * MASK, "attention_mask": MASK}
LEFT = {name: torch.stack([row.roll(9 - n) for row, n in zip(x, LENGTHS)]) for name, x in RIGHT.items()}
PAIRS = {name: x[:, None].expand(4, 2, 9).clone() for name, x in RIGHT.items()}
WORDS = IDS.masked_fill(MASK == 0, -100)
CLASSES = torch.tensor([0, 1, 0, 1])


def bert(kind, **options):
    special = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "mask_token_id": 4}
    return lambda: kind(BertConfig(**SHAPE, **special, **options))


def llama():
    return LlamaForSequenceClassification(LlamaConfig(**SHAPE, pad_token_id=0, num_key_value_heads=2, num_labels=2))


def t5():
    shape = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5ForSequenceClassification(T5Config(**shape, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0))


HEADS = {
    "regression": (bert(BertForSequenceClassification, num_labels=1), RIGHT, torch.tensor([0.1, 0.5, -1.0, 2.0])),
    "several labels": (
        bert(BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification"),
        RIGHT,
        torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0]]),
    ),
    "tokens": (bert(BertForTokenClassification, num_labels=97), RIGHT, WORDS),
    "multiple choice": (bert(BertForMultipleChoice), PAIRS, CLASSES),
    "masked words": (bert(BertForMaskedLM), RIGHT, WORDS),
    "decoder, padded on the left": (llama, LEFT, CLASSES),
    "encoder-decoder": (t5, RIGHT, CLASSES),
}
ALONE = [name for name in peftlib.methods() if not peftlib.find(name).source_methods]


@pytest.mark.parametrize("method", ALONE)
def test_every_head_trains_and_padding_changes_nothing(method):
    hosted = 0
    for name, (make, data, labels) in HEADS.items():
        torch.manual_seed(1)
        model = make()
        try:
            adapted = peftlib.attach(model, method, **entry(method).tiny)
        except UnsupportedError:
            continue
        hosted += 1
        if name == "masked words" and adapted.method.classifies:
            with adapted.lifecycle(1), pytest.raises(DataError, match=r"labels of shape \(4, 9\) for 4 texts"):
                model(**data, labels=labels)
            continue
        with tasks.unnamed_rows(0):
            adapted.calibrate([{**data, "labels": labels}])
            _train(adapted, {**data, "labels": labels})
            perturb(adapted, std=0.2)
            n, left = LENGTHS[3], 9 - LENGTHS[3] if data is LEFT else 0
            alone = {key: x[3:, ..., left : left + n] for key, x in data.items()}
            with torch.no_grad():
                together, by_itself = model.eval()(**data).logits[3:], model(**alone).logits
        if labels is WORDS:
            together = together[:, :n]
        torch.testing.assert_close(
            together, by_itself, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert hosted


def _train(adapted, batch):
    optimizer = torch.optim.SGD(adapted.trainable().values(), lr=0.01)
    adapted.model.train()
    with adapted.lifecycle(3) as life:
        for _ in range(3):
            life.step_start()
            loss = adapted.model(**batch).loss
            loss.backward()
            assert loss.isfinite()
            life.gradients()
            optimizer.step()
            optimizer.zero_grad()
            life.step_end()
