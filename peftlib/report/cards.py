"""One card a method: everything that is known and measured of it on one page."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peftlib import taxonomy
from peftlib.methods.registry import find
from peftlib.report import markdown
from peftlib.report.conformance import Matrix
from peftlib.report.counts import BACKBONES
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
    parts = [f"# {entry.title}", _place(entry), entry.summary + f" Source: {{cite:t}}`{entry.cite}`."]
    parts += [
        markdown.figure(
            f"../figures/sites-{entry.name}.svg",
            f"Where {entry.title} acts in a transformer: {', '.join(entry.sites)}",
            f"Where it acts: {', '.join(f'`{site}`' for site in entry.sites)}. "
            "One layer is drawn, as in an encoder; a gate is there in families that have one.",
        ),
        f"$$\n{entry.equation}\n$$",
        f"Here {entry.symbols}",
        _facts(entry),
    ]
    links = markdown.links(entry, sources.repository, sources.chapters, up="../")
    del links["card"]
    if entry.original:
        links["original"] = f"[original code](https://github.com/{entry.original})"
    parts.append("**Read on:** " + " · ".join([*links.values(), "[all methods](../taxonomy.md)"]))
    parts += [*_use(entry), *_counts(entry, sources), *_measured(entry, sources), *_conformance(entry, sources)]
    return "\n\n".join(parts) + "\n"


def _place(entry: Entry) -> str:
    path = entry.category.split("/")
    titles = [taxonomy.category("/".join(path[: n + 1])).title for n in range(len(path))]
    return f"`{entry.name}` · {' › '.join(titles)}"


def _facts(entry: Entry) -> str:
    merge = "Folds exactly into plain weights" if entry.merge == "exact" else "Does not fold into plain weights"
    form, modifies, insertion, composition = (", ".join(words) for words in entry.place)
    facts = {
        "Design space": f"Form: {form}. Modifies: {modifies}. Insertion: {insertion}. Composition: {composition}. "
        "[The words](../design-space.md)",
        "Trains": entry.trains,
        "Starts": f"{_START[entry.start]}. {entry.start_note}",
        "Merge": f"{merge}. {entry.merge_note}",
        "Beside gradient steps": "; ".join(entry.life) or "Nothing.",
        "Trained parameters": f"`{entry.count}`, without the task head",
    }
    return "\n\n".join(f"{name}\n: {text}" for name, text in facts.items())


def _use(entry: Entry) -> Iterator[str]:
    cls = find(entry.name)
    fields = dataclasses.fields(cls.Config)
    numbers = [f for f in fields if type(f.default) in (int, float)]
    given = "".join(f", {f.name}={f.default!r}" for f in numbers[:2])
    yield "## Use"
    yield f'```python\nadapted = peftlib.attach(model, "{entry.name}"{given})\n```'
    if fields:
        options = ", ".join(f"`{f.name}={f.default!r}`" for f in fields)
        yield f"Options and defaults: {options}."
    document = inspect.getdoc(cls.Config)
    if fields and document and not document.startswith(f"{cls.Config.__name__}("):
        yield document.replace("``", "`")
    yield f"Default learning rate of `peftlib.fit`: {cls.learning_rate:g}."


def _counts(entry: Entry, sources: Sources) -> Iterator[str]:
    rows, notes = [], []
    for backbone, (title, _) in BACKBONES.items():
        found = sources.counts[entry.name][backbone]
        if "unsupported" in found:
            rows.append((title, "–", "–", "–", "–"))
            notes.append(f"{title}: {found['unsupported']}")
            continue
        rows.append(
            (
                title,
                f"{found['trained']:,}",
                f"{found['head']:,}" if found["head"] else "–",
                f"{found['percent']:.3f}",
                size(found["stored_bytes"]),
            )
        )
    yield "## Parameters on published backbones"
    yield (
        "Counted on the attached method at its default options, on the published shapes without weights; "
        "before calibration where a method has one, stored size then being an upper bound."
    )
    yield markdown.table(("Backbone", "trained", "of which head", "% of all", "stored"), rows, "lrrrr")
    yield from notes


def _measured(entry: Entry, sources: Sources) -> Iterator[str]:
    yield "## Measured"
    standings = sources.standings
    rows = [
        (
            track,
            f"{standings.metric(track)} {quality(row)}",
            len(row["seeds"]),
            f"{row['trained']:,}",
            f"{1000 * row['seconds_per_step']:.0f}",
            f"{row['learning_rate']:g}",
            " ".join(f"`{key}`" for key in row["runs"]),
        )
        for track, row in standings.of(entry.name).items()
    ]
    if not rows:
        yield "No stored runs."
        return
    yield (
        f"Test split, profile `{standings.profile.name}`: mean and standard deviation over seeds, at the learning rate "
        "that the [stated search](../book/protocol.md) found; all methods are on the [leaderboard](../leaderboard.md)."
    )
    head = ("Track", "quality", "seeds", "trained", "ms/step", "learning rate", "runs")
    yield markdown.table(head, rows, "lrrrrrl")
    above = standings.above_head(entry.name)
    if above is not None and entry.name != "head":
        points = f"{100 * abs(above):.1f} points {'above' if above > 0 else 'below'}"
        yield f"On {standings.first} it is {points} training the head alone. {entry.below_head}".strip()


def _conformance(entry: Entry, sources: Sources) -> Iterator[str]:
    yield "## Conformance"
    if sources.matrix is None or entry.name not in sources.matrix.methods:
        yield "No stored result of the conformance suite."
        return
    rows = []
    for check, cell in sources.matrix.methods[entry.name].items():
        families = ", ".join(cell.passed) or "–"
        rest = cell.reasons() + ([f"fails on {', '.join(cell.failed)}"] if cell.failed else [])
        rows.append((sources.matrix.checks[check], families, "; ".join(rest)))
    tally = sources.matrix.tally(entry.name)
    yield (
        f"{tally['passed']} checks hold on every family that can host it"
        + (f", {tally['declined']} are declined for a stated reason" if tally["declined"] else "")
        + (f", {tally['failed']} fail" if tally["failed"] else "")
        + "; [the whole matrix](../conformance.md)."
    )
    yield markdown.dropdown("Check by check", markdown.table(("Check", "holds on", "does not hold"), rows))


def quality(row: dict[str, Any]) -> str:
    """Mean and standard deviation of a row; one seed has no deviation."""
    return f"{row['mean']:.3f} ± {row['std']:.3f}" if len(row["seeds"]) > 1 else f"{row['mean']:.3f}"


def size(count: int) -> str:
    """Bytes in a unit that reads well."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
