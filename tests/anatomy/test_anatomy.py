"""Sites, norms, stacks and heads of every family; patterns that are strict."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import AutoModel, BertConfig, ViTConfig, ViTModel

import peftlib
from peftlib import anatomy
from peftlib.conformance.case import ENCODER_DECODERS, ENCODERS, FAMILIES, backbone, inputs, lm_head
from peftlib.errors import TargetError, UnsupportedError

LLAMA_LIKE = ("llama", "mistral", "qwen2")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["classification", "lm", "base"])
def test_sites_are_the_linear_maps_that_a_forward_uses(family, head):
    model = backbone(family, lm_head(family) if head == "lm" else head)
    parts = anatomy.of(model)
    expected = 2 * (2 if family in ENCODER_DECODERS else 1)
    assert parts.num_layers == expected
    modules = dict(model.named_modules())
    seen = {}
    for site in parts.sites():
        assert modules[site.path] is site.module, "the path names another module"
        kv = parts.kv_heads * parts.head_dim
        shape = {
            "attention.query": (parts.heads * parts.head_dim, parts.d),
            "attention.key": (kv, parts.d),
            "attention.value": (kv, parts.d),
            "attention.output": (parts.d, parts.heads * parts.head_dim),
            "ffn.up": (parts.f, parts.d),
            "ffn.gate": (parts.f, parts.d),
            "ffn.down": (parts.d, parts.f),
        }[site.name.replace("cross_", "")]
        assert (site.out_features, site.in_features) == shape
        assert site.weight.shape == shape
        assert site.bias is None or site.bias.shape == shape[:1]
        seen.setdefault(id(site.module), []).append(site)

    called = set()
    handles = [s.module.register_forward_hook(lambda m, *_: called.add(id(m))) for s in parts.sites()]
    with torch.no_grad():
        given = inputs(family, model_head(family, head))
        model(**given, **({"decoder_input_ids": given["input_ids"]} if needs_decoder_inputs(family, head) else {}))
    assert called == set(seen), "a site is not part of the forward pass"
    for handle in handles:
        handle.remove()


def model_head(family: str, head: str) -> str:
    return lm_head(family) if head == "lm" else "classification" if head == "classification" else "base"


def needs_decoder_inputs(family: str, head: str) -> bool:
    return head == "base" and family in ENCODER_DECODERS


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_hold_what_their_names_say(family):
    parts = anatomy.of(backbone(family))
    names = {site.name for site in parts.sites()}
    assert ("ffn.gate" in names) == (family in (*LLAMA_LIKE, "mt5"))
    assert any(n.startswith("cross_attention.") for n in names) == (family in ENCODER_DECODERS)
    for layer in parts.layers:
        assert set(layer.norms) == {"attention", "ffn"} | ({"cross_attention"} if layer.cross_attention else set())
        assert all(norm.weight.shape == (parts.d,) for norm in layer.norms.values())
        assert layer.attention is not layer.cross_attention
        inside = {id(m) for m in layer.module.modules()}
        assert all(id(site.module) in inside for site in layer.sites.values())
        assert all(site.layer == layer.index and site.stack == layer.stack for site in layer.sites.values())
    assert parts.stacks == (
        ("encoder", "decoder") if family in ENCODER_DECODERS else ("encoder",) if family in ENCODERS else ("decoder",)
    )
    assert len(parts.norms()) == sum(len(layer.norms) for layer in parts.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_a_weight_are_views_that_write_through(family):
    for site in anatomy.of(backbone(family)).sites():
        x = torch.randn(3, site.in_features)
        before = site.module(x)
        rows = site.rows
        expected = torch.nn.functional.linear(x, site.weight, site.bias)
        assert torch.allclose(before[..., rows], expected, atol=1e-6)
        with torch.no_grad():
            site.weight.add_(1.0)
        after = site.module(x)
        moved = torch.zeros_like(before)
        moved[..., rows] = x.sum(-1, keepdim=True)
        assert torch.allclose(after - before, moved, atol=1e-4), f"{site} wrote elsewhere"


@pytest.mark.parametrize("family", FAMILIES)
def test_head_is_the_new_task_head_and_no_language_model_head(family):
    classifier = anatomy.of(backbone(family))
    outside = set(dict(classifier.model.named_parameters())) - {
        n for n, p in classifier.model.named_parameters() if any(p is q for q in classifier.base.parameters())
    }
    assert set(classifier.head) == outside
    assert classifier.head
    assert anatomy.of(backbone(family, lm_head(family))).head == {}
    assert anatomy.of(backbone(family, "base")).head == {}


def test_an_unknown_family_lists_the_known_ones_and_how_to_add_one():
    model = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(UnsupportedError, match=r"'vit'.*bert, roberta.*add one Family entry.*families\.py"):
        anatomy.of(model)
    with pytest.raises(UnsupportedError, match="Linear is no model of transformers"):
        anatomy.of(torch.nn.Linear(2, 2))


def test_a_backbone_without_layers_is_refused():
    config = BertConfig(hidden_size=8, num_hidden_layers=0, num_attention_heads=2, intermediate_size=8, vocab_size=11)
    with pytest.raises(UnsupportedError, match="no transformer layers"):
        anatomy.of(AutoModel.from_config(config))


def test_patterns_select_by_name_and_by_path():
    parts = anatomy.of(backbone("bert"))
    assert [s.path for s in parts.sites("attention.query")] == [
        f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)
    ]
    assert len(parts.sites()) == len(parts.sites("all-linear")) == 12
    # A path names one layer of several: only that one is taken.
    assert {s.layer for s in parts.sites("bert.encoder.layer.1.*")} == {1}
    assert len(parts.sites("bert.encoder.layer.1.*")) == 6
    # In forward order, each site once, however the patterns overlap.
    both = parts.sites(("ffn.down", "attention.query", "*query"))
    assert [(s.layer, s.name) for s in both] == [(i, n) for i in (0, 1) for n in ("attention.query", "ffn.down")]


def test_cross_attention_is_only_taken_where_it_is_asked_for():
    parts = anatomy.of(backbone("t5"))
    assert len(parts.sites("attention.query")) == 4
    assert len(parts.sites("cross_attention.query")) == 2
    assert len(parts.sites("*attention.query")) == 6


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("attention.querry", "attention.query"), ("attn.value", "attention.value"), ("ffn.upp", "ffn.up")],
)
def test_a_pattern_that_matches_nothing_names_near_sites(pattern, near):
    parts = anatomy.of(backbone("bert"))
    with pytest.raises(TargetError, match=rf"{pattern}.*did you mean.*'{near}'"):
        parts.sites(("attention.query", pattern))


def test_a_pattern_without_a_near_name_lists_all_sites():
    with pytest.raises(TargetError, match=r"'zzz' matches nothing.*attention\.query, attention\.key.*wildcards"):
        anatomy.of(backbone("gpt2")).sites("zzz")


def test_no_pattern_at_all_is_an_error():
    with pytest.raises(TargetError, match="targets is empty"):
        anatomy.of(backbone("bert")).sites(())


class Ranker(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = backbone("bert", "base")
        self.config = self.encoder.config


@pytest.mark.parametrize(
    ("wrap", "way_out"),
    [
        (lambda model: Ranker(), r"Ranker is a module around a model.*attach\(model\.encoder, \.\.\.\)"),
        (lambda model: torch.nn.Sequential(Ranker()), r"attach\(model\[0\]\.encoder, \.\.\.\)"),
        (torch.nn.DataParallel, r"DataParallel is.*attach\(model\.module, \.\.\.\)"),
        (lambda model: torch.compile(model, backend="eager"), r"attach\(model\._orig_mod, \.\.\.\)"),
        (
            lambda model: torch.nn.ModuleList([model, Ranker()]),
            r"attach\(model\[0\], \.\.\.\) or attach\(model\[1\]\.encoder, ",
        ),
        (
            lambda model: peft.get_peft_model(model, peft.LoraConfig()),
            r"layers of another library \(peft\..*merge_and_unload",
        ),
        (lambda model: peft.get_peft_model(model, peft.LoraConfig()).base_model.model, "layers of another library"),
    ],
    ids=["own", "nested", "parallel", "compiled", "two", "peft", "inside peft"],
)
def test_a_wrapped_model_is_refused_with_the_way_out(wrap, way_out):
    with pytest.raises(UnsupportedError, match=way_out):
        anatomy.of(wrap(backbone("bert")))


def test_inside_another_module_a_model_is_adapted_in_place():
    ranker = Ranker()
    adapted = peftlib.attach(ranker.encoder, "lora")
    assert [n for n, p in ranker.named_parameters() if p.requires_grad] == [f"encoder.{n}" for n in adapted.trainable()]
