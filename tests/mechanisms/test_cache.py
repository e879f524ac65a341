"""Generation with every cache gives what it gives without one, or is refused at once."""

import pytest
import torch
from transformers import DynamicCache

import peftlib
from peftlib.conformance.case import ENCODER_DECODERS, Case, logits
from peftlib.errors import PeftlibError
from tests.methods.helpers import perturb

METHODS = {
    "prompt_tuning": {"length": 5},
    "mpt": {"length": 5, "tasks": 1},
    "p_tuning": {},
    "prefix_tuning": {"length": 3},
    "mam_adapter": {},
    "unipelt": {},
    "propetl": {"form": "prefix"},
    "tiny_attention_adapter": {},
    "ladder_side_tuning": {},
    "attention_fusion": {},
    "loreft": {},
    "pasta": {"token_ids": (3, 4), "std": 1.0},
    "parallel_adapter": {},
    "lora": {},
}
"""Methods with keys, values, positions or a state of their own in a call, and LoRA."""
WAYS = {
    "dynamic": ({}, {}),
    "static": ({"cache_implementation": "static"}, {}),
    "beams": ({}, {"num_beams": 3, "num_return_sequences": 2}),
    "prompt_lookup": ({"prompt_lookup_num_tokens": 3}, {}),
    "chunks": ({"prefill_chunk_size": 4}, {}),
    "sampled": ({}, {"do_sample": True, "top_k": 5, "num_return_sequences": 2}),
}
"""How to generate: what concerns the cache, and how the text is searched."""


def texts(family, vocabulary):
    """A long row and a short one, padded on the left, or on the right before a decoder of its own."""
    ids = torch.randint(5, vocabulary, (2, 11), generator=torch.Generator().manual_seed(1))
    ids[0, 3], ids[1, 6] = 3, 4
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    if family in ENCODER_DECODERS:
        mask = mask.flip(1)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def head(family):
    return "seq2seq" if family in ENCODER_DECODERS else "causal_lm"


def generated(model, given, **settings):
    torch.manual_seed(0)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0} | settings
    return model.generate(**given, **settings).tolist()


# A prompt is no part of the mask that is ready-made for a static cache, and a layer more fits none of fixed size.
FIXED = {"prompt_tuning", "mpt", "p_tuning", "loreft", "tiny_attention_adapter", "ladder_side_tuning"}
CHUNKED = {"p_tuning", "loreft"}


def refused(method, family, way):
    """Whether this way of generating is refused."""
    if way == "static":
        beside_text = method in ("tiny_attention_adapter", "ladder_side_tuning")
        return method in FIXED and (beside_text or family not in ENCODER_DECODERS)
    return way == "chunks" and (method in CHUNKED or (family == "mistral" and method in ("prompt_tuning", "mpt")))


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "t5", "bart"])
@pytest.mark.parametrize("method", METHODS)
def test_every_cache_gives_the_text_that_none_gives_or_is_refused(method, family):
    case = Case(method, family, head(family), options=METHODS[method])
    model = case.backbone()
    if family == "mistral":
        model.config.sliding_window = 6
    adapted = peftlib.attach(model, case.config)
    if adapted.method.calibrates:
        adapted.calibrate([case.batch()])
    perturb(adapted, std=0.2)
    model.eval()
    given, without = texts(family, model.config.vocab_size), {}
    for way, (options, searched) in WAYS.items():
        if way == "chunks" and family in ENCODER_DECODERS:
            continue  # transformers cuts the decoder's text alone, with or without a method
        rows = {k: v[:1] for k, v in given.items()} if way == "prompt_lookup" else given
        if refused(method, family, way):
            with pytest.raises(PeftlibError, match=r"cache|mask|generate"):
                generated(model, rows, **options)
            continue
        key = (way == "prompt_lookup", *searched)
        if key not in without:
            without[key] = generated(model, rows, use_cache=False, **searched)
        assert generated(model, rows, **options, **searched) == without[key], way


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning", "pasta", "tiny_attention_adapter"])
def test_a_loop_of_one_s_own_goes_on_with_a_cache_as_without(method):
    """Two turns of several tokens; vectors around the text count what comes behind a cache as its answer."""
    case = Case(method, "llama", "causal_lm", options=METHODS[method])
    adapted = case.attach()
    perturb(adapted, std=0.2)
    model = adapted.model.eval()
    given = texts("llama", model.config.vocab_size)
    ids, mask = given["input_ids"], given["attention_mask"]
    labels = torch.where(torch.arange(11) >= 6, ids, -100) * mask - 100 * (1 - mask)
    whole = logits(model, **given, labels=labels if method == "p_tuning" else None)
    with torch.no_grad():
        first = model(ids[:, :6], attention_mask=mask[:, :6])
        rest = model(ids[:, 6:], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, whole[:, 6:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "mpt", "loreft"])
def test_a_second_turn_is_right_or_refused(method):
    case = Case(method, "llama", "causal_lm", options=METHODS[method])
    adapted = peftlib.attach(case.backbone(), case.config)
    perturb(adapted, std=0.2)
    model = adapted.model.eval()
    ids, cache = texts("llama", model.config.vocab_size)["input_ids"][:1], DynamicCache(config=model.config)
    one = {"input_ids": ids[:, :6], "attention_mask": torch.ones_like(ids[:, :6])}
    answer = torch.tensor(generated(model, one, past_key_values=cache))
    chat = torch.cat([answer, ids], dim=1)
    with pytest.raises(PeftlibError, match="without past_key_values"):
        generated(model, {"input_ids": chat, "attention_mask": torch.ones_like(chat)}, past_key_values=cache)
