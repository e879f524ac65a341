"""The search over AutoPEFT's structures: its space, what it proposes, its log, and a search that was cut off."""

import dataclasses
import itertools
import json
import sys

import numpy as np
import pytest
import torch
from filelock import FileLock

import peftlib
from peftlib import backbones, cli, experiments, taxonomy
from peftlib.errors import DataError, StateError, UnsupportedError
from peftlib.experiments import Log, SearchSpec, Space, read_log, search
from peftlib.report import pareto_rows, search_figure, search_rows, structure_means, structure_rows

from ..project import ROOT

TINY = Space(32, 2)


def points(space, count, seed=0):
    generator = np.random.default_rng(seed)
    return [space.sample(generator) for _ in range(count)]


def parameters(options):
    """By the card's formula."""
    return taxonomy.entry("autopeft").trained(L=2, d=32, **options)


def fake(run):
    """Adapters in the last layer are worth something, with decreasing returns; all else is worth little."""
    o = run.options
    score = 0.55 + 0.4 * o["layers"][1] * (1 - np.exp(-(o["serial"] + o["parallel"]) / 6))
    metrics = {"validation": {"accuracy": float(score)}, "test": {"accuracy": float(score) - 0.01}}
    return {"metric": "accuracy", "metrics": metrics, "count": {"trained": parameters(o) + 7, "head": 7}}


def spec(strategy="random", **options):
    return SearchSpec("smoke", "smoke", strategy, **({"initial": 4} | options))


def found(log):
    return [(t["point"], t["by"], t["score"], t["parameters"]) for t in log.trials]


# The space


def test_sizes_halve_from_the_width_to_one_and_none():
    assert Space(768, 12).sizes == (768, 384, 192, 96, 48, 24, 12, 6, 3, 1, 0)
    assert Space(384, 6).sizes == (384, 192, 96, 48, 24, 12, 6, 3, 1, 0)


def test_parameters_are_those_of_the_attached_structure():
    shapes = backbones.load("tiny-bert", head="classification").model
    for point in points(TINY, 6):
        adapted = peftlib.attach(shapes, "autopeft", **TINY.options(point))
        assert adapted.count().method == TINY.parameters(torch.tensor(point)) == parameters(TINY.options(point))
        adapted.detach()


def test_all_that_is_drawn_is_valid_and_everything_is_drawn():
    small = Space(2, 1)  # sizes 2, 1, 0
    drawn = set(points(small, 600))
    assert drawn == {p for p in itertools.product(range(3), range(3), range(3), range(2)) if small.valid(p)}
    assert len(drawn) == 26


def test_thrift_is_one_for_the_smallest_structure_and_zero_for_the_largest():
    none = len(TINY.sizes) - 1
    values = TINY.thrift(torch.tensor([(0, 0, 0, 1, 1), (none, none, none - 1, 0, 1), (0, none, none, 0, 1)]))
    assert values[:2].tolist() == pytest.approx([0.0, 1.0])
    assert 0 < values[2] < 1
    assert TINY.parameters(torch.tensor((none, none, none - 1, 0, 1))) == 64


# The Pareto set


def trials(*pairs):
    made = []
    for point, score in pairs:
        size = int(TINY.parameters(torch.tensor(point)))
        options = TINY.options(point)
        made.append({"point": list(point), "options": options, "score": score, "test": score, "parameters": size})
    return made


def test_the_pareto_set_is_what_no_other_beats_and_its_volume_what_it_dominates():
    generator = np.random.default_rng(3)
    for seed in range(5):
        pairs = [(p, float(generator.uniform(0.4, 1))) for p in points(TINY, 12, seed)]
        log = Log(spec(), TINY, {}, trials(*pairs))
        beaten = [
            any(
                o["score"] >= t["score"]
                and o["parameters"] <= t["parameters"]
                and (o["score"], o["parameters"]) != pair
                for o in log.trials
                for pair in [(t["score"], t["parameters"])]
            )
            for t in log.trials
        ]
        assert {str(t["point"]) for t in log.pareto()} == {str(t["point"]) for t, b in zip(log.trials, beaten) if not b}
        # The area of a union of rectangles, on the grid that their corners make.
        boxes = [(float(TINY.thrift(torch.tensor(t["point"]))), max(0.0, 2 * t["score"] - 1)) for t in log.trials]
        widths, heights = (sorted({0.0, *side}) for side in zip(*boxes))
        area = sum(
            (w - w0) * (h - h0)
            for w0, w in itertools.pairwise(widths)
            for h0, h in itertools.pairwise(heights)
            if any(w <= x + 1e-12 and h <= y + 1e-12 for x, y in boxes)
        )
        assert log.hypervolume() == pytest.approx(area)
        assert log.hypervolume(4) <= log.hypervolume(8) <= log.hypervolume()


