"""The handle: attaching, counting, leaving, and what is left when something fails."""

from __future__ import annotations

import pytest
import torch

import peftlib
from peftlib.conformance.case import Case, backbone, train
from peftlib.conformance.checks import assert_same_structure, structure_of
from peftlib.errors import MergeError, StateError, UnsupportedError
from peftlib.methods.reparameterized.low_rank.lora import LoRA

LORA = Case("lora", "bert")


def test_a_name_with_options_and_a_config_are_the_same():
    by_name = peftlib.attach(backbone("bert"), "lora", rank=4, targets=["ffn.up"])
    by_config = peftlib.attach(backbone("bert"), peftlib.LoRAConfig(rank=4, targets=("ffn.up",)))
    assert by_name.config == by_config.config
    assert all(torch.equal(p, by_config.trainable()[n]) for n, p in by_name.trainable().items())
    with pytest.raises(TypeError, match=r"\['rank'\] belong into the LoRAConfig"):
        peftlib.attach(backbone("bert"), peftlib.LoRAConfig(), rank=4)


def test_the_model_stays_the_same_object_of_the_same_class():
    model = backbone("bert")
    cls = type(model)
    adapted = peftlib.attach(model, "lora")
    assert adapted.model is model
    assert type(model) is cls
    assert model.peftlib_adapted is adapted


def test_counts():
    model = backbone("bert")
    total = sum(p.numel() for p in model.parameters())
    adapted = peftlib.attach(model, "lora", rank=4)
    count = adapted.count()
    assert count.method == 2 * 2 * 4 * (32 + 32)
    assert count.head == 32 * 2 + 2
    assert count.trained == count.method + count.head
    assert count.total == total
    assert count.percent == pytest.approx(100 * count.trained / total)
    assert str(count.trained) in repr(adapted).replace(",", "")
    assert peftlib.attach(backbone("bert"), "lora", rank=4, train_head=False).count().head == 0


def test_full_counts_everything_once_and_the_head_as_head():
    model = backbone("bert")
    count = peftlib.attach(model, "full").count()
    assert count.trained == count.total == count.stored
    assert count.head == 32 * 2 + 2


def test_tied_weights_are_counted_once():
    model = backbone("gpt2", "causal_lm")
    count = peftlib.attach(model, "full").count()
    assert count.trained == count.total == sum(p.numel() for p in model.parameters())


def test_after_leaving_everything_but_repr_is_an_error():
    adapted = peftlib.attach(backbone("bert"), "lora")
    adapted.detach()
    for use in (adapted.detach, adapted.merge, adapted.count, adapted.trainable, adapted.state, adapted.callback):
        with pytest.raises(StateError, match="lora is no longer attached"):
            use()
    with pytest.raises(StateError, match="no longer attached"):
        adapted.lifecycle(3)
    assert "no longer attached" in repr(adapted)


def test_attaching_twice_is_an_error_and_changes_nothing():
    model = backbone("bert")
    adapted = peftlib.attach(model, "lora")
    structure, before = structure_of(model), LORA.logits(model)
    for method in ("lora", "full"):
        with pytest.raises(StateError, match=r"lora is already attached.*merge\(\) or detach\(\).*combine"):
            peftlib.attach(model, method)
    assert_same_structure(structure_of(model), structure)
    assert torch.equal(LORA.logits(model), before)
    adapted.detach()
    peftlib.attach(model, "full")


@pytest.mark.parametrize("when", ["at once", "half way"])
def test_a_failure_while_attaching_leaves_the_backbone_as_it_was(monkeypatch, when):
    model = backbone("bert")
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    structure = structure_of(model)
    attach = LoRA.attach

    def fail(self, host):
        if when == "half way":
            attach(self, host)
        raise KeyboardInterrupt

    monkeypatch.setattr(LoRA, "attach", fail)
    with pytest.raises(KeyboardInterrupt):
        peftlib.attach(model, "lora")
    assert_same_structure(structure_of(model), structure)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_without_copies_detach_says_that_it_cannot_restore():
    adapted = peftlib.attach(backbone("bert"), "full", keep_original=False)
    with pytest.raises(StateError, match=r"full changed.*keep_original=False.*load the backbone again"):
        adapted.detach()
    assert adapted.count().trained


