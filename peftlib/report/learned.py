"""What a method learned, as tables and figures: pandas frames and matplotlib figures of one adapted model or of its
predictions."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from peftlib.adapted import Adapted
from peftlib.errors import DataError, UnsupportedError
from peftlib.report.figures import ADDED, CLASSES, PLAIN, STYLE, TOUCHED


def quantization_errors(adapted: Adapted) -> pd.DataFrame:
    """LoftQ: the relative error of every quantized map (rows, by path) by iteration (columns; 0 is plain quantization).

    Raises UnsupportedError for a method that has no such errors.
    """
    errors = getattr(adapted.method, "errors", None)
    if not isinstance(errors, dict):
        raise UnsupportedError(f"{adapted.name} does not alternate quantization and decomposition; loftq does")
    return pd.DataFrame.from_dict(errors, orient="index").rename_axis(index="map", columns="iteration")


def quantization_error_figure(adapted: Adapted) -> Figure:
    """LoftQ: :func:`quantization_errors` as thin lines, and their mean over the maps."""
    return lines_and_mean(
        quantization_errors(adapted),
        of="maps",
        xlabel="iteration (0: plain quantization)",
        ylabel="error of the weight, relative",
    )


def lines_and_mean(table: pd.DataFrame, *, of: str, xlabel: str, ylabel: str) -> Figure:
    """Each row of a table as a thin line over its columns, and the mean over the rows, which are of these things."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 3.5))
        for _, row in table.iterrows():
            axes.plot(table.columns, row, color=PLAIN, linewidth=0.6, alpha=0.6)
        axes.plot(table.columns, table.mean(), color=ADDED, marker="o", label=f"mean over the {of}")
        axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
        figure.tight_layout()
    return figure


def reliability(probabilities: torch.Tensor, labels: torch.Tensor, bins: int = 10) -> pd.DataFrame:
    """How often the class predicted with some confidence is right: one row a bin of equal width, with the mean
    ``confidence``, the ``accuracy`` and the ``count`` of its predictions (NaN, NaN, 0 where there is none).

    ``probabilities`` (N, C), ``labels`` (N,). :func:`calibration_error` sums the rows up.
    """
    if probabilities.dim() != 2 or len(probabilities) != len(labels) or not len(labels):
        raise DataError(
            f"probabilities of shape {tuple(probabilities.shape)} and {len(labels)} labels do not fit; they are (N, C) "
            "and (N,), with N above 0"
        )
    confidence, predicted = probabilities.detach().double().cpu().max(dim=1)
    right = (predicted == labels.cpu()).numpy()
    # Bins are open at the left, so that a confidence of 1 lies in the last.
    place = np.clip(np.ceil(confidence.numpy() * bins).astype(int) - 1, 0, bins - 1)
    rows = pd.DataFrame({"bin": place, "confidence": confidence.numpy(), "accuracy": right.astype(float), "count": 1})
    table = rows.groupby("bin").agg({"confidence": "mean", "accuracy": "mean", "count": "sum"})
    return table.reindex(range(bins)).fillna({"count": 0}).astype({"count": int})


def calibration_error(table: pd.DataFrame) -> float:
    """The expected calibration error of a :func:`reliability` table: the mean distance of accuracy and confidence,
    weighted by the bins' counts."""
    share = table["count"] / table["count"].sum()
    return float((share * (table["accuracy"] - table["confidence"]).abs()).sum())


def reliability_diagram(tables: dict[str, pd.DataFrame]) -> Figure:
    """Accuracy against confidence for each named :func:`reliability` table, with its calibration error; calibrated
    predictions lie on the diagonal."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.5, 4.5))
        axes.plot([0, 1], [0, 1], color=PLAIN, linewidth=0.8, linestyle="--")
        for (name, table), colour in zip(tables.items(), (TOUCHED, ADDED, *CLASSES.values())):
            there = table[table["count"] > 0]
            label = f"{name} (ECE {calibration_error(table):.3f})"
            axes.plot(there["confidence"], there["accuracy"], color=colour, marker="o", label=label)
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        axes.legend(loc="upper left")
        figure.tight_layout()
    return figure