# The search


def test_a_random_search_draws_each_structure_once(tmp_path):
    log = search(spec(), 30, tmp_path, progress=False, evaluate=fake)
    assert len({tuple(t["point"]) for t in log.trials}) == len(log.trials) == 30
    assert all(TINY.valid(tuple(t["point"])) and t["by"] == "random" for t in log.trials)
    again = read_log(tmp_path / log.spec.path)
    assert again == log
    assert again.provenance["versions"]["torch"] and again.provenance["date"]


def test_the_first_trials_are_those_of_the_random_search_and_are_not_trained_again(tmp_path):
    calls = []

    def counted(run):
        calls.append(run.key)
        return fake(run)

    random = search(spec(), 6, tmp_path, progress=False, evaluate=counted)
    bayesian = search(spec("bayesian"), 6, tmp_path, progress=False, evaluate=counted)
    assert found(bayesian)[:4] == found(random)[:4]
    assert [t["seconds"] for t in bayesian.trials[:4]] == [t["seconds"] for t in random.trials[:4]]
    assert len(calls) == len(set(calls)) <= 8


def test_a_model_leads_to_better_structures_than_chance(tmp_path):
    def volume(strategy, seed):
        given = spec(strategy, seed=seed, batch=2)
        return search(given, 12, tmp_path, progress=False, evaluate=fake).hypervolume()

    volumes = {strategy: [volume(strategy, seed) for seed in (0, 1)] for strategy in ("random", "bayesian")}
    assert sum(volumes["bayesian"]) > sum(volumes["random"]) + 0.05
    log = read_log(tmp_path / spec("bayesian").path)
    assert [t["by"] for t in log.trials] == 4 * ["random"] + 8 * ["gp"]
    assert all(TINY.valid(tuple(t["point"])) for t in log.trials)
    assert len({tuple(t["point"]) for t in log.trials}) == 12


def test_the_other_model_proposes_too(tmp_path):
    log = search(spec("bayesian", surrogate="saas", batch=1), 5, tmp_path, progress=False, evaluate=fake)
    assert [t["by"] for t in log.trials] == 4 * ["random"] + ["saas"]


@pytest.mark.parametrize(("strategy", "at"), [("random", 2), ("bayesian", 5)])
def test_a_search_that_was_cut_off_goes_on_to_the_same_end(tmp_path, strategy, at):
    """Cut in the middle of a batch, and in the middle of the line that is being written."""
    given = spec(strategy, batch=2)
    whole = search(given, 6, tmp_path / "whole", progress=False, evaluate=fake)
    calls = []

    def cut(run):
        calls.append(run)
        if len(calls) > at:
            raise KeyboardInterrupt
        return fake(run)

    with pytest.raises(KeyboardInterrupt):
        search(given, 6, tmp_path, progress=False, evaluate=cut)
    path = tmp_path / given.path
    before = path.read_bytes()
    assert len(read_log(path).trials) == at
    path.write_bytes(before + b'{"point": [1, 2')
    assert len(read_log(path).trials) == at
    again = search(given, 6, tmp_path, progress=False, evaluate=fake)
    assert found(again) == found(whole)
    assert path.read_bytes().startswith(before)
    assert found(read_log(path)) == found(whole)


def test_a_log_is_of_one_search(tmp_path):
    log = search(spec(), 2, tmp_path, progress=False, evaluate=fake)
    with pytest.raises(StateError, match="other settings"):
        search(spec(learning_rate=0.5), 3, tmp_path, progress=False, evaluate=fake)
    path = tmp_path / log.spec.path
    with (
        FileLock(tmp_path / "search" / ".locks" / "smoke-smoke-autopeft-random-0.lock"),
        pytest.raises(StateError, match="another process"),
    ):
        search(spec(), 3, tmp_path, progress=False, evaluate=fake)
    path.write_text("{}\n")
    with pytest.raises(DataError, match="not the log of a search"):
        read_log(path)


