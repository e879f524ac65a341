"""The library in one figure: its rooms, as its imports show them."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import grimp
import matplotlib as mpl
import matplotlib.pyplot as plt
import networkx as nx
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from peftlib.report.figures import INK, STYLE

_PACKAGE = Path(__file__).resolve().parents[1]
_COLOURS = {"methods": "#2563eb", "mechanisms": "#0f766e", "taxonomy": "#b45309", "anatomy": "#b45309"}


@dataclass(frozen=True)
class Room:
    """A package or module right below ``peftlib``: what its docstring says first, how many files and lines it has, and
    the rooms that it imports, directly (``imports``) and, of these, those that no other one of them imports
    (``arrows``)."""

    name: str
    says: str
    files: int
    lines: int
    imports: tuple[str, ...]
    arrows: tuple[str, ...]


@lru_cache(maxsize=1)
def rooms() -> tuple[Room, ...]:
    """The rooms, each after those that it imports."""
    graph = grimp.build_graph("peftlib", cache_dir=None)
    names = {module.split(".")[1] for module in graph.modules if "." in module}
    found = nx.DiGraph()
    found.add_nodes_from(sorted(names))
    for module in sorted(graph.modules):
        for imported in graph.find_modules_directly_imported_by(module):
            here, there = (m.split(".")[1] if "." in m else "" for m in (module, imported))
            if here and there and here != there:
                found.add_edge(here, there)
    arrows = nx.transitive_reduction(found)
    order = list(nx.lexicographical_topological_sort(found.reverse()))
    return tuple(_room(name, sorted(found.successors(name)), sorted(arrows.successors(name))) for name in order)


def _room(name: str, imports: list[str], arrows: list[str]) -> Room:
    path = _PACKAGE / name
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    lines = sum(len(file.read_text().splitlines()) for file in files)
    document = ast.get_docstring(ast.parse((path / "__init__.py" if path.is_dir() else files[0]).read_text())) or ""
    return Room(name, _sentence(document), len(files), lines, tuple(imports), tuple(arrows))


def _sentence(text: str) -> str:
    """The first sentence of a docstring, on one line of Markdown."""
    line = " ".join(text.split("\n\n")[0].split()).partition(". ")[0].rstrip(".")
    return re.sub(r"(?::\w+:)?(``?)(.+?)\1", r"`\2`", line) + "."


def levels() -> dict[str, int]:
    """Room -> its height: one above the highest room that it imports."""
    height: dict[str, int] = {}
    for room in rooms():
        height[room.name] = 1 + max((height[name] for name in room.imports), default=-1)
    return height


@mpl.rc_context(STYLE)
def house() -> Figure:
    """Rooms as boxes, each above those that it imports; an arrow where an import is not implied by another one."""
    height = levels()
    rows: dict[int, list[Room]] = {}
    for room in rooms():
        rows.setdefault(height[room.name], []).append(room)
    widest = max(map(len, rows.values()))
    figure, axes = plt.subplots(figsize=(1.5 * widest + 0.4, 0.72 * len(rows) + 0.2))
    at = {
        room.name: (2.1 * (i - (len(row) - 1) / 2), 0.95 * y) for y, row in rows.items() for i, room in enumerate(row)
    }
    for room in rooms():
        x, y = at[room.name]
        colour = _COLOURS.get(room.name, INK)
        box = FancyBboxPatch((x - 0.85, y - 0.24), 1.7, 0.48, boxstyle="round,pad=0.04", ec=colour, fc="none", lw=1.3)
        axes.add_patch(box)
        axes.text(x, y + 0.07, room.name, ha="center", va="center", fontsize=9, weight="bold", color=colour)
        size = f"{room.files} file{'s' if room.files > 1 else ''}, {room.lines:,} lines"
        axes.text(x, y - 0.13, size, ha="center", va="center", fontsize=6.5)
        for name in room.arrows:
            below = at[name]
            near = height[room.name] - height[name] == 1
            axes.add_patch(
                FancyArrowPatch(
                    (x, y - 0.29),
                    (below[0], below[1] + 0.3),
                    arrowstyle="-|>",
                    mutation_scale=8,
                    color=INK,
                    alpha=0.7 if near else 0.4,
                    lw=0.9,
                    linestyle="-" if near else "--",
                    connectionstyle=f"arc3,rad={0.0 if near else 0.12}",
                )
            )
    axes.set_xlim(-1.05 * widest - 0.1, 1.05 * widest + 0.1)
    axes.set_ylim(-0.45, 0.95 * (len(rows) - 1) + 0.45)
    axes.axis("off")
    axes.set_position((0, 0, 1, 1))
    plt.close(figure)
    return figure
