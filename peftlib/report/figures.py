"""Figures of the book, as functions that chapters and pages share. Each returns a matplotlib figure.

Colours are readable on a light and on a dark page; text takes a mid grey that both allow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from peftlib import taxonomy

INK, TOUCHED, ADDED, PLAIN = "#6b7280", "#d97706", "#0f766e", "#9ca3af"
CLASSES = {
    "additive": "#0f766e",
    "partial": "#7c3aed",
    "reparameterized": "#2563eb",
    "hybrid": "#be185d",
    "unified": "#b45309",
    "baselines": "#6b7280",
}
STYLE = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": PLAIN,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "svg.hashsalt": "peftlib",
}


def _figure(width: float, height: float, **more) -> tuple[Figure, Any]:
    return plt.subplots(figsize=(width, height), **more)


#: The parts of one layer: site -> (x, y, width, height, label), in units of the drawing.
_BOXES: dict[str, tuple[float, float, float, float, str]] = {
    "embeddings": (0.0, 1.1, 1.1, 0.8, "embeddings"),
    "attention.query": (2.0, 2.0, 0.85, 0.6, "query"),
    "attention.key": (2.0, 1.2, 0.85, 0.6, "key"),
    "attention.value": (2.0, 0.4, 0.85, 0.6, "value"),
    "attention.heads": (3.15, 0.9, 0.85, 1.2, "heads"),
    "attention.output": (4.3, 1.2, 0.85, 0.6, "output"),
    "norms": (5.45, 1.2, 0.7, 0.6, "norm"),
    "ffn.gate": (6.75, 2.0, 0.75, 0.6, "gate"),
    "ffn.up": (6.75, 1.2, 0.75, 0.6, "up"),
    "ffn.down": (7.85, 1.2, 0.85, 0.6, "down"),
    "norms ": (9.0, 1.2, 0.7, 0.6, "norm"),
    "head": (10.75, 1.1, 0.9, 0.8, "task head"),
}
_ARROWS = (
    ((1.1, 1.5), (2.0, 1.5)),
    ((2.85, 2.3), (3.15, 1.9)),
    ((2.85, 1.5), (3.15, 1.5)),
    ((2.85, 0.7), (3.15, 1.1)),
    ((4.0, 1.5), (4.3, 1.5)),
    ((5.15, 1.5), (5.45, 1.5)),
    ((6.15, 1.5), (6.75, 1.5)),
    ((7.5, 1.5), (7.85, 1.5)),
    ((8.7, 1.5), (9.0, 1.5)),
    ((9.7, 1.5), (10.75, 1.5)),
)
_WEIGHTS = tuple(b for b in _BOXES if b.startswith(("attention.", "ffn.")) and b != "attention.heads")


@mpl.rc_context(STYLE)
def sites_diagram(method: str) -> Figure:
    """Where a method acts in a transformer: the sites of its taxonomy entry, coloured in one drawing of a layer."""
    entry = taxonomy.entry(method)
    sites = set(entry.sites)
    touched = {b for b in _BOXES if b.strip() in sites}
    if "weights" in sites:
        touched |= set(_WEIGHTS)
    figure, axes = _figure(9.6, 2.9)
    frame = TOUCHED if "layers" in sites else PLAIN
    axes.add_patch(
        FancyBboxPatch(
            (1.65, 0.05),
            8.35,
            2.85,
            boxstyle="round,pad=0.05",
            fill=False,
            edgecolor=frame,
            linestyle="--",
            linewidth=1.2,
        )
    )
    axes.text(9.95, 0.1, "one of L layers", ha="right", va="bottom", fontsize=8.5, color=frame)
    for start, end in _ARROWS:
        axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": PLAIN, "linewidth": 1})
    for name, (x, y, width, height, label) in _BOXES.items():
        hit = name in touched
        axes.add_patch(
            FancyBboxPatch(
                (x, y),
                width,
                height,
                boxstyle="round,pad=0.0,rounding_size=0.08",
                facecolor=TOUCHED if hit else "none",
                edgecolor=TOUCHED if hit else PLAIN,
                linewidth=1.4,
            )
        )
        axes.text(
            x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=9, color="white" if hit else INK
        )
        if "biases" in sites and name in _WEIGHTS:
            axes.add_patch(plt.Rectangle((x, y - 0.16), width, 0.1, color=TOUCHED))
    words = ", ".join(entry.sites)
    axes.text(0, 3.15, f"{entry.title} acts at: {words}", fontsize=9.5, color=TOUCHED, va="bottom")
    axes.set_xlim(-0.1, 11.75)
    axes.set_ylim(-0.05, 3.45)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.tight_layout(pad=0.2)
    plt.close(figure)
    return figure


@mpl.rc_context(STYLE)
def quality_against_parameters(rows: Sequence[dict[str, Any]], metric: str = "accuracy", title: str = "") -> Figure:
    """Mean quality against trained parameters (log scale), with one standard deviation over seeds.

    ``rows`` are those of ``experiments.summarize``; without rows the figure says that there are no runs. ``full`` and
    ``head`` are drawn as reference lines.
    """
    figure, axes = _figure(8.2, 4.8)
    if not rows:
        axes.text(0.5, 0.5, "no stored runs", ha="center", va="center", fontsize=13)
        axes.axis("off")
        plt.close(figure)
        return figure
    spread = any(len(row["seeds"]) > 1 for row in rows)
    for row in rows:
        colour = CLASSES[taxonomy.entry(row["method"]).category.split("/")[0]]
        if row["method"] in ("full", "head"):
            axes.axhline(row["mean"], color=colour, linewidth=1, linestyle="-" if row["method"] == "full" else ":")
        axes.errorbar(
            row["trained"], row["mean"], yerr=row["std"], fmt="o", color=colour, capsize=2, markersize=5, elinewidth=1
        )
    axes.set_xscale("log")
    _label(axes, [(row["trained"], row["mean"], row["method"]) for row in rows])
    shown = dict.fromkeys(taxonomy.entry(row["method"]).category.split("/")[0] for row in rows)
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=CLASSES[c], label=c) for c in shown]
    axes.legend(handles=handles, loc="lower right", fontsize=8.5)
    seeds = sorted({len(row["seeds"]) for row in rows})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    axes.set_xlabel("trained parameters, task head included")
    axes.set_ylabel(f"{metric} on the test split" + (f", mean and s.d. over {count} seeds" if spread else ", one seed"))
    if title:
        axes.set_title(title, fontsize=11)
    figure.tight_layout()
    plt.close(figure)
    return figure


def _label(axes, points: Iterable[tuple[float, float, str]]) -> None:
    """Name the points; labels that would collide are moved up or down with a thin line to their point."""
    points = sorted(points, key=lambda p: p[1])
    low, high = axes.get_ylim()
    step = (high - low) * 0.034
    placed: list[tuple[float, float]] = []
    for x, y, name in points:
        at = y
        while any(abs(at - other) < step and max(x / ox, ox / x) < 6 for ox, other in placed):
            at += step / 2
        placed.append((x, at))
        axes.annotate(
            name,
            xy=(x, y),
            xytext=(x * 1.15, at),
            fontsize=7.5,
            va="center",
            arrowprops={"arrowstyle": "-", "color": PLAIN, "linewidth": 0.5} if at != y else None,
        )
    axes.set_ylim(low, max(high, max((at for _, at in placed), default=high) + step))


@mpl.rc_context(STYLE)
def learning_rate_search(records: Sequence[dict[str, Any]], metric: str = "accuracy") -> Figure:
    """Validation metric by learning rate, one line a method: the search from which each default comes."""
    lines: dict[str, dict[float, float]] = {}
    for record in records:
        spec = record["spec"]
        lines.setdefault(spec["method"], {})[spec["learning_rate"]] = record["metrics"]["validation"][metric]
    names = [m for m in taxonomy.methods() if len(lines.get(m, ())) > 1]
    columns = 4
    height = max(1, -(-len(names) // columns))
    figure, grid = _figure(9.2, 1.75 * height, nrows=height, ncols=columns, squeeze=False, sharey=True, sharex=True)
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    for axes, name in zip(grid.flat, names, strict=False):
        rates = sorted(lines[name])
        values = [lines[name][r] for r in rates]
        colour = CLASSES[taxonomy.entry(name).category.split("/")[0]]
        axes.plot(rates, values, "o-", color=colour, markersize=3.5, linewidth=1)
        best = max(rates, key=lambda r: (lines[name][r], -r))
        axes.plot([best], [lines[name][best]], "o", color=TOUCHED, markersize=6)
        axes.set_xscale("log")
        axes.set_title(name, fontsize=8.5)
        axes.tick_params(labelsize=7.5)
    figure.supxlabel("learning rate", fontsize=9, color=INK)
    figure.supylabel(f"validation {metric}", fontsize=9, color=INK)
    figure.tight_layout()
    plt.close(figure)
    return figure


@mpl.rc_context(STYLE)
def loss_curves(records: Sequence[dict[str, Any]]) -> Figure:
    """Training loss over optimizer steps, one line a run."""
    figure, axes = _figure(7.2, 3.2)
    for record in records:
        points = [(row["step"], row["loss"]) for row in record["history"] if "loss" in row]
        axes.plot(*zip(*points, strict=True), linewidth=1.4, label=record["spec"]["method"])
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss")
    axes.legend(fontsize=8.5)
    figure.tight_layout()
    plt.close(figure)
    return figure
