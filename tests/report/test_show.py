"""What chapters show in place."""

from __future__ import annotations

from pathlib import Path

import peftlib
from peftlib import report, taxonomy
from peftlib.report import Standings

from .stored import make

ROOT = Path(peftlib.__file__).parents[1]


def test_source_is_the_file_of_the_library():
    shown = report.source("lora").data
    assert shown == f"```python\n{(ROOT / taxonomy.entry('lora').file).read_text().rstrip()}\n```"
    shown = report.source("propetl").data
    assert shown.index("class ProPETL(") < shown.index("class TopMask(") and shown.count("```python") == 2
    assert "class Bottleneck" in report.source("peftlib.mechanisms.bottleneck").data


def test_source_of_a_package_is_its_method_and_then_its_layer():
    folder = (ROOT / taxonomy.entry("ladder_side_tuning").file).parent
    files = ((folder / name).read_text().rstrip() for name in ("method.py", "layer.py"))
    assert report.source("ladder_side_tuning").data == "\n\n".join(f"```python\n{text}\n```" for text in files)


def test_table_escapes_and_aligns():
    html = report.table([{"name": "<a & b>", "count": "1,234"}, {"name": "c", "count": "5e-4"}]).data
    assert "&lt;a &amp; b&gt;" in html
    assert html.count('style="text-align:right"') == 2
    assert "overflow-x:auto" in html


def test_comparison_is_best_first(tmp_path):
    records = Standings(make(tmp_path), "embedded").search
    html = report.comparison(records).data
    assert "test accuracy" in html
    order = [html.index(f">{r['metrics']['test']['accuracy']:.3f}<") for r in records]
    values = [r["metrics"]["test"]["accuracy"] for r in records]
    assert [v for _, v in sorted(zip(order, values))] == sorted(values, reverse=True)
