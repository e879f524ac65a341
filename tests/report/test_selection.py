"""What a mask chose: tables that add up to the mask itself, and figures that show them."""

from __future__ import annotations

import pytest
import torch
from transformers import BertForSequenceClassification

import peftlib
from peftlib import report
from peftlib.conformance.case import backbone, batch, train
from peftlib.errors import StateError, UnknownNameError


def attached(method: str = "fish_mask", family: str = "bert", **options) -> peftlib.Adapted:
    adapted = peftlib.attach(backbone(family), method, **options)
    adapted.calibrate([batch(family)])
    return adapted


@pytest.fixture(scope="module")
def fish() -> peftlib.Adapted:
    adapted = attached(density=0.1)
    train(adapted, batch("bert"))
    return adapted


@pytest.fixture(scope="module")
def sam() -> peftlib.Adapted:
    return attached("sam", density=0.05, scope="all")


def test_masks_are_the_entries_that_training_moves(fish):
    plain, found = backbone("bert"), report.masks(fish)
    names = [n for n, _ in plain.named_parameters() if not n.startswith("classifier")]
    assert sorted(found) == sorted(names)
    fish.model(**batch("bert"))
    for name, mask in found.items():
        changed = fish.method.candidates[name] != plain.get_parameter(name)
        assert not (changed & ~mask).any()
    assert sum(int(m.sum()) for m in found.values()) == fish.count().method


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("by", ["tensor", "matrix", "layer", "site"])
def test_every_table_adds_up_to_the_mask(family, by):
    adapted = attached("sam", family, density=0.1, scope="all")
    table = report.budget(adapted, by)
    assert table["chosen"].sum() == adapted.count().method
    assert table["entries"].sum() == adapted.method.entries
    assert table["share"].sum() == pytest.approx(1)
    assert (table["density"] == table["chosen"] / table["entries"]).all()
    layers = adapted.host.anatomy.num_layers
    if by == "layer":
        assert table["layer"].notna().sum() == layers
    if by == "matrix":
        inside = table[table["layer"].notna()]
        assert (inside[inside["site"] == "attention.query"].shape[0]) == layers


def test_rows_are_counted_where_they_lie(fish):
    table = report.budget(fish, "tensor").set_index("tensor")
    masks = report.masks(fish)
    for name in ("bert.encoder.layer.1.output.dense.weight", "bert.embeddings.word_embeddings.weight"):
        assert table.loc[name, "chosen"] == int(masks[name].sum())
    row = report.budget(fish, "matrix").query("layer == 1 and site == 'ffn.down'").iloc[0]
    parts = [masks[f"bert.encoder.layer.1.output.dense.{leaf}"] for leaf in ("weight", "bias")]
    assert row["entries"] == sum(m.numel() for m in parts)
    assert row["chosen"] == sum(int(m.sum()) for m in parts)
    sites = set(report.budget(fish, "site")["site"])
    linear = {f"attention.{part}" for part in ("query", "key", "value", "output")} | {"ffn.up", "ffn.down"}
    assert sites == linear | {"embeddings", "norm", "norm.attention", "norm.ffn", "other"}


def test_a_fused_projection_is_split_into_its_parts():
    adapted = attached("sam", "gpt2", density=0.1, scope="all")
    name = "transformer.h.0.attn.c_attn.weight"
    (mask,), d = [report.masks(adapted)[name]], adapted.model.config.n_embd
    table = report.budget(adapted, "tensor").set_index("tensor")
    for i, site in enumerate(("query", "key", "value")):
        row = table.loc[f"transformer.h.0.attn.c_attn[{i}/3].weight"]
        assert row["site"] == f"attention.{site}"
        assert row["chosen"] == int(mask[:, i * d : (i + 1) * d].sum())


