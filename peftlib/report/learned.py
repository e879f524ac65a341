"""What a method learned, as tables and figures: pandas frames and matplotlib figures of one adapted model."""

from __future__ import annotations

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from peftlib.adapted import Adapted
from peftlib.errors import UnsupportedError
from peftlib.report.figures import ADDED, PLAIN, STYLE


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
    table = quantization_errors(adapted)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 3.5))
        for _, row in table.iterrows():
            axes.plot(table.columns, row, color=PLAIN, linewidth=0.6, alpha=0.6)
        axes.plot(table.columns, table.mean(), color=ADDED, marker="o", label="mean over the maps")
        axes.set(xlabel="iteration (0: plain quantization)", ylabel="error of the weight, relative", ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
        figure.tight_layout()
    return figure
