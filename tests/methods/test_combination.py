"""Several methods on one backbone: counts add up, moments and files are those of all parts."""

from __future__ import annotations

import pytest
import torch

import peftlib
from peftlib.conformance.case import Case, backbone, batch, inputs, logits, sources, train
from peftlib.conformance.checks import assert_same_structure, structure_of
from peftlib.errors import LoadError, MergeError, StateError, UnknownNameError, UnsupportedError
from peftlib.mechanisms import importance
from tests.methods.helpers import interrupt, perturb, slow_clock

PAIRS = [
    ("lora", "bitfit"),
    ("lora", "ia3"),
    ("lora", "prefix_tuning"),
    ("lora", "parallel_adapter"),
    ("prefix_tuning", "parallel_adapter"),
    ("prompt_tuning", "ia3"),
    ("fish_mask", "sequential_adapter"),
    ("adalora", "bitfit"),
    ("hadamard_adapter", "adalora"),
]


def parts(pair):
    return [Case(name, "bert").config for name in pair]


def combined(pair, seed: int = 0, **options) -> peftlib.Adapted:
    adapted = peftlib.attach(backbone("bert"), peftlib.combine(*parts(pair)), seed=seed, **options)
    adapted.calibrate([batch("bert")])
    return adapted


def apart(name) -> peftlib.Adapted:
    return Case(name, "bert").attach()


@pytest.fixture(params=PAIRS, ids="+".join)
def pair(request):
    missing = [name for name in request.param if name not in peftlib.methods()]
    if missing:
        pytest.skip(f"{missing[0]} is not in peftlib")
    return request.param


def test_counts_add_up_but_shared_parameters_count_once(pair):
    both = combined(pair)
    alone = [apart(name) for name in pair]
    names = [set(a.trainable()) - set(a.head_names) for a in alone]
    together = set(both.trainable()) - set(both.head_names)
    if "fish_mask" not in pair:
        assert together == names[0] | names[1]
        shared = sum(both.trainable()[n].numel() for n in names[0] & names[1])
        assert both.count().method == sum(a.count().method for a in alone) - shared
    assert both.count().head == alone[0].count().head


def test_it_trains_saves_loads_and_leaves(pair, tmp_path):
    model = backbone("bert")
    before, structure = {n: t.clone() for n, t in model.state_dict().items()}, structure_of(model)
    both = combined(pair)
    losses = train(both, batch("bert"), steps=6, rate=1e-3)
    assert losses[-1] < losses[0]
    loaded = peftlib.load(model, both.save(tmp_path / "adapter"))
    assert loaded.config == both.config
    assert torch.equal(logits(model, **inputs("bert")), logits(both.model, **inputs("bert")))
    loaded.detach()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert_same_structure(structure_of(model), structure)


_TAKEN = r"(?s){} \+ parallel_adapter cannot be combined: \S+ wants a place that is taken \(.*'parallel_adapter'"
REFUSED = {
    **{name: _TAKEN.format(name) for name in ("mam_adapter", "u_mam", "autopeft")},  # have one themselves
    "lora_prune": "lora_prune .* cannot be combined .*; attach it alone",
}


@pytest.mark.parametrize("name", peftlib.methods())
def test_any_method_combines_with_another_or_says_why_not(name):
    partner = "bitfit" if name == "parallel_adapter" else "parallel_adapter"
    model, given = backbone("bert"), sources(name, "bert", "classification", 2)
    structure, both = structure_of(model), peftlib.combine(*parts((name, partner)))
    if name in REFUSED:
        with pytest.raises(UnsupportedError, match=REFUSED[name]):
            peftlib.attach(model, both, sources=given)
        assert_same_structure(structure_of(model), structure)
        return
    both = peftlib.attach(model, both, sources=given)
    alone = [Case(n, "bert").start() for n in (name, partner)]
    names = [set(a.trainable()) - set(a.head_names) for a in alone]
    assert set(both.trainable()) - set(both.head_names) == names[0] | names[1]
    if name != "fish_mask":  # chooses a share of all parameters, the adapter's too
        shared = sum(both.trainable()[n].numel() for n in names[0] & names[1])
        assert both.count().method == sum(a.count().method for a in alone) - shared
    if both.method.calibrates:
        return
    perturb(both, std=0.01)
    other = backbone("bert")
    loaded = peftlib.load(other, both.snapshot())
    assert loaded.config == both.config
    assert torch.equal(logits(other, **inputs("bert")), logits(model, **inputs("bert")))


