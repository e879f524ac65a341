"""The generated pages: taxonomy, one card a method, leaderboard, searches, conformance; with the figures they show.

Everything comes from the taxonomy, the attached methods, the store of results and the conformance file: the same
inputs give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import yaml
from matplotlib.figure import Figure

from peftlib import tasks, taxonomy
from peftlib.experiments import PROFILES, SEARCH_RATES, TIE, Log, Store, logs, read_costs
from peftlib.report import cards, conformance, costs, figures, markdown, notebooks, searches
from peftlib.report.counts import counts
from peftlib.report.standings import Standings
from peftlib.taxonomy import types

MEASURED = "embedded"
"""The profile of the leaderboard and the cards. What a notebook measures is in its chapter."""


def generate(root: Path) -> dict[str, str | bytes]:
    """All generated files, by their path below the Sphinx source."""
    standings = Standings(Store(root / "results"), MEASURED)
    matrix = conformance.read(root)
    found = [log for log in logs(root / "results") if log.spec.profile == MEASURED]
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
        "leaderboard.md": leaderboard_page(standings),
        "costs.md": costs_page(memory, step, variants),
        "searches.md": searches_page(found, structures),
        "conformance.md": conformance_page(matrix),
        "tables/profiles.md": profiles_table(),
        "tables/tracks.md": tracks_table(standings),
        "figures/taxonomy.svg": svg(figures.taxonomy_tree()),
        "figures/design-space.svg": svg(figures.design_space()),
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


# Taxonomy


def taxonomy_page(sources: cards.Sources) -> str:
    """The tree, one line a method."""
    survey, since = (sum(e.origin == origin for e in taxonomy.METHODS) for origin in ("survey", "since the survey"))
    later = f", and {since} that came after it" if since else ""
    parts = [
        "# Taxonomy",
        f"The {survey} methods of the survey {{cite:p}}`xu2023survey` in its five classes{later}. Every method has a "
        "card. The folders below `peftlib/methods/` are this tree.",
        markdown.figure(
            "figures/taxonomy.svg",
            "The taxonomy as a tree of classes, categories and methods",
            "The tree in one picture.",
        ),
    ]
    for node in taxonomy.tree():
        parts += _branch(node, 2, sources)
    return "\n\n".join(parts) + "\n"


def _branch(node: taxonomy.Node, depth: int, sources: cards.Sources) -> Iterator[str]:
    category = node.category
    yield f"({_anchor(category.path)})=\n{'#' * depth} {category.title}"
    chapter = f" [Chapter](notebooks/{category.chapter}.ipynb)." if category.chapter in sources.chapters else ""
    yield category.summary + chapter
    if node.entries:
        yield "\n".join(_line(entry, sources) for entry in node.entries)
    for child in node.children:
        yield from _branch(child, depth + 1, sources)


def _line(entry: taxonomy.Entry, sources: cards.Sources) -> str:
    links = markdown.links(entry, sources.repository, sources.chapters)
    rest = " · ".join(text for name, text in links.items() if name not in ("card", "chapter"))
    return f"- [{entry.title}](cards/{entry.name}.md): {entry.summary}" + (f" {rest}" if rest else "")


def _anchor(path: str) -> str:
    return f"taxonomy-{path.replace('/', '-').replace('_', '-')}"


def design_page() -> str:
    """Every method in the dimensions of the design space."""
    parts = [
        "# Design space",
        "The taxonomy says what a method belongs to. This page says how it works, in the dimensions that "
        "{cite:t}`he2022unified` introduced to compare adapters, prefix tuning and LoRA: what form the change has, "
        "what it modifies, how it is inserted and how it is composed with the frozen network. Prefix tuning is, in "
        "their view, a change in parallel to attention, $(1 - \\lambda) h + \\lambda \\Delta h$ with a computed "
        "$\\lambda$. The words for methods that their table does not have are ours. Methods with equal rows differ in "
        "how they train, store or choose what they change.",
        markdown.figure(
            "figures/design-space.svg",
            "Methods in rows, the words of the four dimensions in columns, a mark where a word describes a method",
            "The methods of the survey in the design space, coloured by class. Tests hold the rows to the code: what "
            "is added, what is stored in place of the network's own weights, and which methods have a fixed factor.",
        ),
        "## The words",
        *(
            f"**{title}.** " + "; ".join(f"{word}: {meaning}" for word, meaning in words.items()) + "."
            for title, words in (
                ("Form of the change", types.FORMS),
                ("Insertion", types.INSERTIONS),
                ("Composition", types.COMPOSITIONS),
            )
        ),
        "## The methods",
        markdown.table(
            ("method", "form", "modifies", "insertion", "composition"),
            [
                (f"[{e.title}](cards/{e.name}.md)", *(", ".join(words) for words in e.place))
                for e in taxonomy.METHODS
                if e.category != "baselines"
            ],
            "lllll",
        ),
    ]
    return "\n\n".join(parts) + "\n"


# Leaderboard


def leaderboard_page(standings: Standings) -> str:
    """Every track of the measured profile, from the store alone."""
    parts = [
        "# Leaderboard",
        f"What the stored runs of the profile `{standings.profile.name}` say: {standings.profile.summary}. "
        "All methods of a track share data, batch size, epochs and evaluation, and each has the learning rate that one "
        "stated search found for it; [the protocol](book/protocol.md) says how, and what the numbers cannot show. "
        "A click on a column's head sorts by it.",
    ]
    for track in standings.profile.tracks:
        parts += _track(standings, track)
    parts += _calibration(standings)
    parts += _search(standings)
    for name, profile in PROFILES.items():
        if name in ("smoke", standings.profile.name):
            continue
        other = Standings(standings.store, name)
        parts += [f"## Profile {name}", f"{profile.summary[0].upper()}{profile.summary[1:]}."]
        ran = [track for track in profile.tracks if other.rows[track]]
        for track in ran:
            parts += [f"### {track}", *_table(other, track)]
        if not ran:
            parts.append("No stored runs.")
    return "\n\n".join(parts) + "\n"


def _track(standings: Standings, track: str) -> Iterator[str]:
    settings = standings.profile.tracks[track]
    yield f"## {track.capitalize()}"
    options = ", ".join(f"`{k}={v}`" for k, v in settings.task_options.items())
    yield (
        f"Task `{settings.task}`{f' ({options})' if options else ''}, backbone `{settings.backbone}`, "
        f"{settings.epochs:g} {'epoch' if settings.epochs == 1 else 'epochs'}, batches of {settings.batch_size}, "
        f"at most {settings.max_length} tokens."
    )
    rows = standings.rows[track]
    if not rows:
        yield "No stored runs."
        return
    yield markdown.figure(
        f"figures/quality-{track}.svg",
        f"Quality against trained parameters on {track}",
        "Quality against trained parameters. The solid line is full fine-tuning, the dotted one the task head alone. "
        f"Runs: {sum(len(r['runs']) for r in rows)}, named below.",
    )
    yield from _table(standings, track)


def _table(standings: Standings, track: str) -> Iterator[str]:
    rows, metric = standings.rows[track], standings.metric(track)
    head = (
        "method",
        f"test {metric}",
        "seeds",
        "trained",
        "% of all",
        "stored",
        "ms/step",
        "peak MB",
        "learning rate",
    )
    yield markdown.table(
        head,
        [
            (
                f"[{row['method']}](cards/{row['method']}.md)",
                cards.quality(row),
                len(row["seeds"]),
                f"{row['trained']:,}",
                f"{row['percent']:.3f}",
                cards.size(row["stored_bytes"]),
                f"{1000 * row['seconds_per_step']:.0f}",
                f"{row['peak_memory'] / 1e6:,.0f}",
                f"{row['learning_rate']:g}",
            )
            for row in rows
        ],
        "lrrrrrrrr",
        name="sortable",
    )
    missing = [name for name in taxonomy.methods() if name not in {row["method"] for row in rows}]
    if missing:
        yield f"Without stored runs here: {', '.join(missing)}."
    yield markdown.dropdown(
        "The runs behind this table",
        f"{_machines(standings, track)} Files: `results/{standings.profile.name}/{track}/<method>-<seed>-<key>.json`."
        "\n\n"
        + markdown.table(
            ("method", "seeds", "keys"),
            [
                (row["method"], ", ".join(map(str, row["seeds"])), " ".join(f"`{key}`" for key in row["runs"]))
                for row in rows
            ],
        ),
    )


def _machines(standings: Standings, track: str) -> str:
    keys = {key for row in standings.rows[track] for key in row["runs"]}
    seen = {
        (p["processor"] if p["device"] == "CPU" else p["device"], p["threads"], p["versions"]["torch"])
        for p in (r["provenance"] for r in standings.records[track] if r["key"] in keys)
    }
    return " ".join(
        f"Measured on {device}, {threads} threads, torch {version}." for device, threads, version in sorted(seen)
    )


def _calibration(standings: Standings) -> Iterator[str]:
    yield "## Calibration"
    rows = standings.calibration
    if not rows:
        yield "No stored runs."
        return
    yield (
        f"How well the probabilities fit on the test split of {standings.first}, means over the runs above: the "
        "negative log-likelihood (NLL, nats a row; that of always saying one half is 0.693) and the expected "
        "calibration error (ECE, 15 bins: how far confidence is from accuracy). "
        "[Laplace-LoRA](cards/laplace_lora.md) answers with its Gaussian; beside LoRA at the same learning rate and "
        "seeds it shows what that changes."
    )
    yield markdown.table(
        ("method", f"test {standings.metric(standings.first)}", "NLL", "ECE"),
        [
            (
                f"[{row['method']}](cards/{row['method']}.md)",
                f"{row['accuracy']:.3f}",
                f"{row['nll']:.3f}",
                f"{row['ece']:.3f}",
            )
            for row in rows
        ],
        "lrrr",
        name="sortable",
    )


def _search(standings: Standings) -> Iterator[str]:
    yield "## Learning-rate search"
    tried = ", ".join(f"{rate:g}" for rate in SEARCH_RATES)
    yield (
        f"Every method is tried once at each of the rates {tried}, seed 0, on the track {standings.first}; the rate "
        f"with the best validation metric is used on every track; within {TIE:g} of the best, the lowest validation "
        "loss decides. Test data play no part."
    )
    if not standings.search:
        yield "No stored runs."
        return
    yield markdown.figure(
        "figures/search.svg",
        "Validation metric by learning rate, one panel a method",
        f"Validation metric by learning rate, {len(standings.search)} runs; the chosen rate is marked.",
    )
    values: dict[str, dict[float, float]] = {}
    metric = standings.metric(standings.first)
    for record in standings.search:
        spec = record["spec"]
        values.setdefault(spec["method"], {})[spec["learning_rate"]] = record["metrics"]["validation"][metric]
    rows = [
        (name, *(_marked(values[name].get(rate), rate == standings.rates[name]) for rate in SEARCH_RATES))
        for name in taxonomy.methods()
        if name in values
    ]
    yield markdown.table(("method", *(f"{rate:g}" for rate in SEARCH_RATES)), rows, "l" + "r" * len(SEARCH_RATES))


def _marked(value: float | None, best: bool) -> str:
    if value is None:
        return ""
    return f"**{value:.3f}**" if best else f"{value:.3f}"


# Costs


def costs_page(memory: costs.Costs, step: costs.Costs, variants: costs.Costs) -> str:
    """What a training step takes, from stored measurements."""
    settings = "on MiniLM-L6, batches of 8 rows of 64 tokens, float32"
    parts = [
        "# Costs",
        f"What training with each method takes, {settings}. The runs of the leaderboard shared their machine; these "
        "numbers are counted, or are ratios of steps that took turns, which other work on the machine moves little. "
        "`make bench` measures them on yours.",
        markdown.figure(
            "figures/costs.svg",
            "Left: memory of training by method; right: time of a step beside the floor",
            "Left: memory of training (bar) and of what comes before it, such as calibration or a first phase (mark). "
            "Right: time of a forward and backward pass beside the floor (filled) and HF peft's (hollow).",
        ),
        "## Memory",
        "The peak of all tensors that are alive at once, in MB beside the loaded backbone: before training, where "
        "something is calibrated or trained first, and in training (forward, backward and AdamW's step). Of that peak, "
        "gradients of trained parameters and AdamW's states have a column each. Methods that keep a few entries of "
        "frozen tensors have states for these entries only.",
        *_measured(costs.memory_rows(memory), memory),
        "## Time",
        "A frozen backbone that carries gradients to its embeddings, and computes none for its weights, is the floor "
        "of every method that trains something below the first layer. Time is given as a multiple of that floor, the "
        "median over turns. MB kept is what autograd holds between forward and backward, parameters not counted.",
        *_measured(costs.step_rows(step), step),
        "## Computing less",
        "AdapterDrop leaves out the adapters of the first k layers, which in training spares the backward pass through "
        "these layers; CODA lets one of n/k tokens pass each layer. Measured are a forward pass without gradients and, "
        "in rows that say training, forward and backward, on 8 rows of 128 tokens: FLOPs of matrix products by torch's "
        "counter, and the median time over turns, both beside the first variant.",
        *_measured(costs.variant_rows(variants), variants),
    ]
    return "\n\n".join(parts) + "\n"


def _measured(rows: Sequence[Mapping[str, Any]], stored: costs.Costs) -> Iterator[str]:
    if not rows:
        yield "No stored measurements."
        return
    yield markdown.table(
        tuple(rows[0]),
        [(_card(row["method"]), *list(row.values())[1:]) for row in rows],
        "l" + "r" * (len(rows[0]) - 1),
        name="sortable",
    )
    seen = sorted({(p["processor"], p["versions"]["torch"]) for p in (cost["provenance"] for cost in stored.values())})
    yield " ".join(f"Measured on {processor}, torch {version}." for processor, version in seen)


def _card(name: str) -> str:
    return f"[{name}](cards/{costs.method_of(name)}.md)"


# Searches over structures


def searches_page(found: Sequence[Log], structures: Sequence[dict[str, Any]]) -> str:
    """What AutoPEFT's and S3Delta's searches found, beside chance at equal cost."""
    parts = [
        "# Searches",
        "Two methods of the review look for the structure that they then train. Both stand here beside chance: random "
        "structures from the same space. Searches look at validation data only; test data are shown.",
        "## AutoPEFT",
        "[AutoPEFT](cards/autopeft.md) chooses three sizes (serial and parallel bottleneck, prefix length) and the "
        "layers that have them. Its outcomes are a pair, quality and number of trained parameters, so a search finds a "
        "Pareto set: the structures that no other trial beats in both. The dominated share of outcomes "
        "(hypervolume, from the score of chance to 1 and, on a log scale, from the largest structure to the smallest) "
        "puts a set into one number.",
        markdown.figure(
            "figures/searches.svg",
            "Left: trials and Pareto sets; right: dominated share of outcomes by trainings",
            "Left: every trial, and the Pareto set of each search. Right: how the dominated share grows with the "
            "number of trainings; both strategies share their first, random trials.",
        ),
    ]
    if found:
        parts.append("A trial is a training; its cost in seconds (s) includes proposing what to train.")
        parts.append(_dicts(searches.search_rows(found)))
        best = max(found, key=lambda log: (log.spec.strategy == "bayesian", log.hypervolume()))
        parts += [
            f"The Pareto set of the {best.spec.strategy} search with seed {best.spec.seed}, with its configurations "
            "(a digit a layer, from the first):",
            _dicts(searches.pareto_rows(best)),
        ]
        parts.append("Files: " + ", ".join(f"`results/{log.spec.path}`" for log in found) + ".")
    else:
        parts.append("No stored searches. `peftlib search autopeft` makes them.")
    parts += [
        "## S3Delta",
        "[S3Delta](cards/s3delta.md) trains gates on candidate changes while they compete for a fixed budget of "
        "parameters, keeps those with the highest gates and trains them anew. Random structures fill the same budget. "
        "A search costs as much as training some of them, so that it stands beside the best of as many, chosen on "
        "validation data, as took the same time. Where that time ends within a training, what was reached is that far "
        "between the best without it and the best with it.",
    ]
    if structures:
        if means := searches.structure_means(structures):
            parts += [
                "Test data: mean and standard deviation over seeds. What the search is over the best random structure, "
                "and over one taken blindly, is the mean difference seed by seed with its standard error; one of less "
                "than two of them shows no winner. Seeds at which all random structures together took less time than "
                "the search are left out:",
                _dicts(means),
                "[The protocol](book/protocol.md) says how the stored search's settings were chosen, and which did not "
                "win.",
            ]
        files = ", ".join(f"`{r['key']}`" for r in structures)
        seeds = _dicts(searches.structure_rows(structures))
        runs = f"Runs in `results/search/{MEASURED}/`: {files}."
        parts.append(markdown.dropdown("Seed by seed, and the runs", f"{seeds}\n\n{runs}"))
    else:
        parts.append("No stored searches. `peftlib search s3delta` makes them.")
    return "\n\n".join(parts) + "\n"


def _dicts(rows: Sequence[Mapping[str, Any]]) -> str:
    return markdown.table(tuple(rows[0]), [tuple(row.values()) for row in rows])


# Tables that prose pages include


def profiles_table() -> str:
    """What each profile is, and its tracks."""
    rows = [
        (f"`{name}`", f"{p.summary[0].upper()}{p.summary[1:]}.", ", ".join(p.tracks)) for name, p in PROFILES.items()
    ]
    return markdown.table(("Profile", "What it is", "Tracks"), rows) + "\n"


def tracks_table(standings: Standings) -> str:
    """The tracks of the measured profile with their data and settings."""
    rows = []
    for name, track in standings.profile.tracks.items():
        task = tasks.load(track.task, **track.task_options)
        sizes = [len(task.splits[split]) for split in ("train", "validation", "test")]
        rows.append(
            (
                name,
                task.main_metric,
                " / ".join(f"{size:,}" for size in sizes),
                f"{track.epochs:g}",
                track.batch_size,
                track.max_length,
                f"{0.5 / sizes[-1] ** 0.5:.3f}",
            )
        )
    head = ("Track", "metric", "train / validation / test rows", "epochs", "batch", "tokens at most", "test error")
    backbones = ", ".join(sorted({f"`{track.backbone}`" for track in standings.profile.tracks.values()}))
    return (
        f"Profile `{standings.profile.name}`, backbone {backbones}. The last column is the largest standard error that "
        f"an accuracy on so many test rows can have, $0.5/\\sqrt{{n}}$.\n\n{markdown.table(head, rows, 'llrrrrr')}\n"
    )


# Conformance


def conformance_page(matrix: conformance.Matrix | None) -> str:
    """The matrix method x check."""
    parts = [
        "# Conformance",
        "What every method must do, checked on tiny random models of every family that can host it. "
        "A method that cannot do one of these says why, and the suite checks that it really does not.",
    ]
    if matrix is None:
        return (
            "\n\n".join([*parts, f"There is no stored matrix: `make conformance` writes `{conformance.FILE}`."]) + "\n"
        )
    cells = [cell for row in matrix.methods.values() for cell in row.values()]
    parts.append(
        f"{sum(len(c.passed) for c in cells):,} cells hold, {sum(len(c.declined) for c in cells):,} are declined for a "
        f"stated reason, {sum(len(c.failed) for c in cells):,} fail; {len(matrix.methods)} methods, "
        f"{len(matrix.checks)} checks."
    )
    numbers = {name: number for number, name in enumerate(matrix.checks, 1)}
    parts.append("\n".join(f"{number}. {matrix.checks[name]}" for name, number in numbers.items()))
    parts.append(
        "The number in a cell says on how many families the check holds. A dash says that it is declined, there or on "
        "some families (then beside a number); an empty cell that no family can be asked. Where fewer families are "
        "counted than support the method, the others have not been run yet."
    )
    parts.append(
        markdown.table(
            ("method", *numbers.values()),
            [
                (f"[{name}](cards/{name}.md)", *(row[check].sign if check in row else "" for check in numbers))
                for name, row in matrix.methods.items()
            ],
            "l" + "r" * len(numbers),
            name="matrix",
        )
    )
    declined = [
        f"- {name}, check {numbers[check]}: {'; '.join(cell.reasons())}"
        for name, row in matrix.methods.items()
        for check, cell in row.items()
        if cell.declined
    ]
    if declined:
        parts += ["## What is declined, and why", "\n".join(declined)]
    return "\n\n".join(parts) + "\n"
