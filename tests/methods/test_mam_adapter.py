"""The MAM adapter is prefix tuning and a parallel adapter at once, and nothing else."""

import pytest
import torch

import peftlib
from peftlib.errors import MergeError
from peftlib.methods.base import ConfigError
from tests.methods.helpers import backbone, inputs, perturb

SMALL = {"length": 6, "hidden": 9, "bottleneck": 5}


@torch.no_grad()
def logits(model, family):
    given = inputs(family)
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = given["input_ids"]
    return model.eval()(**given).logits


@pytest.mark.parametrize(("family", "head"), [("bert", "classification"), ("llama", "causal_lm"), ("t5", "seq2seq")])
def test_it_computes_what_its_two_parts_compute_together(family, head):
    mam = peftlib.attach(backbone(family, head), "mam_adapter", train_head=False, **SMALL)
    prefix = peftlib.PrefixTuningConfig(length=6, hidden=9, shift_positions=False)
    adapter = peftlib.ParallelAdapterConfig(bottleneck=5, scale=4.0)
    both = peftlib.attach(backbone(family, head), peftlib.combine(prefix, adapter), train_head=False)
    alone = [peftlib.attach(backbone(family, head), part) for part in (prefix, adapter)]
    perturb(mam)
    both.method.load_state(mam.method.state())
    assert torch.allclose(logits(mam.model, family), logits(both.model, family), atol=1e-6)
    assert mam.count().method == sum(part.count().method for part in alone)
    assert mam.count().stored == sum(part.count().stored - part.count().head for part in alone)


def test_a_saved_one_holds_keys_values_and_adapters(tmp_path):
    mam = peftlib.attach(backbone("bert"), "mam_adapter", **SMALL)
    perturb(mam)
    before = logits(mam.model, "bert")
    assert mam.count().stored - mam.count().head == 2 * (2 * 6 * 32) + 2 * (2 * 32 * 5 + 5 + 32)
    loaded = peftlib.load(backbone("bert"), mam.save(tmp_path / "a"))
    assert torch.equal(logits(loaded.model, "bert"), before)


def test_paper_defaults():
    config = peftlib.config("mam_adapter")
    assert (config.length, config.hidden, config.bottleneck, config.scale) == (30, 800, 512, 4.0)


def test_no_merge_and_no_empty_sizes():
    with pytest.raises(MergeError, match="mam_adapter has no merge"):
        peftlib.attach(backbone("bert"), "mam_adapter", **SMALL).merge()
    with pytest.raises(ConfigError, match="bottleneck=0"):
        peftlib.config("mam_adapter", bottleneck=0)