def test_what_cannot_be_is_refused(tmp_path, monkeypatch):
    with pytest.raises(peftlib.ConfigError, match="strategy='grid'"):
        spec("grid")
    with pytest.raises(peftlib.ConfigError, match="surrogate='forest'"):
        spec(surrogate="forest")
    with pytest.raises(UnsupportedError, match="encoders, and tiny-gpt2 has decoder"):
        search(spec(changes={"backbone": "tiny-gpt2"}), 1, tmp_path, progress=False, evaluate=fake)
    monkeypatch.setitem(sys.modules, "peftlib.experiments.bayesian", None)
    monkeypatch.delattr(experiments, "bayesian", raising=False)
    with pytest.raises(UnsupportedError, match=r"peftlib\[search\]"):
        search(spec("bayesian"), 5, tmp_path, progress=False, evaluate=fake)


def test_the_command_trains_and_reports(tmp_path, capsys):
    command = ["search", "autopeft", "--profile", "smoke", "--strategy", "random", "--results", str(tmp_path)]
    command += ["--seeds", "0", "1"]
    assert cli.main([*command, "--trials", "2"]) == 0
    found = experiments.logs(tmp_path)
    assert [log.spec.seed for log in found] == [0, 1]
    assert capsys.readouterr().out.count("dominated share of outcomes") == 2
    for trial in (trial for log in found for trial in log.trials):
        assert 0 <= trial["score"] <= 1 and trial["parameters"] == parameters(trial["options"])
    assert cli.main([*command, "--trials", "2"]) == 0
    assert experiments.logs(tmp_path) == found


# Structures of S3Delta, tables and figures


def test_stored_searches_beat_chance_at_equal_cost():
    """The claim of AutoPEFT's paper, on the stored logs."""
    stored = {(log.spec.strategy, log.spec.seed): log for log in experiments.logs(ROOT / "results")}
    seeds = {seed for strategy, seed in stored if strategy == "bayesian"}
    assert len(seeds) >= 2
    for seed in seeds:
        searched, chance = stored["bayesian", seed], stored["random", seed]
        assert len(searched.trials) == len(chance.trials)
        assert searched.hypervolume() > chance.hypervolume()
        assert searched.hypervolume(split="test") > chance.hypervolume(split="test")


def test_stored_searches_of_s3delta_beat_random_structures_at_equal_cost():
    """Over the best of those that the search's time pays for, and over one with as many parameters."""
    stored = experiments.Store(ROOT / "results/search").records("embedded", "few-shot")
    _, *random = structure_means(stored)
    assert [row["structure"] for row in random] == ["best random at its cost", "a random one"]
    for row in random:
        difference, error = map(float, row["search over it"].split(" ± "))
        assert row["seeds"] == len({record["spec"]["seed"] for record in stored}) >= 40
        assert difference > 2 * error


def test_searched_and_random_structures_share_all_but_the_structure():
    specs, slower = (
        experiments.structure_specs("smoke", "smoke", [0, 1], 3, options={"budget": 0.03, "steps": steps})
        for steps in (6, 9)
    )
    kinds = [(s.seed, s.options["strategy"], s.options["draw"]) for s in specs]
    assert kinds == [(n, *kind) for n in (0, 1) for kind in (("search", 0), *(("random", i) for i in range(3)))]
    assert len({json.dumps(s.settings) for s in specs}) == 1
    assert {s.options["budget"] for s in specs} == {0.03}
    assert len({s.key for s in specs}) == 8
    assert [s.key == t.key for s, t in zip(specs, slower)] == 2 * [False, True, True, True]


