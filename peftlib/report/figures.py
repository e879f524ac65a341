"""Figures of the book, as functions that chapters and pages share. Each returns a matplotlib figure.

Colours are readable on a light and on a dark page; text takes a mid grey that both allow.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch
from matplotlib.transforms import Bbox

from peftlib import taxonomy
from peftlib.taxonomy import types

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

INK, TOUCHED, ADDED, PLAIN = "#747c89", "#d97706", "#0f766e", "#9ca3af"
CLASSES = {
    "additive": "#0f766e",
    "partial": "#7c3aed",
    "reparameterized": "#2563eb",
    "hybrid": "#be185d",
    "unified": "#b45309",
    "since_survey": "#0369a1",
    "baselines": "#6b7280",
    "yours": "#4d7c0f",
}
STYLE: dict[RcKeyType, Any] = {
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
    "figure.dpi": 150,
    "svg.hashsalt": "peftlib",
}


def _figure(width: float, height: float, **more) -> tuple[Figure, Any]:
    return plt.subplots(figsize=(width, height), **more)


@mpl.rc_context(STYLE)
def nothing(what: str, width: float = 9.2, height: float = 3.8) -> Figure:
    """A figure without data, which says so: ``what`` there is none of."""
    figure, axes = _figure(width, height)
    axes.text(0.5, 0.5, what, ha="center", va="center", fontsize=13)
    axes.axis("off")
    plt.close(figure)
    return figure


#: The parts of a model with one layer drawn: site -> (x, y, width, height, label), in units of the drawing.
_BOXES: dict[str, tuple[float, float, float, float, str]] = {
    "embeddings": (0.0, 1.1, 1.25, 0.8, "embeddings"),
    "attention.query": (2.15, 2.0, 0.85, 0.6, "query"),
    "attention.key": (2.15, 1.2, 0.85, 0.6, "key"),
    "attention.value": (2.15, 0.4, 0.85, 0.6, "value"),
    "attention.heads": (3.3, 0.9, 0.8, 1.2, "heads"),
    "attention.output": (4.4, 1.2, 0.85, 0.6, "output"),
    "norms": (6.0, 1.2, 0.7, 0.6, "norm"),
    "ffn.gate": (7.2, 2.0, 0.75, 0.6, "gate"),
    "ffn.up": (7.2, 1.2, 0.75, 0.6, "up"),
    "ffn.down": (8.3, 1.2, 0.85, 0.6, "down"),
    "norms ": (9.9, 1.2, 0.7, 0.6, "norm"),
    "head": (11.5, 1.1, 1.1, 0.8, "task head"),
}
_ARROWS = (
    ((1.25, 1.5), (2.15, 1.5)),
    ((1.9, 1.5), (2.15, 2.2)),
    ((1.9, 1.5), (2.15, 0.8)),
    ((3.0, 2.3), (3.3, 1.9)),
    ((3.0, 1.5), (3.3, 1.5)),
    ((3.0, 0.7), (3.3, 1.1)),
    ((4.1, 1.5), (4.4, 1.5)),
    ((5.25, 1.5), (5.5, 1.5)),
    ((5.76, 1.5), (6.0, 1.5)),
    ((6.7, 1.5), (7.2, 1.5)),
    ((7.95, 1.5), (8.3, 1.5)),
    ((9.15, 1.5), (9.4, 1.5)),
    ((9.66, 1.5), (9.9, 1.5)),
    ((10.6, 1.5), (11.5, 1.5)),
)
#: Gated families only: into the gate, and on to the product with the up-projection.
_GATE_ARROWS = (((6.95, 1.5), (7.2, 2.2)), ((7.95, 2.3), (8.3, 1.7)))
#: The sums after both blocks, and where the residual that enters them branches off.
_SUMS = ((5.63, 1.9), (9.53, 6.95))
_WEIGHTS = tuple(b for b in _BOXES if b.startswith(("attention.", "ffn.")) and b != "attention.heads")


@mpl.rc_context(STYLE)
def sites_diagram(method: str, title: bool = True) -> Figure:
    """Where a method acts in a transformer: the sites of its taxonomy entry, coloured in one drawing of a layer.

    The layer is an encoder's, with norms after the sums; the dashed gate is there in gated families only. A strip
    below a box stands for its bias, a coloured frame for whole layers. ``title`` names the method and its sites.
    """
    entry = taxonomy.entry(method)
    sites = set(entry.sites)
    touched = {b for b in _BOXES if b.strip() in sites}
    if "weights" in sites:
        touched |= set(_WEIGHTS)
    figure, axes = _figure(10.2, 3.1)
    frame = TOUCHED if "layers" in sites else PLAIN
    axes.add_patch(
        FancyBboxPatch(
            (1.7, 0.0),
            9.1,
            3.0,
            boxstyle="round,pad=0.05",
            fill=False,
            edgecolor=frame,
            linestyle="-" if "layers" in sites else "--",
            linewidth=2.0 if "layers" in sites else 1.2,
        )
    )
    axes.text(10.75, 0.04, "one of L layers", ha="right", va="bottom", fontsize=8.5, color=frame)
    axes.text(3.7, 0.04, "attention", ha="center", va="bottom", fontsize=8.5)
    axes.text(8.2, 0.04, "feed-forward", ha="center", va="bottom", fontsize=8.5)
    arrow = {"arrowstyle": "-|>", "color": PLAIN, "linewidth": 1}
    for start, end in _ARROWS:
        axes.annotate("", xy=end, xytext=start, arrowprops=arrow)
    for start, end in _GATE_ARROWS:
        axes.annotate("", xy=end, xytext=start, arrowprops={**arrow, "linestyle": ":"})
    for x, source in _SUMS:
        axes.add_patch(Circle((x, 1.5), 0.13, fill=False, edgecolor=PLAIN, linewidth=1))
        axes.text(x, 1.49, "+", ha="center", va="center", fontsize=9)
        axes.plot([source, source, x], [1.5, 2.8, 2.8], color=PLAIN, linewidth=1)
        axes.annotate("", xy=(x, 1.63), xytext=(x, 2.8), arrowprops={**arrow, "shrinkA": 0})
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
                linestyle=":" if name == "ffn.gate" and not hit else "-",
                linewidth=1.4,
            )
        )
        axes.text(
            x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=9.5, color="white" if hit else INK
        )
        if "biases" in sites and name in _WEIGHTS:
            axes.add_patch(plt.Rectangle((x, y - 0.16), width, 0.1, color=TOUCHED))
    words = textwrap.fill(f"{entry.title} acts at: {', '.join(entry.sites)}", 120) if title else ""
    axes.text(0, 3.2, words, fontsize=9.5, color=TOUCHED, va="bottom")
    top = 3.5 + 0.25 * words.count("\n") if title else 3.15
    axes.set_xlim(-0.1, 12.7)
    axes.set_ylim(-0.1, top)
    axes.set_position((0, 0, 1, 1))
    axes.axis("off")
    figure.set_size_inches(0.8 * 12.8, 0.8 * (top + 0.1))
    plt.close(figure)
    return figure


@mpl.rc_context(STYLE)
def taxonomy_tree() -> Figure:
    """The taxonomy as a tree, one line a method."""
    blocks = [c for c in taxonomy.CATEGORIES if c.path != "baselines"]
    of = {c.path: [e for e in taxonomy.METHODS if e.category == c.path] for c in blocks}
    leaves = [c for c in blocks if of[c.path]]
    # Two columns of categories, as even as the order allows.
    total = sum(len(of[c.path]) + 1.6 for c in leaves)
    heights, column, columns = 0.0, 0, {}
    for block in leaves:
        if column == 0 and heights >= total / 2:
            column, heights = 1, 0.0
        columns[block.path] = (column, heights)
        heights += len(of[block.path]) + 1.6
    rows = max(at + len(of[path]) + 1.6 for path, (_, at) in columns.items())
    figure, axes = _figure(10.2, 0.2 * rows + 0.2)
    for path, (column, at) in columns.items():
        x, colour = 5.6 * column, CLASSES[path.split("/")[0]]
        parts = path.split("/")
        titles = [taxonomy.category("/".join(parts[: n + 1])).title for n in range(len(parts))]
        titles[0] = titles[0].removesuffix(" fine-tuning")
        axes.plot([x, x], [at - 0.4, at + len(of[path]) + 0.4], color=colour, linewidth=3)
        axes.text(x + 0.15, at, " › ".join(titles), fontsize=8.5, weight="bold", va="center", color=colour)
        for number, entry in enumerate(of[path], 1):
            y = at + number
            axes.plot([x + 0.3], [y], "o", markersize=5, color=colour)
            axes.text(x + 0.48, y, entry.title, fontsize=8.5, va="center")
    axes.set_xlim(-0.1, 12)
    axes.set_ylim(rows, -0.8)
    axes.axis("off")
    axes.set_position((0, 0, 1, 1))
    plt.close(figure)
    return figure


@mpl.rc_context(STYLE)
def design_space() -> Figure:
    """Every method in the design space: a mark under each word of each dimension that describes it."""
    entries = [e for e in taxonomy.METHODS if e.category != "baselines"]
    dimensions = {
        "form of the change": list(types.FORMS),
        "what it modifies": list(types.REPRESENTATIONS),
        "insertion": list(types.INSERTIONS),
        "composition": list(types.COMPOSITIONS),
    }
    figure, axes = _figure(9.5, 0.17 * len(entries) + 1.6)
    left, ticks = 0.0, {}
    for number, (name, words) in enumerate(dimensions.items()):
        columns = {word: left + i for i, word in enumerate(words)}
        for row, entry in enumerate(entries):
            colour, said = CLASSES[entry.category.split("/")[0]], entry.place[number]
            axes.scatter([columns[word] for word in said], [row] * len(said), s=20, color=colour, zorder=3)
        axes.text(left + (len(words) - 1) / 2, -1.2, name, ha="center", va="bottom", weight="bold")
        ticks |= {position: word for word, position in columns.items()}
        left += len(words) + 0.8
    for row in range(0, len(entries), 2):
        axes.axhspan(row - 0.5, row + 0.5, color=PLAIN, alpha=0.12, lw=0)
    axes.set_xticks(list(ticks), list(ticks.values()), rotation=60, ha="right", fontsize=7.5)
    axes.set_yticks(range(len(entries)), [e.title for e in entries], fontsize=7)
    axes.set_xlim(-0.8, left - 1.0)
    axes.set_ylim(len(entries) - 0.4, -1.4)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.tight_layout()
    plt.close(figure)
    return figure


@mpl.rc_context(STYLE)
def quality_against_parameters(rows: Sequence[dict[str, Any]], metric: str = "accuracy", title: str = "") -> Figure:
    """Mean quality against trained parameters (log scale), with one standard deviation over seeds.

    ``rows`` are those of ``experiments.summarize``; without rows the figure says that there are no runs. ``full`` and
    ``head`` are drawn as reference lines.
    """
    if not rows:
        return nothing("no stored runs", 8.2, 4.8)
    # The more names there are, the more room they need.
    figure, axes = _figure(8.2, 4.8 + 0.06 * max(0, len(rows) - 20))
    spread = any(len(row["seeds"]) > 1 for row in rows)
    for row in rows:
        colour = CLASSES[taxonomy.entry(row["method"]).category.split("/")[0]]
        if row["method"] in ("full", "head"):
            axes.axhline(row["mean"], color=colour, linewidth=1, linestyle="-" if row["method"] == "full" else ":")
        # Faint bars: there are as many as methods, and the points are what is read.
        bar = {"ecolor": (colour, 0.35), "elinewidth": 1}
        axes.errorbar(row["trained"], row["mean"], yerr=row["std"], fmt="o", color=colour, markersize=5, **bar)
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.08)
    shown = dict.fromkeys(taxonomy.entry(row["method"]).category.split("/")[0] for row in rows)
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=CLASSES[c], label=c) for c in shown]
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncol": len(handles)}
    axes.legend(handles=handles, fontsize=8.5, handletextpad=0.1, columnspacing=1.2, **place)
    seeds = sorted({len(row["seeds"]) for row in rows})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    axes.set_xlabel("trained parameters, task head included")
    axes.set_ylabel(f"{metric} on the test split" + (f", mean and s.d. over {count} seeds" if spread else ", one seed"))
    if title:
        axes.set_title(title, fontsize=11, pad=24)
    figure.tight_layout()
    references = [row["mean"] for row in rows if row["method"] in ("full", "head")]
    _label(axes, [(row["trained"], row["mean"], row["std"], row["method"]) for row in rows], references)
    plt.close(figure)
    return figure


def _label(axes, points: Sequence[tuple[float, float, float, str]], lines: Sequence[float], size: float = 7.5) -> None:
    """Name (x, y, spread, name) points, each at the nearest place that is free of points, names and horizontal lines.

    A name that is not right beside its point gets a thin line to it.
    """
    unit, frame = axes.figure.dpi / 72, axes.get_window_extent()
    height = 1.25 * size * unit

    def pixels(x: float, y: float) -> tuple[float, float]:
        return tuple(axes.transData.transform((x, y)))

    taken = [_Box(frame.x0, pixels(1, y)[1] - unit, frame.width, 2 * unit) for y in lines]
    for x, y, spread, _ in points:
        (px, py), (_, low), (_, high) = pixels(x, y), pixels(x, y - spread), pixels(x, y + spread)
        taken += [_Box(px - 4 * unit, py - 4 * unit, 8 * unit, 8 * unit), _Box(px - unit, low, 2 * unit, high - low)]
    offsets = sorted(
        ((step * height, gap * unit) for step in range(-16, 17) for gap in (7, 30, 60, 90)),
        key=lambda offset: math.hypot(*offset),
    )
    for x, y, _, name in sorted(points, key=lambda p: -p[1]):
        px, py = pixels(x, y)
        width = 0.62 * size * unit * (len(name) + 1)
        places = [(px + dx, py + up) for up, gap in offsets for dx in (gap, -gap - width)]
        boxes = [_Box(left, middle - height / 2, width, height) for left, middle in places]
        boxes = [box for box in boxes if box.inside(frame)] or boxes
        box = next((box for box in boxes if not any(box.meets(other) for other in taken)), boxes[0])
        taken.append(box)
        near = max(box.x - px, px - box.x - width) < 10 * unit
        far = abs(box.y + height / 2 - py) > height or not near
        axes.annotate(
            name,
            xy=(x, y),
            xytext=((box.x - px) / unit, (box.y + height / 2 - py) / unit),
            textcoords="offset points",
            fontsize=size,
            va="center",
            arrowprops={"arrowstyle": "-", "color": PLAIN, "linewidth": 0.5} if far else None,
        )


@dataclass(frozen=True)
class _Box:
    """A rectangle in pixels, by its lower left corner."""

    x: float
    y: float
    width: float
    height: float

    def inside(self, frame: Bbox) -> bool:
        across = frame.x0 < self.x and self.x + self.width < frame.x1
        return across and frame.y0 < self.y and self.y + self.height < frame.y1

    def meets(self, other: _Box) -> bool:
        return (
            self.x < other.x + other.width
            and other.x < self.x + self.width
            and self.y < other.y + other.height
            and other.y < self.y + self.height
        )


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
