"""S3Delta: the candidates, the budget, what a search leaves behind, and a search that was cut off."""

import pytest
import torch
from torch import nn

import peftlib
from peftlib import backbones
from peftlib.conformance.case import batch, lm_head
from peftlib.errors import LoadError, MergeError, StateError, TargetError
from peftlib.mechanisms import importance
from peftlib.mechanisms.structure import Gates
from peftlib.methods.base import ConfigError
from peftlib.methods.hybrid.automatic.s3delta import LINEAR
from tests.methods.helpers import backbone, inputs, interrupt, perturb, slow_clock

SMALL = {"budget": 0.02, "steps": 1}


def attached(family="bert", head="classification", calibrate=True, seed=0, **options):
    adapted = peftlib.attach(backbone(family, head), "s3delta", seed=seed, **(SMALL | options))
    if calibrate:
        adapted.calibrate([batch(family, head)])
    return adapted


def test_candidates_of_bert_base():
    method = peftlib.attach(backbones.shapes("bert-base-uncased"), "s3delta").method
    d, f, inner = 768, 3072, 24
    adapter = 2 * (d + inner) + inner + d
    sizes = {
        "lora": sorted(12 * [*4 * [2 * d], *2 * [d + f]]),
        "bitfit": sorted(12 * [*5 * [d], f, *2 * [d]]),
        "lnfit": sorted(12 * 2 * [d]),
        "adapter": sorted(12 * 2 * [adapter]),
    }
    found = {kind: sorted(c.size for c in method.candidates if c.kind == kind) for kind in sizes}
    assert found == sizes
    assert len({c.name for c in method.candidates}) == len(method.candidates) == 12 * 18
    assert method.pending()[0] == method.budget == int(0.001 * (109_482_240))


def test_t5_has_biases_where_the_backbone_has_none_and_final_norms():
    candidates = peftlib.attach(backbones.shapes("t5-base", head="seq2seq"), "s3delta").method.candidates
    places = {(c.kind, c.name.rpartition(".")[0]) for c in candidates}
    assert ("bitfit", "encoder.block.0.layer.0.SelfAttention.q") in places
    assert {("lnfit", f"{stack}.final_layer_norm") for stack in ("encoder", "decoder")} <= places
    assert not [name for _, name in places if "EncDecAttention" in name]


