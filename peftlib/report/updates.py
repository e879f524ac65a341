"""What low-rank updates learned: their ranks over time, their score at each rank, their singular values, their mixture.

Tables are pandas data frames of one adapted model, figures matplotlib's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import matplotlib as mpl
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from peftlib.adapted import Adapted
from peftlib.anatomy import Site
from peftlib.errors import StateError, UnsupportedError
from peftlib.methods.reparameterized.lora.multitask.moelora import Experts
from peftlib.report.figures import ADDED, INK, STYLE, TOUCHED
from peftlib.report.learned import lines_and_mean

By = Literal["matrix", "layer", "site"]


def _method(adapted: Adapted, attribute: str, wanted: str):
    """The method, or the part of a combination, that has an attribute."""
    for method in getattr(adapted.method, "parts", [adapted.method]):
        if hasattr(method, attribute):
            return method
    raise UnsupportedError(f"{adapted.name} has no {wanted}")


def _label(site: Site, by: By) -> str:
    return {"matrix": str(site), "layer": f"{site.stack} {site.layer}", "site": site.name}[by]


def ranks_over_time(adapted: Adapted, by: By = "matrix") -> pd.DataFrame:
    """AdaLoRA and IncreLoRA: the rank of every matrix (columns) from a step on (rows), as the last training in this
    process went; summed over the matrices of a ``layer``, or of a kind of ``site``.

    Raises UnsupportedError for a method with fixed ranks, StateError before any training.
    """
    trace = _method(adapted, "trace", "ranks that change while it trains; adalora and increlora do").trace
    if len(trace) < 2:
        raise StateError(f"{adapted.name} has not changed a rank in this process; train it first")
    table = pd.DataFrame([ranks for _, ranks in trace], index=pd.Index([step for step, _ in trace], name="step"))
    places = {str(site): _label(site, by) for site in adapted.host.anatomy.sites()}
    return table.T.groupby([places[column] for column in table.columns], sort=False).sum().T.rename_axis(columns=by)


@mpl.rc_context(STYLE)
def rank_figure(adapted: Adapted, by: By = "layer") -> Figure:
    """:func:`ranks_over_time` as one line a column, light for the first and dark for the last."""
    table = ranks_over_time(adapted, by)
    figure, axes = plt.subplots(figsize=(6.5, 3.6))
    colours = mpl.colormaps["viridis_r"]
    for i, name in enumerate(table.columns):
        colour = colours(i / max(1, len(table.columns) - 1))
        axes.step(table.index, table[name], where="post", color=colour, linewidth=1.2, label=name)
    axes.set(xlabel="step", ylabel=f"rank of a {by}" if by == "matrix" else f"ranks of a {by}, added up")
    axes.set_ylim(bottom=0)
    if len(table.columns) <= 16:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.tight_layout()
    return figure


def scores_by_rank(
    adapted: Adapted, score: Callable[[Adapted], float | Mapping[str, float]], ranks: Iterable[int] | None = None
) -> pd.DataFrame:
    """DyLoRA: what ``score(adapted)`` gives when the model computes at a rank, one row for each (default: all ranks).

    >>> report.scores_by_rank(adapted, lambda a: evaluate_task(a, task, "validation", tokenizer))

    Raises UnsupportedError for a method that works at one rank only.
    """
    method = _method(adapted, "at_rank", "other rank than its own to compute at; dylora does")
    rows = {}
    for rank in range(1, method.rank + 1) if ranks is None else ranks:
        with method.at_rank(rank):
            value = score(adapted)
        rows[rank] = dict(value) if isinstance(value, Mapping) else {"score": float(value)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(index="rank")


@mpl.rc_context(STYLE)
def score_by_rank_figure(table: pd.DataFrame, metric: str | None = None) -> Figure:
    """One column of a :func:`scores_by_rank` table (default: the first) against the rank."""
    metric = table.columns[0] if metric is None else metric
    figure, axes = plt.subplots(figsize=(5, 3.4))
    axes.plot(table.index, table[metric], color=ADDED, marker="o")
    axes.set(xlabel="rank", ylabel=metric)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout()
    return figure


def singular_values(adapted: Adapted) -> pd.DataFrame:
    """The singular values of every matrix's update, one row a matrix, the largest first; zeros beyond its rank.

    For LoRA and the methods that are it with other lives. An update with one form a task is that of the task in use:
    ``with adapted.task(2): ...``. Raises UnsupportedError for a method without updates of single matrices.
    """
    updates = _method(adapted, "updates", "low-rank update of single matrices, as LoRA and its kin have").updates
    rows = {}
    for site, update in updates.items():
        task = (adapted.host.tasks.default or 0,) if isinstance(update, Experts) else ()
        delta = update.delta(*task)
        values = torch.linalg.svdvals(delta.float())
        # What is left of an exact zero after rounding is one.
        values[values <= values[0] * max(delta.shape) * torch.finfo(torch.float32).eps] = 0
        rows[str(site)] = values.tolist()
    table = pd.DataFrame.from_dict(rows, orient="index").fillna(0.0)
    table.columns = pd.RangeIndex(1, len(table.columns) + 1)
    used = int((table > 0).any().sum())
    return table.iloc[:, : max(1, used)].rename_axis(index="matrix", columns="number")


def singular_value_figure(adapted: Adapted) -> Figure:
    """:func:`singular_values` as thin lines, and their mean over the matrices."""
    return lines_and_mean(
        singular_values(adapted), of="matrices", xlabel="number", ylabel="singular value of the update"
    )


def mixture_weights(adapted: Adapted) -> pd.DataFrame:
    """LoraHub: the ``weight`` of every source in the mixture, one row a source, by name; MOELoRA: the weight of every
    expert (columns) for every task (rows), a mean over the gates where each matrix has its own.

    Raises UnsupportedError for a method that mixes nothing, StateError before the weights are found.
    """
    weights = _method(adapted, "weights", "mixture; lorahub and moelora have").weights
    if not adapted.calibrated:
        raise StateError(f"{adapted.name} has found no mixture yet: call adapted.calibrate(batches), or fit it, first")
    if callable(weights):
        mean = torch.stack(list(weights().values())).mean(0)
        return pd.DataFrame(mean.tolist()).rename_axis(index="task", columns="expert")
    names = [source.name for source in adapted.method.sources]
    return pd.DataFrame({"weight": weights.tolist()}, index=pd.Index(names, name="source"))


@mpl.rc_context(STYLE)
def mixture_figure(adapted: Adapted) -> Figure:
    """:func:`mixture_weights` as bars, one group a row."""
    table = mixture_weights(adapted)
    figure, axes = plt.subplots(figsize=(1.5 + 0.4 * max(8, table.size), 3.2))
    colours = [mpl.colormaps["viridis"](i / max(1, len(table.columns) - 1)) for i in range(len(table.columns))]
    table.plot.bar(ax=axes, color=colours if len(colours) > 1 else [TOUCHED], legend=len(colours) > 1, rot=0)
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.set(xlabel=table.index.name, ylabel="weight")
    figure.tight_layout()
    return figure
