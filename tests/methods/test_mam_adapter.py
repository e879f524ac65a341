"""The MAM adapter is prefix tuning and a parallel adapter at once, and nothing else."""

import pytest
import torch

import peftlib
from peftlib.errors import MergeError
from peftlib.methods.base import ConfigError
from tests.methods.facts import Count, Default, Facts, Start, Trains, kaiming_uniform, normal, zeros
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


CODE = "jxhe/unify-parameter-efficient-tuning"
FACTS = Facts(
    "mam_adapter",
    Default("length", 30, f"{CODE}, exps/run_xsum.sh and run_en_ro.sh: attn_bn=30 (run_glue.sh: 16)"),
    Default("bottleneck", 512, f"{CODE}, exps/run_xsum.sh and run_en_ro.sh: ffn_bn=512 (run_glue.sh: 16)"),
    Default("scale", 4.0, f"{CODE}, exps/run_xsum.sh and run_en_ro.sh: ffn_adapter_scalar=4 (run_glue.sh: 2)"),
    Default("hidden", 800, f"{CODE}, exps/run_xsum.sh: mid_dim 800"),
    Default("reparametrize", True, f"{CODE}, petl/petl_factory.py, Prefix: control_trans"),
    Start("*.parallel_adapter.down.weight", kaiming_uniform(), f"{CODE}, petl_factory.py, init_option lora"),
    Start("*.parallel_adapter.up.weight", zeros(), f"{CODE}, petl_factory.py, init_option lora"),
    Start("*.trunk.embedding", normal(1.0), f"{CODE}, petl_factory.py, Prefix: nn.Embedding", {"length": 64}),
    Trains(("*.prefix.maker.*", "*.parallel_adapter.*"), f"{CODE}: unfreeze_params=ef_"),
    Count(
        "roberta-base",
        12 * (2 * 768 * 16 + 16 + 768) + 16 * 768 + 769 * 800 + 24 * 768 * 801,
        f"{CODE}, exps/run_glue.sh: attn_bn=16, ffn_bn=16",
        {"length": 16, "bottleneck": 16, "scale": 2.0},
    ),
    Count("roberta-base", 24_854_816, "its formula at the defaults"),
    Count("t5-base", 65_111_904, "its formula; three MLPs, for encoder, decoder and cross-attention, as in the code"),
    Count("llama-7b", 347_743_008, "its formula at the defaults"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
