"""Figures show what they are given."""

from __future__ import annotations

import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import FancyBboxPatch

from peftlib import taxonomy
from peftlib.report import Standings, figures, pages

from .stored import TRAINED, make


def boxes(figure) -> dict[str, bool]:
    """Label of each box in a diagram of sites -> whether it is coloured."""
    (axes,) = figure.axes
    patches = [p for p in axes.patches if isinstance(p, FancyBboxPatch)][1:]
    labels = [box[4] for box in figures._BOXES.values()]
    found: dict[str, bool] = {}
    for label, patch in zip(labels, patches, strict=True):
        coloured = patch.get_facecolor()[3] > 0 and to_hex(patch.get_facecolor()) == figures.TOUCHED
        found[label] = coloured or found.get(label, False)
    return found


def coloured(method: str) -> set[str]:
    return {label for label, hit in boxes(figures.sites_diagram(method)).items() if hit}


def test_diagram_colours_the_sites_and_no_others():
    assert coloured("lora") == {"query", "value"}
    assert coloured("ia3") == {"key", "value", "down"}
    assert coloured("prompt_tuning") == {"embeddings"}
    assert coloured("head") == {"task head"}
    assert coloured("hadamard_adapter") == {"output", "norm"}
    assert {"query", "key", "value", "output", "up", "gate", "down"} <= coloured("full")


@pytest.mark.parametrize("entry", taxonomy.METHODS, ids=lambda e: e.name)
def test_every_method_has_a_diagram_that_shows_something(entry):
    shows = coloured(entry.name) or set(entry.sites) & {"biases", "layers"}
    assert shows


def test_svg_is_the_same_each_time():
    first, second = (pages.svg(figures.sites_diagram("lora")) for _ in range(2))
    assert first == second
    assert b"<svg" in first


def test_tree_names_and_marks_every_method():
    (axes,) = figures.taxonomy_tree().axes
    texts = {text.get_text() for text in axes.texts}
    survey = [e for e in taxonomy.METHODS if e.category != "baselines"]
    assert {e.title for e in survey} <= texts
    filled = [line for line in axes.lines if line.get_marker() == "o" and line.get_markerfacecolor() != "none"]
    assert len(filled) == len(survey)


@pytest.fixture
def standings(tmp_path) -> Standings:
    return Standings(make(tmp_path), "embedded")


def test_quality_has_a_point_and_a_name_for_each_row(standings):
    rows = standings.rows["few-shot"]
    (axes,) = figures.quality_against_parameters(rows).axes
    assert axes.get_xscale() == "log"
    assert {t.get_text() for t in axes.texts} == set(TRAINED)
    points = {(float(c[0].get_xdata()[0]), round(float(c[0].get_ydata()[0]), 6)) for c in axes.containers}
    assert points == {(float(row["trained"]), round(row["mean"], 6)) for row in rows}
    references = [line for line in axes.lines if list(line.get_xdata()) == [0, 1]]
    assert sorted(line.get_ydata()[0] for line in references) == sorted(
        row["mean"] for row in rows if row["method"] in ("full", "head")
    )
    assert "3 seeds" in axes.get_ylabel()


def test_a_figure_without_runs_says_so():
    (axes,) = figures.quality_against_parameters([]).axes
    assert [t.get_text() for t in axes.texts] == ["no stored runs"]


def test_search_marks_the_chosen_rate(standings):
    figure = figures.learning_rate_search(standings.search)
    shown = [axes for axes in figure.axes if axes.get_title()]
    assert {axes.get_title() for axes in shown} == set(TRAINED)
    for axes in shown:
        line, best = axes.lines
        assert list(line.get_xdata()) == [5e-4, 2e-3]
        assert list(best.get_xdata()) == [2e-3]


def test_loss_curves_are_the_history(standings):
    (axes,) = figures.loss_curves(standings.search[:1]).axes
    (line,) = axes.lines
    assert list(zip(line.get_xdata(), line.get_ydata())) == [(10, 0.7), (20, 0.5)]


def test_names_do_not_cover_each_other_or_points():
    """Forty methods, many of them close together."""
    names = taxonomy.methods()[:40]
    rows = [
        {"method": name, "trained": 10 ** (3 + n % 5), "mean": 0.7 + 0.004 * (n % 9), "std": 0.002, "seeds": [0, 1]}
        for n, name in enumerate(names)
    ]
    figure = figures.quality_against_parameters(rows)
    (axes,) = figure.axes
    figure.draw_without_rendering()
    extents = [text.get_window_extent() for text in axes.texts]
    covered = [(a, b) for n, a in enumerate(extents) for b in extents[:n] if a.overlaps(b)]
    assert len(extents) == 40
    assert not covered
