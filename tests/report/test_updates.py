"""What low-rank updates learned, as tables and figures, against what the methods themselves say."""

from dataclasses import replace

import pytest
import torch

import peftlib
from peftlib import report
from peftlib.conformance.case import batch, train
from peftlib.errors import StateError, UnsupportedError
from tests.methods.helpers import backbone, perturb

QUERY = "bert.encoder.layer.1.attention.self.query"


@pytest.mark.parametrize(
    ("method", "options", "first"),
    [
        ("adalora", {"rank": 4, "target_rank": 2, "initial_warmup": 0.1, "final_warmup": 0.3}, 4),
        ("increlora", {"target_rank": 3, "top": 2}, 1),
    ],
)
def test_ranks_over_time(method, options, first):
    adapted = peftlib.attach(backbone("bert"), method, **options)
    with pytest.raises(StateError, match=f"{method} has not changed a rank"):
        report.ranks_over_time(adapted)
    zeros: list[dict[str, int]] = []

    def look(step: int) -> None:
        zeros.append({str(s): int((u.singular != 0).sum()) for s, u in adapted.method.updates.items()})

    train(adapted, batch("bert"), 12, watch=[look])
    table = report.ranks_over_time(adapted)
    assert list(table.columns) == [str(site) for site in adapted.method.updates]
    assert table.index[0] == 0 and set(table.loc[0]) == {first}
    assert table.iloc[-1].to_dict() == adapted.method.ranks()
    assert table.iloc[-1].sum() == options["target_rank"] * len(adapted.method.updates)
    assert list(table.index) == sorted(set(table.index)) and len(table) > 2
    if method == "adalora":
        # What a step saw is the last entry at or before it; at the start all singular values are zero.
        assert all(zeros[step] == table.loc[:step].iloc[-1].to_dict() for step in range(1, 12))
    layers = report.ranks_over_time(adapted, by="layer")
    assert list(layers.columns) == ["encoder 0", "encoder 1"]
    assert layers.sum(axis=1).tolist() == table.sum(axis=1).tolist()
    (axes,) = report.rank_figure(adapted).axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [layers[name].tolist() for name in layers]


def test_scores_by_rank():
    adapted = peftlib.attach(backbone("bert"), "dylora", rank=3)
    perturb(adapted)

    def norm(now: peftlib.Adapted) -> float:
        return sum(float(u.delta().norm()) for u in now.method.updates.values())

    table = report.scores_by_rank(adapted, norm)
    assert table.index.tolist() == [1, 2, 3]
    for rank in (1, 2):
        with adapted.method.at_rank(rank):
            assert table.loc[rank, "score"] == norm(adapted)
    assert table.loc[3, "score"] == norm(adapted)  # left at its own rank
    several = report.scores_by_rank(adapted, lambda a: {"accuracy": 0.5, "loss": norm(a)}, ranks=[2])
    assert several.to_dict("index") == {2: {"accuracy": 0.5, "loss": table.loc[2, "score"]}}
    (axes,) = report.score_by_rank_figure(table).axes
    assert axes.lines[0].get_ydata().tolist() == table["score"].tolist()


@pytest.mark.parametrize(
    ("method", "options"), [("lora", {"rank": 3}), ("krona", {"factor": 8}), ("moelora", {"tasks": 2})]
)
def test_singular_values(method, options):
    adapted = peftlib.attach(backbone("bert"), method, **options)
    perturb(adapted)
    update = next(u for site, u in adapted.method.updates.items() if str(site) == QUERY)
    with adapted.task(0):
        table = report.singular_values(adapted)
    assert list(table.index) == [str(s) for s in adapted.method.updates]
    expected = torch.linalg.svdvals(update.delta().detach())[: len(table.columns)]
    torch.testing.assert_close(torch.tensor(table.loc[QUERY].tolist()), expected, rtol=1e-4, atol=1e-4)
    if method == "lora":
        assert list(table.columns) == [1, 2, 3]
        (axes,) = report.singular_value_figure(adapted).axes
        assert axes.lines[-1].get_ydata().tolist() == pytest.approx(table.mean().tolist())
    if method == "moelora":
        with adapted.task(1):
            assert not report.singular_values(adapted).equals(table)


def test_mixture_weights():
    sources = []
    for seed, name in enumerate(("sst2", "rte")):
        adapted = peftlib.attach(backbone("bert"), "lora", seed=seed)
        perturb(adapted, seed=seed)
        sources.append(replace(adapted.snapshot(), name=name))
    adapted = peftlib.attach(backbone("bert"), "lorahub", sources=sources, evaluations=6)
    with pytest.raises(StateError, match="lorahub has found no mixture yet"):
        report.mixture_weights(adapted)
    adapted.calibrate([batch("bert")])
    table = report.mixture_weights(adapted)
    assert table["weight"].to_dict() == dict(zip(("sst2", "rte"), adapted.method.weights.tolist()))
    (axes,) = report.mixture_figure(adapted).axes
    assert [bar.get_height() for bar in axes.patches] == table["weight"].tolist()

    adapted = peftlib.attach(backbone("bert"), "moelora", tasks=3, experts=4)
    table = report.mixture_weights(adapted)
    assert table.shape == (3, 4)
    (weights,) = adapted.method.weights().values() if adapted.config.shared_gate else [None]
    assert table.to_numpy() == pytest.approx(weights.numpy())


@pytest.mark.parametrize(
    ("view", "match"),
    [
        (report.ranks_over_time, "lora has no ranks that change while it trains; adalora and increlora do"),
        (lambda a: report.scores_by_rank(a, lambda a: 0.0), "lora has no other rank than its own"),
        (report.mixture_weights, "lora has no mixture"),
    ],
)
def test_other_methods_are_refused(view, match):
    with pytest.raises(UnsupportedError, match=match):
        view(peftlib.attach(backbone("bert"), "lora"))
    with pytest.raises(UnsupportedError, match="bitfit has no low-rank update"):
        report.singular_values(peftlib.attach(backbone("bert"), "bitfit"))
