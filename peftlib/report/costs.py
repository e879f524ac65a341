"""Stored measurements of training steps, as tables and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from peftlib import taxonomy
from peftlib.report.figures import CLASSES, INK, PLAIN, STYLE, nothing

Costs = Mapping[str, Mapping[str, Any]]
"""Measurements by name, as ``experiments.read_costs`` gives them."""


def memory_rows(costs: Costs) -> list[dict[str, str]]:
    """MB that training takes beside the loaded backbone, one row a method in the taxonomy's order."""
    return [
        {
            "method": name,
            "trained": f"{cost['trained']:,}",
            "before training": f"{cost['calibration'] / 2**20:.1f}" if cost["calibration"] else "",
            **{part: f"{cost[part] / 2**20:.1f}" for part in ("training", "gradients", "optimizer")},
        }
        for name, cost in _ordered(costs)
    ]


def step_rows(costs: Costs) -> list[dict[str, str]]:
    """Time of a step as a ratio to the floor's, and MB kept for the backward pass, one row a method."""
    return [
        {
            "method": name,
            "trained": f"{cost['trained']:,}",
            "x floor": f"{cost['ours']['ratio']:.2f}",
            "HF peft x floor": f"{cost['peft']['ratio']:.2f}" if cost["peft"] else "",
            "MB kept": f"{cost['ours']['kept'] / 2**20:.1f}",
            "HF peft MB kept": f"{cost['peft']['kept'] / 2**20:.1f}" if cost["peft"] else "",
        }
        for name, cost in _ordered(costs)
    ]


def variant_rows(costs: Costs) -> list[dict[str, str]]:
    """FLOPs and time as ratios to the first variant of the same method and pass, one row a variant."""
    return [
        {
            "method": name,
            "GFLOPs": f"{cost['flops'] / 1e9:.2f}",
            "x FLOPs": f"{cost['flops_ratio']:.2f}",
            "x time": f"{cost['ratio']:.2f}",
        }
        for name, cost in _ordered(costs)
    ]


@mpl.rc_context(STYLE)
def cost_figure(memory: Costs, step: Costs) -> Figure:
    """Left: MB of training (bar) and of what comes before it (mark). Right: time of a step beside the floor (filled),
    and HF peft's (hollow). Where there are no measurements the figure says so."""
    names = [name for name, _ in _ordered({**step, **memory})]
    if not names:
        return nothing("no stored measurements")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 1.2 + 0.2 * len(names)), sharey=True)
    for place, name in enumerate(names):
        colour = CLASSES[_category(name)]
        if name in memory:
            cost = memory[name]
            left.barh(place, cost["training"] / 2**20, color=colour, height=0.65)
            if cost["calibration"]:
                left.plot(cost["calibration"] / 2**20, place, "|", color=INK, markersize=9, markeredgewidth=2)
        if name in step:
            cost = step[name]
            right.plot(cost["ours"]["ratio"], place, "o", color=colour, markersize=5)
            if cost["peft"]:
                right.plot(cost["peft"]["ratio"], place, "o", color=colour, markersize=6, markerfacecolor="none")
    for axes in (axes for axes, measured in ((left, memory), (right, step)) if not measured):
        axes.text(0.5, 0.5, "no stored measurements", ha="center", va="center", transform=axes.transAxes)
    left.set(yticks=range(len(names)), yticklabels=names, xlabel="MB beside the backbone")
    left.tick_params(axis="y", labelsize=8, length=0)
    left.set_ylim(len(names) - 0.4, -0.6)
    right.axvline(1, color=PLAIN, linewidth=0.8, linestyle=":")
    right.tick_params(axis="y", length=0)
    right.set(xscale="log", xlabel="time of a step, floor = 1")
    right.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    right.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    right.set_xticks([tick for tick in (0.5, 1, 1.5, 2, 3, 5, 10, 20) if _within(tick, right.get_xlim())])
    figure.tight_layout()
    plt.close(figure)
    return figure


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


def _ordered(costs: Costs) -> list[tuple[str, Mapping[str, Any]]]:
    """In the taxonomy's order; a variant, such as "lora, all linear", behind its method."""
    order = taxonomy.methods()
    return sorted(costs.items(), key=lambda item: (order.index(method_of(item[0])), item[0]))


def method_of(name: str) -> str:
    """The method of a measurement, which may be of a variant of it."""
    return name.partition(",")[0]


def _category(name: str) -> str:
    return taxonomy.entry(method_of(name)).category.partition("/")[0]
