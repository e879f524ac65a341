"""SAM: which entries are chosen, tensor by tensor or over all, and how many."""

from __future__ import annotations

import pytest
import torch

import peftlib
from peftlib.conformance.case import backbone, batch, train
from peftlib.errors import ConfigError, TargetError
from peftlib.methods.partial.delta_weight_masking.sam import shares


def parts(family: str, count: int = 4) -> list[dict]:
    data = batch(family)
    return [{k: v[i : i + 8 // count] for k, v in data.items()} for i in range(0, 8, 8 // count)]


def attached(family: str = "bert", count: int = 4, **options) -> peftlib.Adapted:
    adapted = peftlib.attach(backbone(family), "sam", **{"density": 0.02, **options})
    adapted.calibrate(parts(family, count))
    return adapted


def summed(family: str, batches: int = 4) -> dict[str, torch.Tensor]:
    """Sums of the batches' gradients, by backward passes that accumulate."""
    model = backbone(family)
    for part in parts(family)[:batches]:
        model(**part).loss.backward()
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in model.named_parameters()
        if any(p is q for q in model.base_model.parameters())
    }


def masks(adapted: peftlib.Adapted) -> dict[str, torch.Tensor]:
    children = adapted.method.children
    return {
        n: children[n].owned if n in children else torch.zeros(p.shape, dtype=torch.bool)
        for n, p in adapted.method.candidates.items()
    }


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "t5"])
def test_in_each_tensor_its_share_of_the_largest_summed_gradients(family):
    adapted, found = attached(family), summed(family)
    chosen = masks(adapted)
    assert chosen.keys() == found.keys()
    total = sum(g.numel() for g in found.values())
    assert adapted.count().method == sum(int(m.sum()) for m in chosen.values()) == int(0.02 * total)
    for name, mask in chosen.items():
        kept, size = int(mask.sum()), mask.numel()
        assert abs(kept - 0.02 * size) < 1
        score = found[name].square()
        if kept and score.max() > 1e-12:
            # Beyond rounding of the sums, no entry outside is larger than one inside.
            assert score[mask].min() >= score[~mask].max() * (1 - 1e-3)


def test_over_all_tensors_the_largest_win():
    adapted, found = attached(scope="all"), summed("bert")
    mask = torch.cat([m.flatten() for m in masks(adapted).values()])
    score = torch.cat([g.square().flatten() for g in found.values()])
    assert int(mask.sum()) == adapted.count().method == int(0.02 * mask.numel())
    assert score[mask].min() >= score[~mask].max() * (1 - 1e-3)


def test_gradients_are_added_before_they_are_squared():
    # Fisher's sum of squares takes other entries.
    fisher = peftlib.attach(backbone("bert"), "fish_mask", density=0.02, charge_head=False)
    fisher.calibrate(parts("bert"))
    sums = attached(scope="all", density=fisher.count().method / attached().method.entries)
    assert any(
        not torch.equal(child.indices, sums.method.children[n].indices)
        for n, child in fisher.method.children.items()
        if n in sums.method.children
    )


def test_it_reads_no_more_batches_than_it_is_told():
    told, given = attached(batches=2), peftlib.attach(backbone("bert"), "sam", density=0.02)
    given.calibrate(parts("bert")[:2])
    assert all(torch.equal(m, masks(given)[n]) for n, m in masks(told).items())


def test_masked_entries_stay_with_weight_decay_and_momentum():
    adapted, plain = attached(), backbone("bert")
    chosen = masks(adapted)
    train(adapted, batch("bert"), steps=5, rate=0.05, weight_decay=0.5)
    adapted.model(**batch("bert"))
    moved = 0
    for name, tensor in adapted.method.candidates.items():
        changed = tensor != plain.get_parameter(name)
        assert not (changed & ~chosen[name]).any()
        moved += int(changed.sum())
    assert moved > 0.9 * adapted.count().method


def test_shares_add_up_and_are_within_one_of_the_exact_ones():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        sizes = torch.randint(1, 5000, (20,), generator=generator).tolist()
        k = int(torch.randint(0, sum(sizes) + 1, (), generator=generator))
        counts = shares(sizes, k)
        assert sum(counts) == k
        assert all(abs(c - k * s / sum(sizes)) < 1 and c <= s for c, s in zip(counts, sizes))


def test_bad_settings():
    for options in ({"density": 0}, {"scope": "layer"}, {"batches": 0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            attached(**options)
    with pytest.raises(TargetError, match="it must be a number from 1"):
        attached(density=1e-7)
