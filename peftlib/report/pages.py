"""The generated pages: taxonomy, one card a method, leaderboard, searches, conformance; with the figures they show.

Everything comes from the taxonomy, the attached methods, the store of results and the conformance file: the same
inputs give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import yaml
from markupsafe import Markup
from matplotlib.figure import Figure

from peftlib import tasks, taxonomy
from peftlib.experiments import PROFILES, RATES, SEARCH_RATES, TIE, Log, Store, logs, read_costs
from peftlib.report import cards, conformance, costs, figures, house, notebooks, searches
from peftlib.report.counts import counts
from peftlib.report.rendering import code, link, render
from peftlib.report.standings import Standings
from peftlib.taxonomy import types

MEASURED = "embedded"
"""The profile of the leaderboard and the cards. What a notebook measures is in its chapter."""


def generate(root: Path) -> dict[str, str | bytes]:
    """All generated files, by their path below the Sphinx source."""
    standings = Standings(Store(root / "results"), MEASURED)
    matrix = conformance.read(root)
    found = [log for log in logs(root / "results", "autopeft") if log.spec.profile == MEASURED]
    structures = [
        record
        for track in standings.profile.tracks
        for record in Store(root / "results/search").records(MEASURED, track)
    ]
    memory, step, variants = (
        read_costs(kind, PROFILES[MEASURED].backbone, root / "results") for kind in ("memory", "step", "variants")
    )
    sources = cards.Sources(
        counts=counts(root),
        standings=standings,
        matrix=matrix,
        chapters={path.stem: path.read_text() for path in notebooks.sources(root=root)},
        repository=repository(root),
    )
    files: dict[str, str | bytes] = {
        "taxonomy.md": taxonomy_page(sources),
        "design-space.md": design_page(),
        "house.md": house_page(sources.repository),
        "leaderboard.md": leaderboard_page(standings),
        "costs.md": costs_page(memory, step, variants),
        "searches.md": searches_page(found, structures),
        "conformance.md": conformance_page(matrix),
        "tables/profiles.md": profiles_table(),
        "tables/tracks.md": tracks_table(standings),
        "figures/taxonomy.svg": svg(figures.taxonomy_tree()),
        "figures/design-space.svg": svg(figures.design_space()),
        "figures/house.svg": svg(house.house()),
        "figures/costs.svg": svg(costs.cost_figure(memory, step)),
        "figures/searches.svg": svg(searches.search_figure(found)),
    }
    drawn: dict[frozenset[str], bytes] = {}
    for entry in taxonomy.METHODS:
        files[f"cards/{entry.name}.md"] = cards.page(entry, sources)
        sites = frozenset(entry.sites)
        if sites not in drawn:
            drawn[sites] = svg(figures.sites_diagram(entry.name, title=False))
        files[f"figures/sites-{entry.name}.svg"] = drawn[sites]
    for track, rows in standings.rows.items():
        metric = standings.metric(track) if rows else ""
        files[f"figures/quality-{track}.svg"] = svg(figures.quality_against_parameters(rows, metric))
    if standings.search:
        metric = standings.metric(standings.first)
        files["figures/search.svg"] = svg(figures.learning_rate_search(standings.search, metric))
    return files


def repository(root: Path) -> str:
    """Where the repository's files can be read: the address of ``_config.yml`` and its branch."""
    settings = yaml.safe_load((root / "_config.yml").read_text())["repository"]
    return f"{settings['url']}/blob/{settings['branch']}"


def quality_figure(store: Store, profile_name: str = MEASURED) -> bytes:
    """Quality against trained parameters on a profile's first track, as SVG: the figure of README.md."""
    standings = Standings(store, profile_name)
    rows = standings.rows[standings.first]
    metric = standings.metric(standings.first) if rows else ""
    return svg(figures.quality_against_parameters(rows, metric))


def svg(figure: Figure) -> bytes:
    """A figure as SVG, the same bytes each time."""
    with mpl.rc_context({"svg.hashsalt": "peftlib"}), io.BytesIO() as buffer:
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        return buffer.getvalue()


# The pages: what stands in their templates


