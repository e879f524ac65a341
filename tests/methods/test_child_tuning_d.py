"""Child-Tuning D: the child network is the layers' most important share, and stays it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import peftlib
from peftlib import backbones
from peftlib.conformance.case import backbone, batch, train
from peftlib.errors import ConfigError, StateError, TargetError
from tests.methods.facts import Count, Default, Facts, Trains

CODE = "alibaba/AliceMind, ChildTuning/ChildTuningD.py"

FACTS = Facts(
    "child_tuning_d",
    Default("density", 0.3, "alibaba/AliceMind, ChildTuning/run.sh: REVERSE_P=0.3"),
    Default("clip", 1.0, f"{CODE}, calculate_fisher: each tensor's gradient is clipped to max_grad_norm"),
    Default("dropout", True, f"{CODE}, calculate_fisher: model.train()"),
    Default("batches", None, f"{CODE}, calculate_fisher: a pass over the training data"),
    Default("train_rest", True, f"{CODE}, calculate_fisher: only names with 'layer' are masked"),
    Trains(
        ("*.parametrizations.*.0.values", "*.embeddings.*", "*.pooler.*"),
        f"{CODE}, calculate_fisher: masked are the names with 'layer'",
        attach=lambda: attached("bert"),
    ),
    Count("roberta-base", 124_055_040 - 85_054_464 + int(0.3 * 85_054_464), "30 % of the layers, all of the rest"),
    Count("bert-large-uncased", 123_525_324, "30 % of 302,309,376 in 24 layers, and the 32,832,512 outside of them"),
    Count("t5-base", 84_144_153, "30 % of the layers, the embeddings and the final norms"),
    Count("llama-7b", 2_205_028_352, "30 % of the layers, the embeddings, the final norm and the output map"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()


FAMILIES = ["bert", "gpt2", "llama", "t5"]


def halves(family: str) -> list[dict]:
    data = batch(family)
    return [{k: v[i : i + 4] for k, v in data.items()} for i in (0, 4)]


def attached(family: str = "bert", **options) -> peftlib.Adapted:
    adapted = peftlib.attach(backbone(family), "child_tuning_d", **options)
    adapted.calibrate(halves(family))
    return adapted


def in_layers(model) -> dict[str, torch.nn.Parameter]:
    layers = {id(p) for layer in peftlib.anatomy.of(model).layers for p in layer.module.parameters()}
    return {n: p for n, p in model.named_parameters() if id(p) in layers}


@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_child_is_the_largest_share_of_the_layers(clip):
    model, sums = backbone("bert"), {}
    names = list(in_layers(model))
    for part in halves("bert"):
        model.zero_grad()
        model(**part).loss.backward()
        for name in names:
            g = model.get_parameter(name).grad
            g = g if clip is None or g.norm() <= clip else g * clip / g.norm()
            sums[name] = sums.get(name, 0) + g**2 / 2
    places = [(n, i) for n in names for i in range(sums[n].numel())]
    order = torch.cat([sums[n].flatten() for n in names]).sort(descending=True, stable=True).indices
    expected = {places[int(i)] for i in order[: int(0.3 * len(places))]}
    adapted = attached(clip=clip)
    chosen = {(n, int(i)) for n, child in adapted.method.children.items() for i in child.indices}
    assert len(chosen) == int(0.3 * len(places))
    assert len(chosen ^ expected) <= 4, "beyond rounding"


def test_clipping_changes_the_choice():
    children = attached(clip=None).method.children, attached(clip=0.01).method.children
    assert any(
        not torch.equal(children[0][n].indices, children[1][n].indices) for n in children[0].keys() & children[1]
    )


def test_the_information_is_measured_in_training_mode():
    def chosen(**options):
        torch.manual_seed(0)
        model = backbones.load("tiny-bert", head="classification", dropout=0.5).model
        adapted = peftlib.attach(model, "child_tuning_d", **options)
        adapted.calibrate(halves("bert"))
        return {(n, int(i)) for n, child in adapted.method.children.items() for i in child.indices}

    assert chosen() == chosen()
    assert chosen() != chosen(dropout=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_outside_the_layers_everything_trains_or_only_the_head(family):
    model = backbone(family)
    inside, head = in_layers(model), peftlib.anatomy.of(model).head
    entries, outside = (sum(p.numel() for p in ps) for ps in (inside.values(), model.parameters()))
    outside -= entries
    adapted = attached(family)
    assert adapted.count().trained == outside + int(0.3 * entries)
    rest = {n for n in backbone(family).state_dict() if n not in inside} & set(adapted.trainable())
    assert {n for n, _ in model.named_parameters() if n not in inside} == rest
    only_head = attached(family, train_rest=False)
    assert only_head.count().trained == sum(p.numel() for p in head.values()) + int(0.3 * entries)


def test_weight_decay_and_momentum_never_move_a_masked_entry():
    adapted = attached(density=0.1)
    plain = dict(backbone("bert").named_parameters())
    train(adapted, batch("bert"), steps=5, rate=0.05, weight_decay=0.5)
    now = dict(adapted.model.named_parameters())
    owned, moved = adapted.host.owned(), 0
    for name, before in in_layers(backbone("bert")).items():
        module, _, leaf = name.rpartition(".")
        computed = f"{module}.parametrizations.{leaf}.original"
        changed = now.get(computed, now.get(name)) != plain[name]
        assert not (changed & ~owned.get(computed, torch.zeros_like(changed))).any(), name
        moved += int(changed.sum())
        assert before.shape == changed.shape
    assert moved > 0.9 * adapted.method.k
    assert (
        now["bert.embeddings.position_embeddings.weight"] != plain["bert.embeddings.position_embeddings.weight"]
    ).any()


def test_the_mask_is_the_same_after_training():
    adapted = attached()
    before = {n: c.indices.clone() for n, c in adapted.method.children.items()}
    train(adapted, batch("bert"))
    assert all(torch.equal(c.indices, before[n]) for n, c in adapted.method.children.items())


def test_the_file_holds_a_bit_an_entry_and_the_chosen_values(tmp_path):
    adapted = attached(train_rest=False)
    folder = adapted.save(tmp_path / "child")
    tensors = load_file(folder / "adapter.safetensors")
    entries = sum(p.numel() for p in in_layers(backbone("bert")).values())
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert size <= 4 * int(0.3 * entries) + entries / 8 + len(tensors) + 4 * adapted.count().head
    loaded = peftlib.load(backbone("bert"), folder)
    assert train(loaded, batch("bert")) == train(adapted, batch("bert"))


def test_it_reads_as_many_batches_as_it_is_told():
    first = peftlib.attach(backbone("bert"), "child_tuning_d")
    first.calibrate(halves("bert")[:1])
    told = attached(batches=1)
    for name, child in first.method.children.items():
        assert torch.equal(child.indices, told.method.children[name].indices)


def test_bad_settings_and_calibration_first():
    for options in ({"density": 0.0}, {"density": 2.0}, {"batches": 0}, {"clip": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            peftlib.attach(backbone("bert"), "child_tuning_d", **options)
    with pytest.raises(TargetError, match=r"density=1e-06 of 17,\d+ entries is 0; it must be a number from 1"):
        peftlib.attach(backbone("bert"), "child_tuning_d", density=1e-6)
    adapted = peftlib.attach(backbone("bert"), "child_tuning_d")
    with pytest.raises(StateError, match="calibrate"):
        train(adapted, batch("bert"))
