"""Positions of texts that are padded on the left, beside trained keys and vectors."""

import pytest
import torch

import peftlib
from peftlib.conformance.case import Case, backbone
from peftlib.mechanisms import tasks
from tests.methods.helpers import perturb

METHODS = [
    "prompt_tuning",
    "p_tuning",
    "mpt",
    "prefix_tuning",
    "mam_adapter",
    "u_mam",
    "unipelt",
    "autopeft",
    "s4",
    "lora",
]
LONG, SHORT = torch.arange(3, 12)[None], torch.arange(20, 25)[None]
ROWS = torch.cat([LONG, torch.cat([torch.zeros(1, 4, dtype=torch.long), SHORT], 1)])
MASK = (ROWS > 0).long()


def attached(method, head):
    model = Case(method, "llama", head).attach(backbone("llama", head)).model
    perturb(model.peftlib_adapted)
    return model.eval()


@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_a_left_padded_batch_is_answered_as_alone(method):
    classes, words = (attached(method, head) for head in ("classification", "causal_lm"))
    with tasks.unnamed_rows(0), torch.no_grad():
        expected = torch.cat([classes(LONG).logits, classes(SHORT).logits])
        found = classes(ROWS, attention_mask=MASK).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        expected = words(SHORT).logits
        torch.testing.assert_close(words(ROWS, attention_mask=MASK).logits[1:, 4:], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_a_later_part_of_a_left_padded_batch_goes_on_where_the_first_ended(method):
    model = attached(method, "causal_lm")
    with torch.no_grad():
        whole = model(ROWS, attention_mask=MASK).logits
        first = model(ROWS[:, :6], attention_mask=MASK[:, :6], use_cache=True)
        rest = model(ROWS[:, 6:], attention_mask=MASK, past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 6:], atol=1e-5, rtol=1e-5)


def test_positions_that_are_given_and_rows_without_padding_stay():
    adapted = peftlib.attach(backbone("llama", "causal_lm"), "prefix_tuning", length=3)
    perturb(adapted)
    model, at = adapted.model.eval(), torch.arange(9)[None]
    with torch.no_grad():
        plain = model(LONG).logits
        assert torch.equal(model(LONG, attention_mask=torch.ones_like(LONG)).logits, plain)
        moved = model(LONG, attention_mask=torch.ones_like(LONG), position_ids=at + 5).logits
    assert not torch.allclose(moved, plain, atol=1e-4)
