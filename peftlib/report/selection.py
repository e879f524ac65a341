"""What a mask over the backbone's entries chose: where its budget went, and how far two of them agree.

Tables are pandas data frames, figures matplotlib's. Both take attached methods, trained or only calibrated, that train
chosen entries (Fisher masks, LT-SFT, diff pruning, ...) or keep them (threshold masks).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import nn

from peftlib.adapted import Adapted
from peftlib.errors import StateError, UnknownNameError
from peftlib.mechanisms.sparse import SparseValues
from peftlib.methods.bases.entries import ChosenEntries
from peftlib.methods.partial.pretrained_weight_masking.threshold_mask import StraightThroughMask
from peftlib.report.figures import CLASSES, INK, STYLE

By = Literal["tensor", "matrix", "layer", "site"]
_KEYS: dict[str, list[str]] = {
    "tensor": ["tensor", "stack", "layer", "site"],
    "matrix": ["stack", "layer", "site"],
    "layer": ["stack", "layer"],
    "site": ["site"],
}


def masks(adapted: Adapted) -> dict[str, torch.Tensor]:
    """Name of a backbone tensor -> boolean mask of its shape, on the CPU: the entries that train (or, for threshold
    masks, stay). Tensors that were candidates and got nothing are there with an empty mask.

    Raises StateError for a method that makes no such choice, or has not made it yet.
    """
    if not adapted.calibrated:
        raise StateError(f"{adapted.name} has chosen nothing yet: call adapted.calibrate(batches), or train it, first")
    found = {}
    for method in getattr(adapted.method, "parts", [adapted.method]):
        if isinstance(method, ChosenEntries):
            found |= {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in method.candidates.items()}
    for path, child in adapted.host.paths().items():
        module, _, rest = path.partition(".parametrizations.")
        if isinstance(child, SparseValues):
            found[f"{module}.{rest.partition('.')[0]}"] = child.owned.cpu()
        elif isinstance(child, StraightThroughMask):
            found[f"{module}.{rest.partition('.')[0]}"] = child.kept(adapted.model.get_parameter(_original(path))).cpu()
    if not found:
        raise StateError(f"{adapted.name} chooses no entries of the backbone, so there is no mask to look at")
    return found


def budget(adapted: Adapted, by: By = "matrix") -> pd.DataFrame:
    """Where a mask's budget went: ``entries``, ``chosen``, ``density`` (chosen / entries) and ``share`` of all chosen.

    One row a tensor (fused projections: a part), a matrix with its bias, a layer or a kind of site. ``layer`` counts
    from 0 within its ``stack``; what is outside the layers has none.
    """
    rows = [
        {**place, "entries": mask.numel(), "chosen": int(mask.sum())}
        for place, mask in _pieces(adapted, masks(adapted))
    ]
    table = _grouped(rows, by)
    table["density"] = table["chosen"] / table["entries"]
    table["share"] = table["chosen"] / table["chosen"].sum()
    return table


def overlap(first: Adapted, second: Adapted, by: By = "matrix") -> pd.DataFrame:
    """How far two masks over the same backbone agree: ``first``, ``second`` and ``both`` count chosen entries,
    ``jaccard`` is both / either, and ``chance`` what it would be for two random masks of these sizes in that row.

    Rows as in :func:`budget`; a tensor that only one of them chose from counts as empty in the other. Raises StateError
    for backbones of different shapes.
    """
    one, other = masks(first), masks(second)
    for name in one.keys() | other.keys():
        shapes = [m[name].shape for m in (one, other) if name in m]
        if len(set(shapes)) > 1:
            raise StateError(f"the masks are of different backbones: {name} has shapes {[tuple(s) for s in shapes]}")
    names = [*one, *(n for n in other if n not in one)]
    blank = {n: torch.zeros_like(other.get(n, one.get(n))) for n in names}
    pairs = zip(
        _pieces(first, {n: one.get(n, blank[n]) for n in names}),
        _pieces(first, {n: other.get(n, blank[n]) for n in names}),
    )
    rows = [
        {**place, "entries": a.numel(), "first": int(a.sum()), "second": int(b.sum()), "both": int((a & b).sum())}
        for (place, a), (_, b) in pairs
    ]
    table = _grouped(rows, by)
    by_chance = table["first"] * table["second"] / table["entries"]
    table["jaccard"] = table["both"] / (table["first"] + table["second"] - table["both"])
    table["chance"] = by_chance / (table["first"] + table["second"] - by_chance)
    return table


@mpl.rc_context(STYLE)
def budget_map(adapted: Adapted) -> Figure:
    """The chosen share of every matrix, layers across and sites down; what is outside the layers is in the title."""
    table = budget(adapted, "matrix")
    inside = table[table["layer"].notna()]
    columns = list(dict.fromkeys(zip(inside["stack"], inside["layer"])))
    sites = list(dict.fromkeys(inside["site"]))
    values = np.full((len(sites), len(columns)), np.nan)
    for row in inside.itertuples():
        values[sites.index(row.site), columns.index((row.stack, row.layer))] = 100 * row.density
    stacks = len({stack for stack, _ in columns})
    figure, axes = plt.subplots(figsize=(2.4 + 0.42 * len(columns), 1.5 + 0.3 * len(sites)))
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(columns)), [f"{s[0]}{i}" if stacks > 1 else str(i) for s, i in columns])
    axes.set_yticks(range(len(sites)), sites)
    axes.set_xlabel("layer")
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("chosen entries, %")
    outside = 100 * table.loc[table["layer"].isna(), "share"].sum()
    axes.set_title(
        f"{adapted.name}: {table['chosen'].sum():,} entries, {outside:.0f} % outside the layers", fontsize=9.5
    )
    figure.tight_layout()
    plt.close(figure)
    return figure


@mpl.rc_context(STYLE)
def budget_by_layer(attached: Mapping[str, Adapted]) -> Figure:
    """The share of each layer in the budget, one line a mask; what is outside the layers is left out."""
    figure, axes = plt.subplots(figsize=(6.4, 3.2))
    for (label, adapted), colour in zip(attached.items(), _colours()):
        table = budget(adapted, "layer")
        inside = table[table["layer"].notna()]
        axes.plot(range(len(inside)), 100 * inside["share"], "o-", color=colour, markersize=4, label=label)
        axes.set_xticks(range(len(inside)), [str(i) for i in inside["layer"]])
    axes.set_xlabel("layer")
    axes.set_ylabel("share of the chosen entries, %")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8.5)
    figure.tight_layout()
    plt.close(figure)
    return figure


@mpl.rc_context(STYLE)
def overlap_map(attached: Mapping[str, Adapted]) -> Figure:
    """Jaccard index of every pair of masks, over the whole backbone, with what chance would give in brackets."""
    labels = list(attached)
    figure, axes = plt.subplots(figsize=(2.2 + 0.9 * len(labels), 1.4 + 0.8 * len(labels)))
    values, texts = np.ones((len(labels), len(labels))), {}
    for i, a in enumerate(labels):
        for j, b in enumerate(labels[:i]):
            table = overlap(attached[a], attached[b], "tensor")[["entries", "first", "second", "both"]].sum()
            either = table["first"] + table["second"] - table["both"]
            lucky = table["first"] * table["second"] / table["entries"]
            values[i, j] = values[j, i] = table["both"] / either if either else 0
            texts[i, j] = texts[j, i] = lucky / (table["first"] + table["second"] - lucky)
    axes.imshow(values, cmap="viridis", vmin=0, vmax=1)
    for (i, j), chance in texts.items():
        colour = "white" if values[i, j] < 0.6 else "black"
        axes.text(j, i, f"{values[i, j]:.2f}\n({chance:.2f})", ha="center", va="center", fontsize=8.5, color=colour)
    for i in range(len(labels)):
        axes.text(i, i, "1", ha="center", va="center", fontsize=8.5, color="black")
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_title("Jaccard index of the chosen entries (by chance)", fontsize=9.5, color=INK)
    figure.tight_layout()
    plt.close(figure)
    return figure


def _original(path: str) -> str:
    return f"{path.rpartition('.')[0]}.original"


def _colours() -> list[str]:
    return list(CLASSES.values())


def _grouped(rows: list[dict], by: str) -> pd.DataFrame:
    if by not in _KEYS:
        raise UnknownNameError("grouping", by, _KEYS)
    table = pd.DataFrame(rows).astype({"layer": "Int64"})
    keys = _KEYS[by]
    return (
        table.groupby(keys, sort=False, dropna=False)
        .sum(numeric_only=True)
        .reset_index()[[*keys, *(c for c in table.columns if c not in {"tensor", "stack", "layer", "site"})]]
    )


def _pieces(adapted: Adapted, chosen: Mapping[str, torch.Tensor]) -> Iterator[tuple[dict, torch.Tensor]]:
    """Each mask with its place; that of a fused projection in its parts."""
    parts, model = adapted.host.anatomy, adapted.model
    sites: dict[str, list] = {}
    for site in parts.sites():
        sites.setdefault(site.path, []).append(site)
    modules = dict(model.named_modules())
    norms = {id(m): f"norm.{kind}" for layer in parts.layers for kind, m in layer.norms.items()}
    for name, mask in chosen.items():
        path, _, leaf = name.rpartition(".")
        layer = next((x for x in parts.layers if name.startswith(f"{x.path}.")), None)
        place = {"tensor": name, "stack": layer.stack if layer else "", "layer": layer.index if layer else None}
        for site in sites.get(path, ()):
            where = place | {"tensor": str(site) + f".{leaf}", "site": site.name}
            across = mask.dim() > 1 and site.transposed
            yield where, (mask[:, site.rows] if across else mask[site.rows])
        if path not in sites:
            yield place | {"site": norms.get(id(modules[path])) or _kind(modules[path])}, mask


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return "embeddings"
    return "norm" if "Norm" in type(module).__name__ else "other"