def test_overlap_counts_what_both_chose_and_what_chance_would_give(fish, sam):
    table = report.overlap(fish, sam, "tensor").set_index("tensor")
    a, b = report.masks(fish), report.masks(sam)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    row, both = table.loc[name], int((a[name] & b[name]).sum())
    assert (row["first"], row["second"], row["both"]) == (int(a[name].sum()), int(b[name].sum()), both)
    assert row["jaccard"] == pytest.approx(both / int((a[name] | b[name]).sum()))
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(400):
        one, two = (torch.randperm(a[name].numel(), generator=generator)[:n] for n in (row["first"], row["second"]))
        drawn.append(len(set(one.tolist()) & set(two.tolist())))
    mean = sum(drawn) / len(drawn)
    assert row["chance"] == pytest.approx(mean / (row["first"] + row["second"] - mean), rel=0.1)
    whole = report.overlap(fish, sam, "layer")
    assert whole["both"].sum() == sum(int((a[n] & b[n]).sum()) for n in a)
    same = report.overlap(fish, fish)
    assert (same["jaccard"][same["first"] > 0] == 1).all()


def test_a_threshold_mask_shows_what_it_keeps():
    adapted = attached("threshold_mask", sparsity=0.3)
    table = report.budget(adapted)
    assert set(table["site"]) <= {f"attention.{x}" for x in ("query", "key", "value", "output")} | {
        "ffn.up",
        "ffn.down",
    }
    assert table["density"].mean() == pytest.approx(0.7, abs=0.05)
    part = attached("threshold_mask", "gpt2", sparsity=0.3, targets=("attention.query",))
    table = report.budget(part, "tensor").set_index("site")
    assert (table.loc["attention.key", "density"] == 1).all()
    assert (table.loc["attention.query", "density"] < 0.8).all()


def test_parts_of_a_combination_are_found():
    config = peftlib.combine(peftlib.config("fish_mask", density=0.1), "lora")
    adapted = peftlib.attach(backbone("bert"), config)
    adapted.calibrate([batch("bert")])
    chosen = sum(len(child.indices) for child in adapted.method.parts[0].children.values())
    assert report.budget(adapted)["chosen"].sum() == chosen


def test_figures_show_the_tables(fish, sam):
    axes = report.budget_map(fish).axes[0]
    shown = axes.images[0].get_array()
    sites = [label.get_text() for label in axes.get_yticklabels()]
    row = report.budget(fish).query("layer == 1 and site == 'ffn.up'").iloc[0]
    assert shown[sites.index("ffn.up"), 1] == pytest.approx(100 * row["density"])
    assert f"{fish.count().method:,}" in axes.get_title()
    (axes,) = report.budget_by_layer({"fish": fish, "sam": sam}).axes
    table = report.budget(sam, "layer")
    assert list(axes.lines[1].get_ydata()) == pytest.approx(list(100 * table[table["layer"].notna()]["share"]))
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["fish", "sam"]
    (axes,) = report.overlap_map({"fish": fish, "sam": sam}).axes
    total = report.overlap(fish, sam, "tensor")[["first", "second", "both"]].sum()
    jaccard = total["both"] / (total["first"] + total["second"] - total["both"])
    assert axes.images[0].get_array()[0, 1] == pytest.approx(jaccard)
    assert any(t.get_text().startswith(f"{jaccard:.2f}") for t in axes.texts)


def test_what_has_no_mask_says_so(fish):
    with pytest.raises(StateError, match="lora chooses no entries"):
        report.budget(attached("lora"))
    with pytest.raises(StateError, match=r"fish_mask has chosen nothing yet.*calibrate"):
        report.masks(peftlib.attach(backbone("bert"), "fish_mask", density=0.1))
    model = BertForSequenceClassification(peftlib.backbones.tiny.config("bert", intermediate_size=48))
    wider = peftlib.attach(model, "sam", density=0.1)
    wider.calibrate([batch("bert")])
    with pytest.raises(StateError, match="different backbones"):
        report.overlap(fish, wider)
    with pytest.raises(UnknownNameError, match=r"'layers'.*'layer'"):
        report.budget(fish, "layers")
