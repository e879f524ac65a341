"""What chapters show in place: a method's source, its counts, a table of runs."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterable
from typing import Any

from IPython.display import HTML, Markdown

from peftlib.methods.registry import find
from peftlib.report.rendering import render


def source(name: str) -> Markdown:
    """A method's file as it stands in the library (of a package ``method.py`` and ``layer.py``), or any module below
    ``peftlib`` by its dotted name."""
    modules = [name if "." in name else find(name).__module__]
    package, _, file = modules[0].rpartition(".")
    if file == "method" and importlib.util.find_spec(f"{package}.layer"):
        modules.append(f"{package}.layer")
    texts = [inspect.getsource(importlib.import_module(module)).rstrip() for module in modules]
    return Markdown("\n\n".join(f"```python\n{text}\n```" for text in texts))


def table(rows: Iterable[dict[str, Any]]) -> HTML:
    """Rows with the same keys as an HTML table that scrolls sideways on a narrow screen."""
    return HTML(render("table.html.j2", rows=list(rows)))


def comparison(records: Iterable[dict[str, Any]]) -> HTML:
    """Run records side by side: quality, sizes and cost, best test metric first."""
    records = list(records)
    metric = records[0]["metric"]
    rows = [
        {
            "method": r["spec"]["method"],
            f"test {metric}": f"{r['metrics']['test'][metric]:.3f}",
            "trained": f"{r['count']['trained']:,}",
            "of which head": f"{r['count']['head']:,}",
            "% of backbone": f"{r['count']['percent']:.3f}",
            "saved, kB": f"{r['bytes_on_disk'] / 1000:,.0f}",
            "ms a step": f"{1000 * r['seconds_per_step']:.0f}",
            "learning rate": f"{r['spec']['learning_rate']:g}",
        }
        for r in sorted(records, key=lambda r: -r["metrics"]["test"][metric])
    ]
    return table(rows)
