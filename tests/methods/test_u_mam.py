"""U-MAM: the budget to the entry, the score, the start after the search."""

import pytest
import torch
from safetensors.torch import load_file

import peftlib
from peftlib import backbones
from peftlib.conformance.case import backbone, batch, inputs, logits, train
from peftlib.errors import MergeError, StateError, TargetError
from peftlib.mechanisms import warmup
from peftlib.methods.base import ConfigError
from tests.methods.facts import Count, Default, Facts, Start, kaiming_uniform, normal, zeros

SMALL = {"length": 5, "bottleneck": 6, "steps": 2}


def attached(family="bert", calibrate=True, **options):
    adapted = peftlib.attach(backbone(family), "u_mam", **(SMALL | options))
    if calibrate:
        adapted.calibrate([batch(family)])
    return adapted


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("density", [0.03, 0.1, 0.77])
def test_the_budget_is_met_to_the_entry(family, density):
    adapted = attached(family, density=density, calibrate=False)
    dense = peftlib.attach(backbone(family), "mam_adapter", length=5, bottleneck=6, reparametrize=False)
    k = int(density * dense.count().method)
    assert adapted.count().method == k
    adapted.calibrate([batch(family)])
    assert adapted.count().method == sum(len(c.values) for c in adapted.method.children.values()) == k


def test_count_on_roberta_base():
    adapted = peftlib.attach(backbones.shapes("roberta-base"), "u_mam", density=0.01)
    assert adapted.count().method == int(0.01 * 12 * (2 * 30 * 768 + 2 * 768 * 512 + 512 + 768))


def test_the_entries_are_those_with_the_largest_product_of_change_and_gradient():
    """One round of one step: the score by hand, from the same training."""
    twin = attached(calibrate=False, rounds=1, steps=1)
    parameters = twin.method.candidates
    head = [p for p in twin.host.anatomy.head.values() if p.requires_grad]
    twin.guard.running = twin.lifecycle(1)
    groups = [{"params": [*parameters.values(), *head], "lr": 1e-3}]
    warmup.train(twin.model, groups, [batch("bert")], epochs=1.0, steps=1, seed=twin.method.seed + 1)
    found = torch.autograd.grad(twin.model.eval()(**batch("bert")).loss, list(parameters.values()))
    scores = torch.cat([(p.detach() * g).abs().flatten() for p, g in zip(parameters.values(), found)])
    places = [(n, i) for n, p in parameters.items() for i in range(p.numel())]
    adapted = attached(rounds=1, steps=1)
    chosen = {(n, int(i)) for n, c in adapted.method.children.items() for i in c.indices}
    expected = {places[int(i)] for i in scores.sort(descending=True, stable=True).indices[: len(chosen)]}
    assert len(chosen ^ expected) <= 2, "beyond rounding"


def test_after_the_search_everything_is_as_at_the_start():
    adapted, untouched = attached(density=0.4), attached(calibrate=False)
    for name, child in adapted.method.children.items():
        start = untouched.method.candidates[name].detach().flatten()[child.indices.long()]
        assert torch.equal(child.values.detach(), start)
    for name in adapted.head_names:
        assert torch.equal(adapted.trainable()[name], untouched.trainable()[name])


def test_rounds_choose_other_entries_than_one_cut():
    one, more = (
        {n: c.indices.tolist() for n, c in attached(rounds=r, steps=4).method.children.items()} for r in (1, 4)
    )
    assert one != more


def test_dropped_entries_stay_zero_and_the_file_holds_the_others(tmp_path):
    adapted = attached(density=0.05)
    train(adapted, batch("bert"), weight_decay=0.1)
    folder = adapted.save(tmp_path / "a")
    tensors = load_file(folder / "adapter.safetensors")
    assert sum(t.numel() for n, t in tensors.items() if n.endswith(".values")) == adapted.method.k
    loaded = peftlib.load(backbone("bert"), folder)
    assert torch.equal(logits(loaded.model, **inputs("bert")), logits(adapted.model, **inputs("bert")))
    prefix = adapted.host.anatomy.layers[0].attention.prefix
    for name in ("key", "value"):
        child = prefix.parametrizations[name][0]
        assert torch.equal(getattr(prefix, name) != 0, child.owned)


def test_what_cannot_be_is_refused():
    with pytest.raises(StateError, match=r"adapted\.calibrate"):
        train(attached(calibrate=False), batch("bert"))
    for options in ({"density": 1.5}, {"rounds": 0}, {"steps": 0}, {"search_rate": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            peftlib.config("u_mam", **options)
    with pytest.raises(TargetError, match=r"density=1e-05 of .* entries is 0"):
        attached(density=1e-5, calibrate=False)
    with pytest.raises(MergeError, match="u_mam has no merge"):
        attached().merge()


FACTS = Facts(
    "u_mam",
    Default("length", 30, "that of the MAM adapter, jxhe/unify-parameter-efficient-tuning, exps/run_xsum.sh"),
    Default("bottleneck", 512, "that of the MAM adapter, exps/run_xsum.sh"),
    Default("scale", 4.0, "that of the MAM adapter, exps/run_xsum.sh"),
    Default("density", 0.1, "chosen here; no code is public"),
    Default("rounds", 2, "chosen here; no code is public"),
    Start("*.parallel_adapter.down.weight", kaiming_uniform(), "that of the MAM adapter, petl/petl_factory.py"),
    Start("*.parallel_adapter.up.weight", zeros(), "that of the MAM adapter, petl/petl_factory.py"),
    Start(
        "*.prefix.key",
        normal(0.02),
        "petl/petl_factory.py, init_bert_weights of prefixes without an MLP",
        {"length": 64},
    ),
    Count("roberta-base", 1_000_550, "a tenth of the MAM adapter's entries; the share is chosen here"),
    Count("t5-base", 2_056_396, "a tenth of the MAM adapter's entries"),
    Count("llama-7b", 14_222_950, "a tenth of the MAM adapter's entries"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
