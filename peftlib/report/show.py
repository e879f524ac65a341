"""What chapters show in place: a method's source, its counts, a table of runs."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from typing import Any

from IPython.display import HTML, Markdown

from peftlib import taxonomy
from peftlib.report.rendering import render


def source(name: str) -> Markdown:
    """A method's file as it stands in the library, or the files of its package, ``method.py`` first. A dotted name is
    any module below ``peftlib``."""
    modules = [importlib.import_module(name if "." in name else taxonomy.entry(name).module)]
    if "." not in name and hasattr(modules[0], "__path__"):
        parts = sorted((part.name for part in pkgutil.iter_modules(modules[0].__path__)), key=lambda n: n != "method")
        modules = [importlib.import_module(f"{modules[0].__name__}.{part}") for part in parts]
    return Markdown("\n\n".join(f"```python\n{inspect.getsource(module).rstrip()}\n```" for module in modules))


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