def record(strategy, validation, test, loss=0.5, draw=0, budget=0.001, seed=0, batch_size=None):
    metrics = {"validation": {"accuracy": validation, "loss": loss}, "test": {"accuracy": test}}
    searching = {"order": 1, "steps": 40, "search_rate": 0.002, "search_batch_size": batch_size}
    options = {"strategy": strategy, "budget": budget, "draw": draw, **searching}
    spec = {"seed": seed, "options": options, "settings": {"batch_size": 16, "task_options": {"n_train": 256}}}
    spent = {"calibration_seconds": 9.0 * (strategy == "search"), "steps": 20, "seconds_per_step": 0.5}
    return {
        "spec": spec,
        "metric": "accuracy",
        "metrics": metrics,
        "count": {"trained": 15, "head": 5},
        **spent,
    }


def test_random_structures_that_cost_as_much_stand_beside_a_search_the_best_on_validation_data():
    records = [
        # A search that took 19 s with its own training pays for one of 10 s and nine tenths of the next one; the third
        # is the best and comes too late.
        record("random", 0.9, 0.95, draw=2),
        record("search", 0.7, 0.65),
        *(record("random", v, t, loss, draw) for v, t, loss, draw in ((0.8, 0.6, 0.4, 1), (0.8, 0.9, 0.5, 0))),
    ]
    searched, best, mean = structure_rows(records)
    assert (searched["validation"], searched["test"], searched["parameters"]) == ("0.700", "0.650", "10")
    assert best["structure"] == "best of 1.9 random ones" and best["test"] == "0.630"
    assert mean["structure"] == "a random one, mean of 3" and mean["test"] == "0.817"
    assert [row["s"] for row in (searched, best, mean)] == ["19", "19", "10"]
    rows = structure_rows([*records, record("search", 0.6, 0.55, budget=0.0002)])
    assert [(row["budget"], row["test"]) for row in rows[:2]] == [("0.02 %", "0.550"), ("0.1 %", "0.650")]
    means = structure_means([*records, record("search", 0.6, 0.55, budget=0.0002)])
    assert [row["structure"] for row in means] == [
        "search: first order, 40 steps, batches of 16, rate 0.002",
        "best random at its cost",
        "a random one",
    ]
    assert [row["test"] for row in means] == ["0.650", "0.630", "0.817"]
    assert [row["search over it"] for row in means] == ["", "+0.020", "-0.167"]
    assert [row["s"] for row in means] == ["19", "19", "10"]
    assert {row["seeds"] for row in means} == {1}


def test_a_difference_is_taken_seed_by_seed():
    seeds = [(0.9, 0.7), (0.5, 0.4), (0.7, 0.7)]
    records = [
        record(strategy, 0.5, test, seed=n)
        for n, pair in enumerate(seeds)
        for strategy, test in zip(("search", "random"), pair)
    ]
    records += [record("random", 0.4, 0.1, draw=1, seed=n) for n in range(3)]
    searched, best, _ = structure_means(records)
    assert (searched["seeds"], searched["test"]) == (3, "0.700 ± 0.200")
    assert best["search over it"] == "+0.100 ± 0.058"


def test_tables_and_figure_show_the_logs(tmp_path):
    for strategy, seed in (("random", 0), ("random", 1)):
        search(spec(strategy, seed=seed), 8, tmp_path, progress=False, evaluate=fake)
    stored = experiments.logs(tmp_path)
    rows = pareto_rows(stored[0])
    assert [row["parameters"] for row in rows] == [f"{t['parameters']:,}" for t in stored[0].pareto()]
    assert rows[0]["layers"] == "".join(map(str, stored[0].pareto()[0]["options"]["layers"]))
    assert [row["hypervolume, validation"] for row in search_rows(stored)] == [
        f"{log.hypervolume():.3f}" for log in stored
    ]
    left, right = search_figure(stored).axes
    drawn = {tuple(xy) for line in left.lines for xy in zip(line.get_xdata(), line.get_ydata())}
    assert drawn == {(t["parameters"], t["score"]) for log in stored for t in log.trials}
    mean = next(line for line in right.lines if line.get_label() == "random, 2 seeds")
    assert list(mean.get_ydata()) == pytest.approx([sum(log.hypervolume(k) for log in stored) / 2 for k in range(1, 9)])
    (empty,) = search_figure([]).axes
    assert [t.get_text() for t in empty.texts] == ["no stored searches"]
    assert dataclasses.replace(stored[0], trials=[]).pareto() == []
