"""Defaults that do not suit a backbone fit themselves to it and say so; what a user chose is refused as it was."""

import warnings

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import peftlib
from peftlib import anatomy
from peftlib.errors import ConfigError, PeftlibError, TargetError
from tests.methods.helpers import perturb

METHODS = peftlib.methods()
IDS = torch.arange(3, 27).view(2, 12)


def narrow(heads=16, layers=1):
    """Multi-query attention: one key head of 64 / heads numbers."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, num_attention_heads=heads, num_key_value_heads=1, **shape))


def opt_350m():
    shape = {"hidden_size": 64, "word_embed_proj_dim": 32, "ffn_dim": 128, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "max_position_embeddings": 256, "pad_token_id": 1}
    return OPTForCausalLM(OPTConfig(vocab_size=97, do_layer_norm_before=False, **shape))


def bart():
    shape = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(BartConfig(vocab_size=97, max_position_embeddings=256, **heads, **shape))


def answers():
    ids = {"cls_token_id": 1, "sep_token_id": 2, "mask_token_id": 3}
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    return BertForQuestionAnswering(BertConfig(vocab_size=97, **shape, **ids))


SPAN = {"start_positions": torch.tensor([2, 3]), "end_positions": torch.tensor([4, 8])}
SHAPES = {
    "multi-query": (narrow, {"labels": IDS}),
    "opt-350m": (opt_350m, {"labels": IDS}),
    "bart": (bart, {"labels": IDS}),
    "answers": (answers, SPAN),
}


ACTING = (
    *("prefix_tuning", "mam_adapter", "unipelt", "propetl", "tiny_attention_adapter", "kernel_mix", "lora_prune"),
    *("ladder_side_tuning", "prompt_tuning", "p_tuning", "mpt", "loreft", "attention_fusion", "parallel_adapter"),
    *("sequential_adapter", "mera", "adamix", "hadamard_adapter", "lora"),
)
"""Methods that know heads, widths, positions, the stream or the logits, and LoRA."""
CASES = [(method, "multi-query") for method in METHODS] + [(m, s) for m in ACTING for s in SHAPES if s != "multi-query"]
BUILDS_ON_OTHERS = {"adapter_fusion", "mera", "adapter_soup", "spot", "attempt", "lorahub"}
NOT_THERE = {
    "multi-query": {"coda", "warp", "pasta", "bitfit", "u_bitfit", "s_bitfit", "s4", "head"},
    "one layer": {"attention_fusion", "lora_prune"},
    "narrow": {"moelora"},
}
"""Refused for what they need: an encoder, special tokens, biases, a larger budget, a head; a second layer; a rank that
its experts can share."""


@pytest.mark.parametrize(("method", "shape"), CASES)
def test_every_method_trains_an_odd_shape_by_its_defaults_or_says_why_not(method, shape):
    make, labels = SHAPES[shape]
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)} | labels
    refused = BUILDS_ON_OTHERS | set().union(*NOT_THERE.values()) if shape == "multi-query" else BUILDS_ON_OTHERS
    if shape == "answers":
        refused = refused | NOT_THERE["one layer"]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method in refused:
            with pytest.raises(PeftlibError):
                peftlib.attach(make(), method)
            return
        adapted = peftlib.attach(make(), method)
    adapted.calibrate([batch])
    adapted.model.train()
    with adapted.lifecycle(1) as life:
        life.step_start()
        adapted.model(**batch).loss.backward()
        life.gradients()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.trainable().values())


def test_a_default_becomes_the_largest_that_fits_and_keeps_the_scale():
    with pytest.warns(UserWarning, match=r"qlora do not suit .*k_proj \(4 x 64\): rank=64 becomes 4, alpha=16.0"):
        adapted = peftlib.attach(narrow(), "qlora")
    assert (adapted.config.rank, adapted.config.alpha) == (4, 1.0), "alpha / r stays"
    with pytest.raises(TargetError, match="rank 63 does not fit"):
        peftlib.attach(narrow(), "qlora", rank=63)
    with pytest.warns(UserWarning, match="factor=32 becomes 4"):
        assert peftlib.attach(narrow(), "krona").config.factor == 4
    with pytest.raises(TargetError, match="factor=8 does not divide"):
        peftlib.attach(narrow(), "krona", factor=8)
    with pytest.raises(ConfigError, match="not a multiple of experts"):
        peftlib.attach(narrow(), "moelora", rank=4)


def test_what_was_fitted_is_saved_and_loaded_without_a_word(tmp_path):
    model = narrow(layers=2)
    with pytest.warns(UserWarning, match="rank=32 becomes 4"):
        adapted = peftlib.attach(model, "dora")
    perturb(adapted)
    want = adapted.model.eval()(IDS).logits
    folder = adapted.save(tmp_path / "a")
    adapted.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = peftlib.load(model, folder)
    torch.testing.assert_close(loaded.model(IDS).logits, want)


def test_heads_norms_and_ends_are_those_of_each_stack():
    parts = anatomy.of(bart())
    assert {parts.head_size(layer.attention) for layer in parts.layers if layer.stack == "encoder"} == {8}
    assert {parts.head_size(layer.cross_attention) for layer in parts.layers if layer.stack == "decoder"} == {16}
    parts = anatomy.of(opt_350m())
    assert not any(layer.pre_norm for layer in parts.layers)
    assert parts.end("decoder") is parts.layers[-1].module
    plain = anatomy.of(OPTForCausalLM(OPTConfig(vocab_size=97, hidden_size=48, ffn_dim=64, num_hidden_layers=1)))
    assert all(layer.pre_norm for layer in plain.layers) and plain.end("decoder") is plain.final_norm("decoder")