def taxonomy_page(sources: cards.Sources) -> str:
    """The tree, one line a method."""
    survey, since = (sum(e.origin == origin for e in taxonomy.METHODS) for origin in ("survey", "since the survey"))

    def links(entry: taxonomy.Entry) -> list[Markup]:
        found = cards.links(entry, sources)
        return [found[name] for name in ("paper", "code") if name in found]

    return render(
        "taxonomy.md.j2",
        survey=survey,
        since=since,
        tree=taxonomy.tree(),
        chapters=sources.chapters,
        links=links,
    )


def design_page() -> str:
    """Every method in the dimensions of the design space."""
    words = {
        "Form of the change": types.FORMS,
        "Insertion": types.INSERTIONS,
        "Composition": types.COMPOSITIONS,
    }
    rows = [
        {"method": link(entry.title, _card(entry.name)), **cards.place(entry)}
        for entry in taxonomy.METHODS
        if entry.category != "baselines"
    ]
    return render("design-space.md.j2", words=words, rows=rows)


def house_page(repository: str) -> str:
    """The library's rooms and what each imports."""
    rows = [
        {"room": code(room.name), "what is there": Markup(room.says), "it imports": ", ".join(room.imports)}
        for room in reversed(house.rooms())
    ]
    return render("house.md.j2", rows=rows, contributing=f"{repository}/CONTRIBUTING.md")


def leaderboard_page(standings: Standings) -> str:
    """Every track of the measured profile, from the store alone."""
    others = [name for name in PROFILES if name not in ("smoke", standings.profile.name)]
    return render(
        "leaderboard.md.j2",
        standings=standings,
        others=[Standings(standings.store, name) for name in others],
        methods=taxonomy.methods(),
        rates=SEARCH_RATES,
        all_rates=RATES,
        tie=TIE,
        track_rows=_track_rows,
        run_rows=_run_rows,
        machines=_machines,
        calibration_rows=_calibration_rows,
        search_rows=_search_rows,
    )


def _track_rows(standings: Standings, track: str) -> list[dict[str, Any]]:
    return [
        {
            "method": link(row["method"], _card(row["method"])),
            f"test {standings.metric(track)}": cards.quality(row),
            "seeds": len(row["seeds"]),
            "trained": f"{row['trained']:,}",
            "% of all": f"{row['percent']:.3f}",
            "stored": cards.size(row["stored_bytes"]),
            "ms/step": f"{1000 * row['seconds_per_step']:.0f}",
            "peak MB": f"{row['peak_memory'] / 1e6:,.0f}",
            "learning rate": f"{row['learning_rate']:g}",
        }
        for row in standings.rows[track]
    ]


def _run_rows(standings: Standings, track: str) -> list[dict[str, Any]]:
    return [
        {
            "method": row["method"],
            "seeds": ", ".join(map(str, row["seeds"])),
            "keys": Markup(" ").join(map(code, row["runs"])),
        }
        for row in standings.rows[track]
    ]


def _machines(standings: Standings, track: str) -> list[tuple[str, int, str]]:
    """Device, threads and version of torch, of each machine that the track's runs were on."""
    keys = {key for row in standings.rows[track] for key in row["runs"]}
    seen = {
        (p["processor"] if p["device"] == "CPU" else p["device"], p["threads"], p["versions"]["torch"])
        for p in (r["provenance"] for r in standings.records[track] if r["key"] in keys)
    }
    return sorted(seen)


def _calibration_rows(standings: Standings) -> list[dict[str, Any]]:
    return [
        {
            "method": link(row["method"], _card(row["method"])),
            f"test {standings.metric(standings.first)}": f"{row['accuracy']:.3f}",
            "NLL": f"{row['nll']:.3f}",
            "ECE": f"{row['ece']:.3f}",
        }
        for row in standings.calibration
    ]


def _search_rows(standings: Standings) -> list[dict[str, Any]]:
    """Validation metric by learning rate, the chosen one in bold."""
    values: dict[str, dict[float, float]] = {}
    metric = standings.metric(standings.first)
    for record in standings.search:
        spec = record["spec"]
        values.setdefault(spec["method"], {})[spec["learning_rate"]] = record["metrics"]["validation"][metric]
    return [
        {
            "method": name,
            **{f"{r:g}": _marked(values[name].get(r), r == standings.rates[name]) for r in standings.searched_rates},
        }
        for name in taxonomy.methods()
        if name in values
    ]


