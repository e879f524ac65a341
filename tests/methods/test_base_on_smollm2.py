"""Methods made for decoders, on one: SmolLM2-135M learns four sentences with each and answers alike from a file."""

import copy

import pytest
import torch

import peftlib
from peftlib import backbones
from peftlib.conformance.case import train

VALUES = {"targets": "*attention.value", "quantize": "*attention.value"}
OPTIONS = {
    "qlora": {"rank": 8, **VALUES},
    "qa_lora": {"rank": 8, "targets": "*attention.value"},
    "loftq": {"rank": 8, "alpha": 8.0, "iterations": 1, **VALUES},
    "lora_prune": {"rank": 8},
    "laplace_lora": {"rank": 8, "samples": 20},
}
TEXTS = (
    "a warm, funny and moving film",
    "a dull and lifeless mess",
    "the best comedy of the year, and it knows it",
    "two hours that feel like four",
)


@pytest.fixture(scope="module")
def smollm2():
    return backbones.load("smollm2-135m")


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_it_learns_and_answers_the_same_from_a_file(name, smollm2, tmp_path):
    data = dict(smollm2.tokenizer(list(TEXTS), padding=True, return_tensors="pt"))
    adapted = peftlib.attach(copy.deepcopy(smollm2.model), name, keep_original=False, **OPTIONS[name])
    losses = train(adapted, data | {"labels": torch.tensor([1, 0, 1, 0])}, steps=8, rate=2e-3)
    assert losses[-1] < 0.5 * losses[0]
    folder = adapted.save(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted.model.eval()(**data).logits
        del adapted
        loaded = peftlib.load(copy.deepcopy(smollm2.model), folder)
        torch.testing.assert_close(loaded.model.eval()(**data).logits, expected, atol=1e-4, rtol=1e-4)
