"""README.md shows the stored runs of today."""

from pathlib import Path

from peftlib.experiments import Store
from peftlib.report import pages

ROOT = Path(__file__).resolve().parents[2]


def test_the_figure_is_drawn_from_the_stored_runs():
    drawn = pages.quality_figure(Store(ROOT / "results"))
    stored = (ROOT / "results/quality.svg").read_bytes()
    assert drawn == stored, "the store has changed: peftlib results --figure results/quality.svg"