@pytest.mark.parametrize("strategy", ["search", "random"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("budget", [0.002, 0.0123])
def test_the_structure_fits_the_budget_and_nothing_more_would(family, budget, strategy):
    head = "classification" if family == "bert" else lm_head(family)
    adapted = attached(family, head, budget=budget, strategy=strategy)
    method, total = adapted.method, adapted.count().total - sum(p.numel() for p in adapted.host.anatomy.head.values())
    size = adapted.count().method
    assert sum(c.size for c in method.chosen) == size <= budget * total
    left = [c.size for c in method.candidates if c not in method.chosen]
    assert min(left) > method.budget - size


def test_what_is_kept_has_the_largest_probabilities():
    method = attached(steps=3).method
    order = sorted(method.candidates, key=lambda c: -method.probabilities[c.name])
    taken, left = [], method.budget
    for candidate in order:
        if candidate.size <= left:
            taken.append(candidate)
            left -= candidate.size
    assert set(taken) == set(method.chosen)
    assert len(set(method.probabilities.values())) > 10, "the search told candidates apart"
    expected = sum(c.size * method.probabilities[c.name] for c in method.candidates)
    assert expected == pytest.approx(method.budget, rel=1e-4)


def test_closed_gates_give_the_backbone_and_open_ones_the_modules():
    adapted, given = attached(calibrate=False), inputs("bert")
    plain = adapted.model(**given).logits
    gates = Gates([1] * len(adapted.method.candidates), 1.0, 1.0, torch.device("cpu"))
    with adapted.host.temporary() as trial, torch.no_grad():
        for i, candidate in enumerate(adapted.method.candidates):
            child = candidate.hang(trial)
            for parameter in child.parameters():
                parameter.normal_(std=0.1)
            gates.guard(i, child, LINEAR[candidate.kind])
        gates.values = torch.zeros(len(adapted.method.candidates))
        assert torch.equal(adapted.model(**given).logits, plain)
        gates.values = torch.ones(len(adapted.method.candidates))
        opened = adapted.model(**given).logits
        assert not torch.allclose(opened, plain, atol=1e-2)
        assert not adapted.trainable().keys() - set(adapted.head_names), "a trial is no part of the method"
    assert torch.equal(adapted.model(**given).logits, plain)


def test_a_gate_scales_what_a_candidate_adds():
    method = attached("t5", lm_head("t5"), calibrate=False).method
    gates = Gates([1], 1.0, 1.0, torch.device("cpu"))
    for kind in LINEAR:
        child = next(c for c in method.candidates if c.kind == kind).make()
        for parameter in child.parameters():
            nn.init.normal_(parameter)
        x = y = torch.randn(2, 3, method.host.anatomy.d)
        whole = child(x, y) - y
        gates.values = torch.tensor([0.3])
        gates.guard(0, child, LINEAR[kind])
        torch.testing.assert_close(child(x, y) - y, 0.3 * whole, rtol=1e-4, atol=1e-4)
        assert whole.abs().min() > 0


def test_after_the_search_all_is_as_at_the_start_but_for_the_structure():
    untouched = attached(calibrate=False)
    before = {n: t.clone() for n, t in untouched.model.state_dict().items()}
    adapted = attached(steps=2)
    after = adapted.model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    added = after.keys() - before.keys()
    assert {n.rpartition(".")[0] for n in added} <= {n for n, _ in adapted.model.named_modules()}
    assert len(added) == sum(len(list(p.parameters())) for p in adapted.host.paths().values())
    assert all(p.grad is None for p in adapted.model.parameters())


def test_a_budget_for_all_candidates_needs_no_search():
    adapted = peftlib.attach(backbone("bert"), "s3delta", budget=0.5)
    adapted.calibrate([])
    assert adapted.method.chosen == adapted.method.candidates


def test_a_search_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    slow_clock(monkeypatch)
    whole = attached(steps=6)
    calls = interrupt(monkeypatch, importance, "loss", at=28)
    cut = attached(steps=6, calibrate=False)
    with pytest.raises(KeyboardInterrupt):
        cut.calibrate([batch("bert")], checkpoint=tmp_path / "search")
    assert not cut.host.paths() and not cut.calibrated
    start = attached(calibrate=False).model.state_dict()
    assert all(torch.equal(t, start[n]) for n, t in cut.model.state_dict().items()), "the head is as it was"
    again = attached(steps=6, calibrate=False)
    again.calibrate([batch("bert")], checkpoint=tmp_path / "search")
    assert len(calls) == 28 + 5
    assert again.method.probabilities == whole.method.probabilities
    assert all(torch.equal(t, whole.state()[n]) for n, t in again.state().items())
    other = attached(steps=6, calibrate=False, seed=1)
    with pytest.raises(StateError, match="another search"):
        other.calibrate([batch("bert")], checkpoint=tmp_path / "search")


def test_random_structures_differ_by_seed_and_number():
    made = [(0, 0), (0, 0), (1, 0), (0, 1)]
    names = [{c.name for c in attached(strategy="random", seed=s, draw=n).method.chosen} for s, n in made]
    assert names[0] == names[1] != names[2] != names[3] != names[0]


def test_a_file_holds_the_structure(tmp_path):
    adapted = attached("gpt2", lm_head("gpt2"), strategy="random", seed=3)
    perturb(adapted)
    loaded = peftlib.load(backbone("gpt2", lm_head("gpt2")), adapted.save(tmp_path / "a"))
    assert {c.name for c in loaded.method.chosen} == {c.name for c in adapted.method.chosen}
    with pytest.raises(LoadError, match="none of the"):
        attached(calibrate=False).method.load_state({"bert.embeddings.weight": torch.zeros(1)})


def test_what_cannot_be_is_refused():
    with pytest.raises(TargetError, match=r"budget=1e-05 is 0 parameters .* smallest candidate has 32"):
        attached(budget=1e-5)
    with pytest.raises(ConfigError, match="kind of candidate='prefix'"):
        peftlib.config("s3delta", kinds=("lora", "prefix"))
    with pytest.raises(ConfigError, match=r"kinds=\(\) leaves no candidates"):
        peftlib.config("s3delta", kinds=())
    with pytest.raises(ConfigError, match="strategy='best'"):
        peftlib.config("s3delta", strategy="best")
    with pytest.raises(MergeError, match="s3delta has no merge"):
        attached(strategy="random").merge()
