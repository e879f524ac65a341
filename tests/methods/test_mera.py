"""MerA: what a permutation of neurons does, by weights and by activations; sums, averages, tracks."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch

import peftlib
from peftlib.conformance.case import backbone, batch, inputs, logits
from peftlib.errors import UnknownNameError
from peftlib.methods.additive.adapters.mera import transport_plan
from peftlib.methods.base import ConfigError
from tests.methods.facts import Count, Default, Facts, Trains
from tests.methods.helpers import perturb

KINDS = {"adapter_drop": {"robust": False}, "parallel_adapter": {}, "residual_adapter": {}, "sequential_adapter": {}}


def adapter(seed, method="adapter_drop"):
    adapted = peftlib.attach(backbone("bert"), method, seed=seed, bottleneck=6, **KINDS[method])
    perturb(adapted, seed=seed)
    return replace(adapted.snapshot(), name=f"task{seed}")


def permuted(source, seed=0):
    """The same adapter with its neurons in another order at each place."""
    generator, state = torch.Generator().manual_seed(seed), dict(source.state)
    for place in [n.removesuffix("down.weight") for n in state if n.endswith("down.weight")]:
        order = torch.randperm(6, generator=generator)
        for name in ("down.weight", "down.bias"):
            state[place + name] = state[place + name][order]
        state[place + "up.weight"] = state[place + "up.weight"][:, order]
    return replace(source, name=f"{source.name} permuted", state=state)


def merged(sources, **options):
    adapted = peftlib.attach(backbone("bert"), "mera", sources=sources, **options)
    adapted.calibrate([batch("bert")])
    return adapted, adapted.snapshot().own


@pytest.mark.parametrize("align", ["weights", "activations"])
@pytest.mark.parametrize("method", KINDS)
def test_averaging_undoes_a_permutation_exactly(method, align):
    source = adapter(0, method)
    adapted, own = merged([source, permuted(source)], align=align)
    assert own.keys() == source.own.keys()
    assert all(torch.equal(t, source.state[n]) for n, t in own.items())
    for name in adapted.head_names:
        adapted.trainable()[name].data.copy_(source.state[name])
    alone = peftlib.load(backbone("bert"), source)
    assert torch.equal(logits(adapted.model, **inputs("bert")), logits(alone.model, **inputs("bert")))


def test_without_alignment_a_permutation_is_not_undone():
    source = adapter(0)
    _, own = merged([source, permuted(source)], align="none")
    assert not all(torch.allclose(t, source.state[n], atol=1e-2) for n, t in own.items())
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, (source.state[name] + permuted(source).state[name]) / 2)


def test_the_plan_is_the_cheapest_permutation():
    torch.manual_seed(0)
    a, b = torch.randn(5, 3), torch.randn(5, 3)
    found = transport_plan(a, b)
    assert torch.equal(found.sum(0), torch.ones(5))
    assert set(found.flatten().tolist()) == {0.0, 1.0}
    cost = torch.cdist(a, b).square()
    best = min(float(sum(cost[i, j] for i, j in enumerate(order))) for order in permutations(range(5)))
    assert float((found * cost).sum()) == pytest.approx(best, rel=1e-5)


def test_a_sum_is_the_average_times_the_number_of_sources():
    sources = [adapter(seed) for seed in range(3)]
    (_, mean), (_, total) = merged(sources), merged(sources, merging="sum")
    for name in mean:
        torch.testing.assert_close(3 * mean[name], total[name])


def test_activations_and_weights_can_disagree():
    sources = [adapter(seed) for seed in range(2)]
    (_, one), (_, other) = merged(sources), merged(sources, align="activations")
    assert any(not torch.equal(one[n], other[n]) for n in one)


def test_only_sources_of_the_targets_track_are_merged():
    sources = [adapter(seed) for seed in range(3)]
    _, own = merged(sources, tracks=("pairs", "sentiment", "pairs"), track="pairs")
    _, expected = merged([sources[0], sources[2]])
    assert all(torch.equal(t, expected[n]) for n, t in own.items())
    with pytest.raises(ConfigError, match="1 sources are of track 'sentiment'"):
        merged(sources, tracks=("pairs", "sentiment", "pairs"), track="sentiment")
    with pytest.raises(ConfigError, match="2 tracks were given for 3 sources"):
        merged(sources, tracks=("pairs", "pairs"), track="pairs")
    with pytest.raises(ConfigError, match="needs both"):
        peftlib.config("mera", track="pairs")


def test_what_does_not_fit_is_named():
    with pytest.raises(UnknownNameError, match="align 'weight'"):
        peftlib.config("mera", align="weight")
    with pytest.raises(ConfigError, match="sources of one method, and 'task0' has method='adapter_drop'"):
        merged([adapter(0), adapter(1, "parallel_adapter")])


FACTS = Facts(
    "mera",
    Default("align", "weights", "the abstract names optimal transport; on weights: chosen here"),
    Default("merging", "average", "chosen here; no code is public"),
    Default("track", "", "the abstract's same-track setting is an option"),
    Trains(("*.adapter_drop.down.*", "*.adapter_drop.up.*"), "the abstract: one adapter, as a source has it"),
    Count("roberta-base", 894_528, "that of one source, Pfeiffer's adapter at r = 48"),
    Count("t5-base", 1_789_056, "that of one source"),
    Count("llama-7b", 12_715_520, "that of one source"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
