"""The survey's trained-parameter counts, from published shapes on the meta device."""

from __future__ import annotations

import psutil
import pytest

import peftlib
from peftlib import backbones

# Backbone, its head, method, options; trained parameters, new task head included; parameters of the whole model.
TABLE = [
    ("roberta-base", "classification", "full", {}, 124_647_170, 124_647_170),
    ("roberta-base", "classification", "lora", {"rank": 8}, 887_042, 124_647_170),
    (
        "roberta-base",
        "classification",
        "adalora",
        {"rank": 12, "targets": ("attention.query", "attention.value")},
        1_034_786,
        124_647_170,
    ),
    (
        "roberta-base",
        "classification",
        "ia3",
        {"outputs": ("attention.key", "attention.value"), "inputs": ("attention.output", "ffn.down")},
        656_642,
        124_647_170,
    ),
    ("roberta-base", "classification", "prompt_tuning", {"length": 20}, 607_490, 124_647_170),
    ("roberta-base", "classification", "prefix_tuning", {"length": 20, "reparametrize": False}, 960_770, 124_647_170),
    ("roberta-base", "classification", "bitfit", {}, 694_274, 124_647_170),
    ("t5-base", "seq2seq", "lora", {"rank": 8}, 884_736, 222_903_552),
    ("llama-7b", "causal_lm", "lora", {"rank": 64, "targets": "all-linear"}, 159_907_840, 6_738_415_616),
    ("llama-13b", "causal_lm", "lora", {"rank": 64, "targets": "all-linear"}, 250_347_520, 13_015_864_320),
    ("llama-7b", "causal_lm", "qlora", {"rank": 64, "targets": "all-linear"}, 159_907_840, 6_738_415_616),
    ("llama-13b", "causal_lm", "qlora", {"rank": 64, "targets": "all-linear"}, 250_347_520, 13_015_864_320),
]


@pytest.mark.parametrize(
    ("backbone", "head", "method", "options", "trained", "total"), TABLE, ids=[f"{row[0]}-{row[2]}" for row in TABLE]
)
def test_trained_parameters(backbone, head, method, options, trained, total):
    count = peftlib.attach(backbones.shapes(backbone, head=head), method, **options).count()
    assert (count.trained, count.total) == (trained, total)
    assert count.head == (592_130 if backbone == "roberta-base" else 0)


def test_percentage_as_the_survey_prints_it():
    count = peftlib.attach(backbones.shapes("t5-base", head="seq2seq"), "lora", rank=8).count()
    assert f"{count.percent:.3f}" == "0.397"


# What the survey does not print; from the settings of the methods' own papers.
MASKS = [
    # 0.5 % of all parameters, of which the head takes 592,130.
    ("fish_mask", {}, int(0.005 * 124_647_170)),
    # Embeddings and head, and 30 % of the layers.
    ("child_tuning_d", {}, 124_647_170 - 85_054_464 + int(0.3 * 85_054_464)),
    ("child_tuning_d", {"train_rest": False}, 592_130 + int(0.3 * 85_054_464)),
    ("threshold_mask", {}, 592_130 + 84_934_656),
]


@pytest.mark.parametrize(("method", "options", "trained"), MASKS)
def test_masks_on_roberta_base(method, options, trained):
    count = peftlib.attach(backbones.shapes("roberta-base"), method, **options).count()
    assert count.trained == trained
    if method == "threshold_mask":
        assert count.stored_bytes == 84_934_656 // 8 + 4 * 592_130


def test_the_meta_device_takes_no_memory():
    process = psutil.Process()
    before = process.memory_info().rss
    adapted = peftlib.attach(backbones.shapes("llama-13b", head="causal_lm"), "lora", rank=64, targets="all-linear")
    assert adapted.count().trained == 250_347_520
    assert process.memory_info().rss - before < 200 * 2**20