def test_merging_twice_in_sequence_adds_up():
    """LoRA, merged, and another LoRA, merged: the outputs are those of the second before its merge."""
    model = backbone("bert")
    for seed in (0, 1):
        adapted = peftlib.attach(model, "lora", seed=seed)
        train(adapted, LORA.batch())
        before = LORA.logits(model)
        adapted.merge()
        after = LORA.logits(model)
        assert float((after - before).abs().max() / before.abs().max()) < 1e-5


def test_a_merged_model_is_saved_and_read_by_transformers_alone(tmp_path):
    adapted = LORA.trained()
    before = LORA.logits(adapted.model)
    adapted.merge().save_pretrained(tmp_path)
    again = type(adapted.model).from_pretrained(tmp_path)
    assert torch.allclose(LORA.logits(again), before, atol=1e-5)


@pytest.mark.parametrize("name", [m for m in peftlib.methods() if peftlib.card(m).merge == "no"])
def test_a_refused_merge_says_why_and_what_to_do(name):
    adapted = Case(name, "bert").attach()
    with pytest.raises(MergeError, match=rf"{name} has no merge: .*Keep it attached, or save\(\)"):
        adapted.merge()
    adapted.detach()


def test_float64_models_work():
    model = backbone("bert").double()
    adapted = peftlib.attach(model, "lora")
    losses = train(adapted, LORA.batch(), steps=5)
    assert losses[-1] < losses[0]
    assert LORA.logits(model).dtype == torch.float64


def test_on_the_meta_device_counts_need_no_memory():
    model = peftlib.backbones.shapes("roberta-base")
    adapted = peftlib.attach(model, "lora", rank=8)
    assert adapted.count().method == 294_912
    adapted.detach()


def test_language_model_heads_stay_frozen():
    adapted = peftlib.attach(backbone("gpt2", "causal_lm"), "lora")
    assert adapted.head_names == ()
    assert all(".lora_" in n for n in adapted.trainable())
    with pytest.raises(UnsupportedError, match="head needs a new task head"):
        peftlib.attach(backbone("gpt2", "causal_lm"), "head")


def test_config_classes_are_attributes_of_the_package():
    for name in peftlib.methods():
        config = peftlib.find(name).Config
        assert getattr(peftlib, config.__name__) is config
    with pytest.raises(AttributeError, match="NoSuchConfig"):
        _ = peftlib.NoSuchConfig


@pytest.mark.parametrize(
    ("family", "method", "options", "expected"),
    [
        ("bert", "lora", {}, ["attention.query, attention.value in encoder layers 0-1 of 2"]),
        ("gpt2", "lora", {"targets": "attention.value"}, ["attention.value in decoder layers 0-1 of 2"]),
        ("bert", "lora", {"targets": "bert.encoder.layer.1.*"}, ["ffn.up, ffn.down in encoder layer 1 of 2"]),
        (
            "t5",
            "lora",
            {"targets": "*attention.query"},
            ["attention.query in encoder layers 0-1 of 2", "attention.query, cross_attention.query in decoder"],
        ),
        ("bert", "prefix_tuning", {}, ["attention in encoder layers 0-1 of 2"]),
        ("bert", "threshold_mask", {"targets": "ffn.up"}, ["ffn.up in encoder layers 0-1 of 2"]),
    ],
)
def test_printed_it_says_what_trains_and_where(family, method, options, expected):
    adapted = peftlib.attach(backbone(family), method, **options)
    text = str(adapted)
    assert text.startswith(f"{method} on ")
    assert f"{adapted.count().trained:,} of" in text
    for part in expected:
        assert part in text, text
    assert max(map(len, text.splitlines()[:-1])) < 120