def _marked(value: float | None, best: bool) -> str:
    if value is None:
        return ""
    return Markup(f"**{value:.3f}**") if best else f"{value:.3f}"


def costs_page(memory: costs.Costs, step: costs.Costs, variants: costs.Costs) -> str:
    """What a training step takes, from stored measurements."""
    return render(
        "costs.md.j2",
        memory=_measured(costs.memory_rows(memory), memory),
        step=_measured(costs.step_rows(step), step),
        variants=_measured(costs.variant_rows(variants), variants),
    )


def _measured(rows: Sequence[Mapping[str, Any]], stored: costs.Costs) -> dict[str, list]:
    """The rows with links to cards, and processor and version of torch of each machine that they were measured on."""
    seen = {(p["processor"], p["versions"]["torch"]) for p in (cost["provenance"] for cost in stored.values())}
    linked = [{**row, "method": link(row["method"], _card(costs.method_of(row["method"])))} for row in rows]
    return {"rows": linked, "machines": sorted(seen)}


def searches_page(found: Sequence[Log], structures: Sequence[dict[str, Any]]) -> str:
    """What AutoPEFT's and S3Delta's searches found, beside chance at equal cost."""
    best = max(found, key=lambda log: (log.spec.strategy == "bayesian", log.hypervolume()), default=None)
    return render(
        "searches.md.j2",
        logs=found,
        searches=searches.search_rows(found),
        best=best,
        pareto=searches.pareto_rows(best) if best else [],
        records=structures,
        means=searches.structure_means(structures),
        structures=searches.structure_rows(structures),
        profile=MEASURED,
    )


def profiles_table() -> str:
    """What each profile is, and its tracks: a table that prose pages include."""
    rows = [
        {
            "Profile": code(name),
            "What it is": f"{profile.summary[0].upper()}{profile.summary[1:]}.",
            "Tracks": ", ".join(profile.tracks),
        }
        for name, profile in PROFILES.items()
    ]
    return render("profiles.md.j2", rows=rows)


def tracks_table(standings: Standings) -> str:
    """The tracks of the measured profile with their data and settings: a table that prose pages include."""
    rows = []
    for name, track in standings.profile.tracks.items():
        task = tasks.load(track.task, **track.task_options)
        sizes = [len(task.splits[split]) for split in ("train", "validation", "test")]
        rows.append(
            {
                "Track": name,
                "metric": task.main_metric,
                "train / validation / test rows": " / ".join(f"{size:,}" for size in sizes),
                "epochs": f"{track.epochs:g}",
                "batch": track.batch_size,
                "tokens at most": track.max_length,
                "test error": f"{0.5 / sizes[-1] ** 0.5:.3f}",
            }
        )
    backbones = sorted({track.backbone for track in standings.profile.tracks.values()})
    return render("tracks.md.j2", profile=standings.profile, backbones=backbones, rows=rows)


def conformance_page(matrix: conformance.Matrix | None) -> str:
    """The matrix method x check."""
    if matrix is None:
        return render("conformance.md.j2", matrix=None, file=conformance.FILE)
    cells = [cell for row in matrix.methods.values() for cell in row.values()]
    numbers = {name: number for number, name in enumerate(matrix.checks, 1)}
    return render(
        "conformance.md.j2",
        matrix=matrix,
        held=sum(len(cell.passed) for cell in cells),
        refused=sum(len(cell.declined) for cell in cells),
        failed=sum(len(cell.failed) for cell in cells),
        rows=[
            {
                "method": link(name, _card(name)),
                **{number: row[check].sign if check in row else "" for check, number in numbers.items()},
            }
            for name, row in matrix.methods.items()
        ],
        declined=[
            (name, numbers[check], cell.reasons())
            for name, row in matrix.methods.items()
            for check, cell in row.items()
            if cell.declined
        ],
    )


def _card(method: str) -> str:
    return f"cards/{method}.md"
