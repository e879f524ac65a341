"""One card a method: everything that is known and measured of it on one page."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from peftlib import taxonomy
from peftlib.methods.registry import find
from peftlib.report.conformance import Matrix
from peftlib.report.counts import BACKBONES
from peftlib.report.rendering import code, link, render
from peftlib.report.standings import Standings
from peftlib.taxonomy import Entry

_START = {
    "identity": "The output is exactly the backbone's",
    "near": "The output is close to the backbone's",
    "changed": "The output differs from the backbone's by nature",
}


@dataclass(frozen=True)
class Sources:
    """What the cards are made from."""

    counts: dict[str, dict[str, dict[str, Any]]]
    standings: Standings
    matrix: Matrix | None
    chapters: dict[str, str]
    """The notebooks of the book: name without suffix -> text."""
    repository: str
    """Address of the repository's files: ``<url>/blob/<branch>``."""


def page(entry: Entry, sources: Sources) -> str:
    """The card of one method as a MyST page below ``cards/``."""
    found = links(entry, sources, up="../")
    del found["card"]
    if entry.original:
        found["original"] = link("original code", f"https://github.com/{entry.original}")
    path = entry.category.split("/")
    return render(
        "card.md.j2",
        entry=entry,
        titles=[taxonomy.category("/".join(path[: n + 1])).title for n in range(len(path))],
        place=place(entry),
        start=_START[entry.start],
        links=[*found.values(), link("all methods", "../taxonomy.md")],
        **_facts(entry, sources),
    )


def links(entry: Entry, sources: Sources, up: str = "") -> dict[str, Markup]:
    """Where a reader can go on from a method: card, paper, chapter and code, those that there are. A chapter that does
    not have the method yet is not linked. ``up`` leads from the page to the source's root."""
    found = {"card": link("card", f"{up}cards/{entry.name}.md")}
    if entry.arxiv:
        found["paper"] = link(f"arXiv:{entry.arxiv}", f"https://arxiv.org/abs/{entry.arxiv}")
    if f'"{entry.name}"' in sources.chapters.get(entry.chapter, "").replace("\\", ""):
        found["chapter"] = link("chapter", f"{up}notebooks/{entry.chapter}.ipynb")
    found["code"] = link("code", f"{sources.repository}/{entry.file}")
    return found


def place(entry: Entry) -> dict[str, str]:
    """Where a method stands in the design space: dimension -> its words."""
    return {
        dimension: ", ".join(words)
        for dimension, words in zip(("form", "modifies", "insertion", "composition"), entry.place)
    }


def _facts(entry: Entry, sources: Sources) -> dict[str, Any]:
    """What a card says of a method that is there: its use, its counts, its runs, its row of the conformance matrix."""
    standings, matrix = sources.standings, sources.matrix
    counts, unsupported = _counts(entry, sources)
    checked = matrix if matrix is not None and entry.name in matrix.methods else None
    return {
        "use": _use(entry),
        "counts": counts,
        "unsupported": unsupported,
        "measured": _measured(entry, standings),
        "profile": standings.profile.name,
        "first_track": standings.first,
        "above_head": None if entry.name == "head" else standings.above_head(entry.name),
        "conformance": _conformance(entry, checked) if checked else [],
        "tally": checked.tally(entry.name) if checked else {},
    }


def _use(entry: Entry) -> dict[str, Any]:
    cls = find(entry.name)
    fields = dataclasses.fields(cls.Config)
    numbers = [f for f in fields if type(f.default) in (int, float)]
    document = inspect.getdoc(cls.Config) or ""
    # A dataclass without a docstring has its signature for one.
    written = not document.startswith(f"{cls.Config.__name__}(")
    return {
        "given": "".join(f", {f.name}={f.default!r}" for f in numbers[:2]),
        "options": [f"{f.name}={f.default!r}" for f in fields],
        "document": document.replace("``", "`") if written else "",
        "learning_rate": cls.learning_rate,
    }


def _counts(entry: Entry, sources: Sources) -> tuple[list[dict[str, str]], dict[str, str]]:
    """One row a backbone; and why, of those that cannot host the method."""
    rows, unsupported = [], {}
    for backbone, (title, _) in BACKBONES.items():
        found = sources.counts[entry.name][backbone]
        row = dict.fromkeys(("Backbone", "trained", "of which head", "% of all", "stored"), "–") | {"Backbone": title}
        if "unsupported" in found:
            unsupported[title] = found["unsupported"]
        else:
            row |= {
                "trained": f"{found['trained']:,}",
                "of which head": f"{found['head']:,}" if found["head"] else "–",
                "% of all": f"{found['percent']:.3f}",
                "stored": size(found["stored_bytes"]),
            }
        rows.append(row)
    return rows, unsupported


def _measured(entry: Entry, standings: Standings) -> list[dict[str, Any]]:
    return [
        {
            "Track": track,
            "quality": f"{standings.metric(track)} {quality(row)}",
            "seeds": len(row["seeds"]),
            "trained": f"{row['trained']:,}",
            "ms/step": f"{1000 * row['seconds_per_step']:.0f}",
            "learning rate": f"{row['learning_rate']:g}",
            "runs": Markup(" ").join(map(code, row["runs"])),
        }
        for track, row in standings.of(entry.name).items()
    ]


def _conformance(entry: Entry, matrix: Matrix) -> list[dict[str, str]]:
    rows = []
    for check, cell in matrix.methods[entry.name].items():
        rest = cell.reasons() + ([f"fails on {', '.join(cell.failed)}"] if cell.failed else [])
        holds = ", ".join(cell.passed) or "–"
        rows.append({"Check": matrix.checks[check], "holds on": holds, "does not hold": "; ".join(rest)})
    return rows


def quality(row: dict[str, Any]) -> str:
    """Mean and standard deviation of a row; one seed has no deviation."""
    return f"{row['mean']:.3f} ± {row['std']:.3f}" if len(row["seeds"]) > 1 else f"{row['mean']:.3f}"


def size(count: int) -> str:
    """Bytes in a unit that reads well."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
