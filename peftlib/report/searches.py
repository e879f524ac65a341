"""Stored searches over structures, as tables and figures: the Pareto set, and what a search is worth against chance."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from peftlib.experiments import Log
from peftlib.report.figures import ADDED, INK, PLAIN, STYLE, TOUCHED, nothing

_COLOURS = {"bayesian": TOUCHED, "random": ADDED}
_ORDERS = {1: "first", 2: "second"}

Side = list[tuple[float, dict[str, Any]]]
"""What stands in a comparison: the records of one or more runs, each with its weight."""


def pareto_rows(log: Log) -> list[dict[str, Any]]:
    """The Pareto set of a search with its configurations, one row a structure, by rising size."""
    return [
        {
            "parameters": f"{trial['parameters']:,}",
            "validation": f"{trial['score']:.3f}",
            "test": f"{trial['test']:.3f}",
            **{name: trial["options"][name] for name in ("serial", "parallel", "length")},
            "layers": "".join(str(bit) for bit in trial["options"]["layers"]),
            "trial": n + 1,
        }
        for trial in log.pareto()
        for n in [log.trials.index(trial)]
    ]


def search_rows(logs: Sequence[Log]) -> list[dict[str, Any]]:
    """Strategy by seed: the share of outcomes that the search dominates on validation and test data, and its cost:
    ``s``, seconds of training and of proposing."""
    return [
        {
            "strategy": log.spec.strategy,
            "seed": log.spec.seed,
            "trials": len(log.trials),
            "hypervolume, validation": f"{log.hypervolume():.3f}",
            "hypervolume, test": f"{log.hypervolume(split='test'):.3f}",
            "best validation": f"{max(t['score'] for t in log.trials):.3f}",
            "s": f"{sum(t['seconds'] + t['proposal_seconds'] for t in log.trials):.0f}",
        }
        for log in logs
    ]


def structure_rows(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """S3Delta's searches, each beside random structures of its data, budget and seed: of the first that together took
    as long as the search and its training, the best on validation data (ties: the lower validation loss), and the mean
    of all. The last of the first counts by the part of it that the search's time pays for: what was reached is that far
    between the best without it and the best with it. ``s``: seconds of search and training."""
    rows = []
    for searched, paid, drawn in _compared(records):
        names = (
            f"search: {_search(searched)}",
            f"best of {len(paid) - 1 + _share(searched, paid):.1f} random ones",
            f"a random one, mean of {len(drawn)}",
        )
        for name, (side, seconds) in zip(names, _sides(searched, paid, drawn)):
            row = _structure(name, side, seconds)
            rows += [row] if row not in rows else []
    return rows


def structure_means(records: Sequence[dict[str, Any]], split: str = "test") -> list[dict[str, Any]]:
    """The same as means over seeds with standard deviations, three rows for each kind of search. ``search over it``:
    the mean of the differences seed by seed, with its standard error. Seeds at which all random structures that there
    are took less than the search are left out."""
    groups: dict[tuple, list[tuple]] = {}
    for searched, paid, drawn in _compared(records):
        if sum(map(_seconds, paid)) >= _seconds(searched):
            spec = searched["spec"]
            sides, spent = zip(*_sides(searched, paid, drawn))
            reached = [_reached(side, split) for side in sides]
            kind = (_texts(spec), spec["options"]["budget"], _search(searched))
            groups.setdefault(kind, []).append((reached, spent))
    rows = []
    for (texts, budget, search), seeds in sorted(groups.items()):
        reached, spent = (list(zip(*values)) for values in zip(*seeds))
        for what, mine, s in zip((f"search: {search}", "best random at its cost", "a random one"), reached, spent):
            rows.append(
                {
                    "texts": f"{texts:,}",
                    "budget": f"{100 * budget:g} %",
                    "seeds": len(seeds),
                    "structure": what,
                    split: _spread(mine),
                    "search over it": "" if mine is reached[0] else _difference(reached[0], mine),
                    "s": f"{statistics.mean(s):.0f}",
                }
            )
    return rows


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def _difference(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Mean of the differences seed by seed, and its standard error."""
    apart = [a - b for a, b in zip(ours, theirs)]
    error = f" ± {statistics.stdev(apart) / len(apart) ** 0.5:.3f}" if len(apart) > 1 else ""
    return f"{statistics.mean(apart):+.3f}{error}"