def test_the_moments_are_those_of_the_parts(pair):
    both = combined(pair)
    assert set(both.method.hooks()) == {m for name in pair for m in apart(name).method.hooks()}
    assert both.method.calibrates == any(peftlib.find(name).calibrates for name in pair)
    if both.method.hooks() or both.method.calibrates:
        both.model.train()
        with pytest.raises(StateError, match="combination acts during training"):
            both.model(**batch("bert"))


def test_it_merges_where_every_part_does(pair):
    both = combined(pair)
    train(both, batch("bert"))
    before = logits(both.model, **inputs("bert"))
    stay = [name for name in pair if peftlib.card(name).merge == "no"]
    if stay:
        with pytest.raises(MergeError, match=f"{stay[0]} has no merge"):
            both.merge()
        assert torch.equal(logits(both.model, **inputs("bert")), before)
        return
    merged = both.merge()
    after = logits(merged, **inputs("bert"))
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5
    assert_same_structure(structure_of(merged), structure_of(backbone("bert")))


def test_each_part_acts_as_it_does_alone():
    """LoRA and BitFit: with the other part at its start, each gives what it gives alone."""
    both = combined(("lora", "bitfit"))
    alone = Case("lora", "bert").trained()
    with torch.no_grad():
        for name, parameter in alone.trainable().items():
            both.trainable()[name].copy_(parameter)
    assert torch.equal(logits(both.model, **inputs("bert")), logits(alone.model, **inputs("bert")))


def test_two_of_the_same_method_want_the_same_place():
    model = backbone("bert")
    structure = structure_of(model)
    with pytest.raises(UnsupportedError, match=r"lora \+ lora cannot be combined: lora wants a place that is taken"):
        peftlib.attach(model, peftlib.combine("lora", peftlib.LoRAConfig(rank=2)))
    assert_same_structure(structure_of(model), structure)
    other = peftlib.combine(peftlib.LoRAConfig(targets="ffn.up"), peftlib.LoRAConfig(rank=2))
    assert peftlib.attach(model, other).count().method == 2 * 8 * (32 + 64) + 2 * 2 * 2 * (32 + 32)


def test_an_unknown_part_is_named():
    with pytest.raises(UnknownNameError, match=r"'lorra'.*did you mean 'lora'"):
        peftlib.combine("bitfit", "lorra")


def test_a_combination_of_nothing_is_an_error():
    with pytest.raises(peftlib.ConfigError, match="at least two"):
        peftlib.combine()
    with pytest.raises(peftlib.ConfigError, match="at least two"):
        peftlib.combine("lora")


def test_the_seed_decides(pair):
    one, same, other = (combined(pair, seed=s).state() for s in (1, 1, 2))
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert one.keys() == other.keys() or "fish_mask" in pair


def test_left_over_tensors_are_named(tmp_path):
    from tests.test_saved import rewrite

    both = combined(("lora", "bitfit"))
    folder = both.save(tmp_path / "adapter")
    state = {n: t.contiguous().clone() for n, t in both.state().items()}
    rewrite(folder, weights=state | {"bert.more": torch.zeros(1)})
    with pytest.raises(LoadError, match=r"left over.*bert\.more"):
        peftlib.load(backbone("bert"), folder)
    rewrite(folder, weights={n: t for n, t in state.items() if not n.endswith("lora.A")})
    with pytest.raises(LoadError, match=r"missing.*lora\.A"):
        peftlib.load(backbone("bert"), folder)


def test_a_calibration_goes_on_from_its_checkpoint_inside_a_combination(tmp_path, monkeypatch):
    slow_clock(monkeypatch)
    parts = peftlib.combine(peftlib.config("s3delta", budget=0.02, steps=4), "prefix_tuning")
    calls = interrupt(monkeypatch, importance, "loss", at=14)
    with pytest.raises(KeyboardInterrupt):
        peftlib.attach(backbone("bert"), parts).calibrate([batch("bert")], checkpoint=tmp_path / "search")
    assert (tmp_path / "search").is_file()
    done = peftlib.attach(backbone("bert"), parts)
    done.calibrate([batch("bert")], checkpoint=tmp_path / "search")
    assert len(calls) < 2 * 14, "the search began anew"
    whole = peftlib.attach(backbone("bert"), parts)
    whole.calibrate([batch("bert")])
    assert done.method.parts[0].probabilities == whole.method.parts[0].probabilities


def test_parts_that_calibrate_have_checkpoints_of_their_own(tmp_path, monkeypatch):
    slow_clock(monkeypatch)
    searches = [peftlib.config("s3delta", budget=0.02, steps=1), peftlib.config("fish_mask", density=0.1)]
    peftlib.attach(backbone("bert"), peftlib.combine(*searches)).calibrate([batch("bert")], tmp_path / "search")
    assert [path.name for path in tmp_path.iterdir()] == ["search-0"]
