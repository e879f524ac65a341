"""Pruning a trained change: exact budgets, the best groups, the search's rounds."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from peftlib.conformance.case import backbone, batch
from peftlib.mechanisms import pruning


@pytest.mark.parametrize("seed", range(8))
def test_best_groups_are_those_of_trying_all(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = (32 * torch.randint(1, 5, (9,), generator=generator)).tolist()
    scores = torch.rand(9, generator=generator).tolist()
    every = [c for n in range(10) for c in combinations(range(9), n)]
    for budget in range(0, sum(sizes) + 1, 32):
        fitting = [c for c in every if sum(sizes[i] for i in c) == budget]
        if not fitting:
            with pytest.raises(ValueError, match=str(budget)):
                pruning.best_groups(scores, sizes, budget)
            continue
        best = max(fitting, key=lambda c: sum(scores[i] for i in c))
        assert pruning.best_groups(scores, sizes, budget) == list(best)


def test_of_equal_groups_the_first_ones_win():
    assert pruning.best_groups([1.0] * 5, [2] * 5, 6) == [0, 1, 2]
    assert pruning.best_groups([0.0] * 5, [2] * 5, 6) == [0, 1, 2]


def test_reachable_is_the_largest_sum_that_fits():
    sizes = [48, 48, 80, 32]
    sums = {sum(c) for n in range(5) for c in combinations(sizes, n)}
    for most in range(230):
        assert pruning.reachable(sizes, most) == max(s for s in sums if s <= most)


def test_entries_that_are_out_stay_out_also_when_those_left_score_zero():
    scores = [torch.tensor([5.0, 0.0, -3.0]), torch.tensor([0.0, -4.0])]
    masks = [torch.tensor([False, True, True]), torch.tensor([True, False])]
    for budget, expected in ((1, [[0, 0, 1], [0, 0]]), (3, [[0, 1, 1], [1, 0]])):
        chosen = pruning.entries(scores, masks, budget)
        assert [c.int().tolist() for c in chosen] == expected


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_search_prunes_in_equal_ratios_and_leaves_nothing_behind(rounds):
    model = backbone("bert")
    plain = {n: t.clone() for n, t in model.state_dict().items()}
    parameters = [p for n, p in model.named_parameters() if n.startswith("bert") and n.endswith("bias")]
    total, asked, changed = sum(p.numel() for p in parameters), [], []

    def choose(scores, masks, budget):
        asked.append(budget)
        now = torch.cat([(p != plain[n]).flatten() for n, p in model.named_parameters() if n.endswith("bias")])
        changed.append(int(now.sum()) - 2)
        return pruning.entries(scores, masks, budget)

    data = [{k: v[i : i + 4] for k, v in batch("bert").items()} for i in (0, 4)]
    options = {"rate": 1e-2, "epochs": 3.0, "rounds": rounds, "beside": model.classifier.parameters()}
    masks = pruning.search(model, parameters, data, 100, choose, **options)
    assert sum(int(m.sum()) for m in masks) == 100
    assert asked == [round(total * (100 / total) ** (r / rounds)) for r in range(1, rounds + 1)]
    # In each round but the first only what the last one left has moved.
    assert all(now <= before for now, before in zip(changed[1:], asked))
    assert changed[0] > 0.9 * total
    assert all(torch.equal(t, plain[n]) for n, t in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())
