"""Entries: what they refuse, and that the design space says of every method what its code does, as far as
a model with the method attached shows it."""

from __future__ import annotations

import dataclasses
import functools

import pytest
from torch import nn
from torch.nn.utils import parametrize

import peftlib
from peftlib import taxonomy
from peftlib.conformance.case import Case
from peftlib.errors import EntryError, UnsupportedError
from peftlib.methods.reparameterized.lora.weight_update.delta_lora import Anchored
from peftlib.methods.reparameterized.lora.weight_update.lora_prune import LoRAPrune
from peftlib.taxonomy import types


@functools.cache
def attached(name: str):
    """The method on BERT and the names of the backbone's own parameters."""
    case = Case(name, "bert")
    model = case.backbone()
    own = {n for n, _ in model.named_parameters()}
    try:
        return case.attach(model), own
    except UnsupportedError as error:
        pytest.skip(str(error))


def children(adapted) -> list[tuple[nn.Module, nn.Module]]:
    """Owner and child of everything that was added beside the network's own weights."""
    pairs = [(owner, child) for part in adapted.host._parts() for owner, _, child in part.children]
    return [(o, c) for o, c in pairs if not isinstance(o, parametrize.ParametrizationList)]


every = pytest.mark.parametrize("entry", taxonomy.METHODS, ids=lambda e: e.name)
changing = pytest.mark.parametrize("entry", [e for e in taxonomy.METHODS if e.name != "head"], ids=lambda e: e.name)


@every
def test_every_method_has_its_place(entry):
    words = (types.FORMS, types.REPRESENTATIONS, types.INSERTIONS, types.COMPOSITIONS)
    for known, said in zip(words, entry.place, strict=True):
        assert said
        assert len(set(said)) == len(said)
        assert set(said) <= known.keys()
    assert entry.modifies
    assert all(any(site in sites for sites in types.REPRESENTATIONS.values()) for site in entry.sites)


@changing
def test_what_changes_in_place_is_the_network_s_own_weights(entry):
    """Their new values are what is stored, or what a parametrization or the method itself makes of what is stored."""
    adapted, own = attached(entry.name)
    whole = adapted.host.anatomy.base
    beside = [child for owner, child in children(adapted) if owner is not whole]
    made = any(isinstance(module, parametrize.ParametrizationList) for module in adapted.model.modules())
    stored = {name.removesuffix(".values") for name in adapted.method.state()} - set(adapted.head_names)
    # Delta-LoRA moves weights step by step, LoRAPrune cuts them when training ends.
    moved = any(isinstance(child, Anchored) for child in beside) or isinstance(adapted.method, LoRAPrune)
    assert ("in place" in entry.place[2]) == (bool(stored & own) or (made and not beside) or moved)
    only = set(entry.place[2]) == {"in place"}
    assert not (only and beside)
    assert only or children(adapted)


@changing
def test_a_child_hangs_on_a_site_that_the_entry_names(entry):
    adapted, _ = attached(entry.name)
    owners = {id(owner) for owner, _ in children(adapted)}
    for site in adapted.host.anatomy.sites():
        if id(site.module) in owners and site.part is None:
            assert site.name in entry.sites


FACTORS = {"alpha", "scale", "scaling"}
OTHER_FACTORS = {
    "threshold_mask": "the size of the scores at the start",
    "diff_pruning": "the cost of an entry in the penalty",
    "adamix": "the weight of the consistency loss",
    "sparse_adapter": "of its LoRA form",
    "propetl": "of its LoRA form",
}


@changing
def test_what_is_scaled_has_the_factor_as_an_option(entry):
    options = {field.name for field in dataclasses.fields(peftlib.find(entry.name).Config)}
    scaled = bool(options & FACTORS) and entry.name not in OTHER_FACTORS
    assert ("scaled" in entry.place[3]) == scaled


def test_hybrids_are_the_sum_of_their_parts():
    for name in ("mam_adapter", "unipelt"):
        method = peftlib.find(name)(peftlib.config(name))
        parts = [word for part in method.parts for word in taxonomy.entry(part.name).place[0] if word != "tensors"]
        assert set(taxonomy.entry(name).place[0]) == set(parts)


ENTRY = dataclasses.asdict(taxonomy.entry("lora")) | {"name": "mine", "origin": "yours"}


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("title", "", "entry of mine: title is empty"),
        ("equation", "", "equation is empty"),
        ("name", "my method", "entry of my method: name is 'my method'"),
        ("form", "bottelneck", "form has 'bottelneck'; known are bottleneck"),
        ("insertion", "parallel + above", "insertion has 'above'"),
        ("composition", "", "composition has ''"),
        ("start", "zero", "start is 'zero'; known are identity, near, changed"),
        ("merge", "yes", "merge is 'yes'"),
        ("origin", "mine", "origin is 'mine'"),
        ("count", "2 * L *", "count is no formula"),
    ],
)
def test_an_entry_with_a_wrong_field_names_it(field, value, match):
    with pytest.raises(EntryError, match=match) as error:
        taxonomy.Entry(**(ENTRY | {field: value}))
    assert error.value.field == field


def test_an_entry_without_a_field_names_it():
    with pytest.raises(TypeError, match="'equation'"):
        taxonomy.Entry(**{name: value for name, value in ENTRY.items() if name != "equation"})


def test_a_formula_names_sizes_and_options_only():
    entry = taxonomy.Entry(**(ENTRY | {"count": "sum(rank for layer in range_) + L"}))
    with pytest.raises(EntryError, match=r"count names 'range_'; known are L, d, .*, rank"):
        entry.check_count(["rank"])
    taxonomy.entry("increlora").check_count(f.name for f in dataclasses.fields(peftlib.find("increlora").Config))