def _compared(records: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list, list]]:
    """Each search, the first random structures of its data, budget and seed that took as long, and all of them."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for record in records:
        spec = record["spec"]
        groups.setdefault((_texts(spec), spec["options"]["budget"], spec["seed"]), []).append(record)
    for _, mine in sorted(groups.items()):
        searches, drawn = (
            [r for r in mine if r["spec"]["options"]["strategy"] == strategy] for strategy in ("search", "random")
        )
        drawn.sort(key=lambda r: r["spec"]["options"]["draw"])
        spent = list(itertools.accumulate(map(_seconds, drawn)))
        for searched in sorted(searches, key=_search):
            yield searched, drawn[: 1 + sum(total < _seconds(searched) for total in spent)], drawn


def _sides(searched: dict[str, Any], paid: list, drawn: list) -> list[tuple[Side, float]]:
    """The search, and where there are random structures the best of those that its time pays for and one of them; with
    the seconds of each."""
    sides = [([(1.0, searched)], _seconds(searched))]
    if paid:
        *before, last = paid
        share = _share(searched, paid)
        best = [(share, min(paid, key=_merit)), *((1 - share, r) for r in sorted(before, key=_merit)[:1])]
        sides.append((best, sum(map(_seconds, before)) + share * _seconds(last)))
        sides.append(([(1 / len(drawn), r) for r in drawn], statistics.mean(map(_seconds, drawn))))
    return sides


def _share(searched: dict[str, Any], paid: list) -> float:
    """The part of the last random structure that the search's time pays for; a single one counts whole."""
    left = _seconds(searched) - sum(map(_seconds, paid[:-1]))
    return min(1.0, left / _seconds(paid[-1])) if len(paid) > 1 else 1.0


def _reached(side: Side, split: str) -> float:
    return sum(weight * r["metrics"][split][r["metric"]] for weight, r in side)


def _search(record: dict[str, Any]) -> str:
    """How a search went about it."""
    o = record["spec"]["options"]
    rows = o["search_batch_size"] or record["spec"]["settings"]["batch_size"]
    return f"{_ORDERS[o['order']]} order, {o['steps']} steps, batches of {rows}, rate {o['search_rate']:g}"


def _structure(what: str, side: Side, seconds: float) -> dict[str, Any]:
    """One row: what the records of a side share, and what they reached."""
    spec = side[0][1]["spec"]
    return {
        "texts": f"{_texts(spec):,}",
        "budget": f"{100 * spec['options']['budget']:g} %",
        "seed": spec["seed"],
        "structure": what,
        **{split: f"{_reached(side, split):.3f}" for split in ("validation", "test")},
        "parameters": f"{max(r['count']['trained'] - r['count']['head'] for _, r in side):,}",
        "s": f"{seconds:.0f}",
    }


def _texts(spec: dict[str, Any]) -> int:
    return spec["settings"]["task_options"]["n_train"]


def _merit(record: dict[str, Any]) -> tuple[float, float]:
    """Lower is better: validation metric, then validation loss."""
    validation = record["metrics"]["validation"]
    return -validation[record["metric"]], validation["loss"]


def _seconds(record: dict[str, Any]) -> float:
    """What a run took, its search and its training, without evaluations."""
    return record["calibration_seconds"] + record["steps"] * record["seconds_per_step"]


def search_figure(logs: Sequence[Log], metric: str = "accuracy") -> Figure:
    """Left: every trial and the Pareto set of each search, score on validation data against parameters. Right: the
    share of outcomes that is dominated after so many trainings, a thin line a search and the mean of each strategy.
    Without searches the figure says that there are none."""
    with plt.rc_context(STYLE):
        if not logs:
            return nothing("no stored searches")
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.8))
        for strategy, colour in _COLOURS.items():
            mine = [log for log in logs if log.spec.strategy == strategy]
            for n, log in enumerate(mine):
                front, label = log.pareto(), strategy if not n else None
                sizes, scores = ([t[key] for t in log.trials] for key in ("parameters", "score"))
                left.plot(sizes, scores, "o", color=colour, markersize=3, alpha=0.35)
                steps = ([t[key] for t in front] for key in ("parameters", "score"))
                left.step(*steps, where="post", color=colour, marker="o", markersize=5, linewidth=1.4, label=label)
                volumes = [log.hypervolume(k) for k in range(1, len(log.trials) + 1)]
                right.plot(range(1, len(volumes) + 1), volumes, color=colour, linewidth=0.8, alpha=0.5)
            if mine:
                most, label = (
                    min(len(log.trials) for log in mine),
                    f"{strategy}, {len(mine)} seed{'s'[: len(mine) - 1]}",
                )
                means = [statistics.mean(log.hypervolume(k) for log in mine) for k in range(1, most + 1)]
                right.plot(range(1, most + 1), means, color=colour, linewidth=2, label=label)
        initial = min(log.spec.search.initial for log in logs)
        right.axvline(initial + 0.5, color=PLAIN, linewidth=0.8, linestyle=":")
        right.text(
            initial + 0.7, 0.97, "first model", va="top", color=INK, fontsize=8, transform=right.get_xaxis_transform()
        )
        left.set(xscale="log", xlabel="trained parameters, task head not included", ylabel=f"validation {metric}")
        right.set(xlabel="trainings", ylabel="dominated share of outcomes")
        right.xaxis.get_major_locator().set_params(integer=True)
        left.legend(fontsize=8.5)
        right.legend(fontsize=8.5)
        figure.tight_layout()
    plt.close(figure)
    return figure
