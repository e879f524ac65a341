"""Costs as tables, figure and page, from stored measurements."""

import pytest

import peftlib
from peftlib.efficiency import bench, memory, speed
from peftlib.experiments import read_costs, write_costs
from peftlib.report import cost_figure, memory_rows, pages, step_rows, variant_rows

OPTIONS = {"backbone": "tiny-bert", "batch_size": 2, "length": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    write_costs("memory", "tiny-bert", memory.compare(("lora", "fish_mask", "full"), **OPTIONS), root)
    write_costs("step", "tiny-bert", bench.compare(("lora",), turns=1, **OPTIONS), root)
    return read_costs("memory", "tiny-bert", root), read_costs("step", "tiny-bert", root)


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    root = tmp_path_factory.mktemp("variants")
    write_costs("variants", "tiny-bert", speed.compare_known(["coda"], turns=1, **OPTIONS), root)
    return read_costs("variants", "tiny-bert", root)


def test_rows_are_in_the_taxonomy_s_order_and_say_what_was_measured(stored):
    of_memory, of_steps = stored
    rows = {row["method"]: row for row in memory_rows(of_memory)}
    assert list(rows) == sorted(rows, key=peftlib.methods().index)
    assert rows["full"]["before training"] == ""
    assert float(rows["fish_mask"]["before training"]) > 0
    assert float(rows["lora"]["optimizer"]) == pytest.approx(2 * float(rows["lora"]["gradients"]), abs=0.1)
    steps = step_rows(of_steps)
    assert [row["method"] for row in steps] == ["lora", "lora, all linear"]
    assert steps[0]["x floor"] == f"{of_steps['lora']['ours']['ratio']:.2f}"
    assert steps[0]["HF peft x floor"]


def test_the_figure_shows_each_measurement(stored):
    left, right = cost_figure(*stored).axes
    assert len(left.patches) == 3
    assert [label.get_text() for label in left.get_yticklabels()] == ["fish_mask", "lora", "lora, all linear", "full"]
    assert len([line for line in right.lines if line.get_marker() == "o"]) == 4
    assert "no stored measurements" in cost_figure({}, {}).axes[0].texts[0].get_text()
    assert [len(axes.texts) for axes in cost_figure(stored[0], {}).axes] == [0, 1]


def test_variants_stand_beside_the_first_of_their_method(variants):
    rows = variant_rows(variants)
    for names, mine in (("coda", rows[:4]), ("coda, training", rows[4:])):
        assert [row["method"] for row in mine] == [f"{names}, n/k = {ratio}" for ratio in (1, 2, 3, 5)]
        assert mine[0]["x FLOPs"] == mine[0]["x time"] == "1.00"
        shares = [float(row["x FLOPs"]) for row in mine]
        assert shares == sorted(shares, reverse=True)
        assert shares[-1] < 0.6


def test_the_page_links_cards_and_says_what_is_missing(stored, variants):
    page = pages.costs_page(*stored, variants)
    assert "| [coda, n/k = 3](cards/coda.md) |" in page
    assert "| [lora, all linear](cards/lora.md) |" in page
    assert f"| {memory_rows(stored[0])[0]['training']} |" in page
    assert pages.costs_page({}, {}, {}).count("No stored measurements.") == 3
