"""The ``peftlib`` command: parses, calls, prints."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from peftlib.errors import PeftlibError

out = Console()


def methods(args: argparse.Namespace) -> int:
    from peftlib import taxonomy

    table = Table("method", "class", "origin", "paper", "start", "merge", title="Methods in the survey's order")
    for entry in map(taxonomy.entry, taxonomy.methods(args.category)):
        paper = entry.arxiv or entry.cite
        table.add_row(entry.name, entry.category, entry.origin, paper, entry.start, entry.merge)
    out.print(table)
    return 0


def card(args: argparse.Namespace) -> int:
    from peftlib import taxonomy
    from peftlib.taxonomy import options

    entry = taxonomy.entry(args.method)
    values, rate = options.options(entry), options.learning_rate(entry)
    facts = [
        f"# {entry.title} (`{entry.name}`)",
        entry.summary,
        f"$$ {entry.equation} $$",
        entry.symbols,
        f"- **acts at** {', '.join(entry.sites)}",
        f"- **trains** {entry.trains}",
        f"- **count** `{entry.count}`",
        f"- **start** {entry.start}. {entry.start_note}",
        f"- **merge** {entry.merge}. {entry.merge_note}",
        *(f"- **during training** {line}" for line in entry.life),
        f"- **paper** arXiv:{entry.arxiv}" if entry.arxiv else f"- **paper** {entry.cite}",
        f"- **origin** {entry.origin}",
        f"- **options** `{', '.join(f'{n}={v!r}' for n, v in values.items()) or 'none'}`; learning rate `{rate:g}`",
    ]
    out.print(Markdown("\n\n".join(facts[:4]) + "\n\n" + "\n".join(facts[4:])))
    return 0


def run(args: argparse.Namespace) -> int:
    from peftlib import experiments

    spec = experiments.run_spec(
        args.profile,
        args.track,
        args.method,
        seed=args.seed,
        learning_rate=args.lr,
        options=_options(args.option),
        changes=_options(args.set),
    )
    store = experiments.Store(args.results)
    outcome = experiments.run(spec, store, progress=True)
    if outcome == "failed":
        record = json.loads((store.root / "failed" / store.path(spec).relative_to(store.root)).read_text())
        raise PeftlibError(f"{spec.label} failed: {record['error']}")
    _results(experiments.summarize([_read(store.path(spec))], _metric(store.path(spec))))
    out.print(f"{'already there' if outcome == 'there' else 'written'}: {store.path(spec)}")
    return 0


def sweep(args: argparse.Namespace) -> int:
    from peftlib import experiments, taxonomy

    chosen = experiments.profile(args.profile)
    store = experiments.Store(args.results)
    names = args.methods or taxonomy.methods()
    tracks = args.tracks or list(chosen.tracks)
    settings = {"executor": args.executor, "workers": args.workers}
    if args.search:
        outcomes = experiments.search_rates(args.profile, names, store, **settings)
    else:
        rates = {name: None if args.default_rates else _searched_rate(store, chosen, name) for name in names}
        specs = [
            experiments.run_spec(args.profile, track, name, seed=seed, learning_rate=rates[name])
            for track in tracks
            for name in names
            for seed in args.seeds
        ]
        outcomes = experiments.sweep(specs, store, **settings)
    out.print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))
    return 1 if outcomes["failed"] else 0


def search(args: argparse.Namespace) -> int:
    from peftlib import experiments

    settings = {name: getattr(args, name) for name in ("strategy", "initial", "batch", "surrogate")}
    failed = 0
    for found in experiments.search_structures(
        args.method,
        args.profile,
        args.track,
        seeds=args.seeds,
        trials=args.trials,
        settings={name: value for name, value in settings.items() if value is not None},
        options=_options(args.option),
        learning_rate=args.lr,
        changes=_options(args.set),
        root=args.results,
        workers=args.workers,
    ):
        if isinstance(found, experiments.Log):
            _front(found)
        else:
            out.print(", ".join(f"{count} {outcome}" for outcome, count in sorted(found.items())))
            failed += found["failed"]
    return 1 if failed else 0


def conformance(args: argparse.Namespace) -> int:
    from peftlib.conformance import suite

    failed = 0
    for method in args.methods:
        table = Table("check", *suite.SIGNS, title=f"{method}: families by outcome")
        for check, cells in suite.run(method, args.family or (), args.check or ()):
            columns = {sign: [f for f, cell in cells.items() if cell.partition(":")[0] == sign] for sign in suite.SIGNS}
            table.add_row(check, *(", ".join(families) for families in columns.values()))
            for family in columns["fails"]:
                failed += 1
                out.print(f"[red]{method}, {check} on {family}[/red]: {cells[family]}", highlight=False, soft_wrap=True)
        out.print(table)
    return 1 if failed else 0


def fingerprint(args: argparse.Namespace) -> int:
    from peftlib import taxonomy
    from peftlib.conformance import fingerprint as source

    recorded, changed = source.read(args.results), []
    for method in args.methods or taxonomy.methods():
        now = source.take(method)
        found = source.differences(recorded.methods.get(method, {}), now, args.tolerance)
        if found:
            changed.append(method)
            recorded.record(method, now)
            out.print(f"{method}: {len(found)} numbers differ, the first {found[0]}", highlight=False, soft_wrap=True)
    if args.record and changed:
        out.print(f"recorded: {', '.join(changed)} in {source.write(args.results, recorded)}")
    elif not changed:
        out.print("as recorded")
    return 1 if changed and not args.record else 0


def stale(args: argparse.Namespace) -> int:
    from peftlib import experiments

    found = experiments.stale(args.results)
    for run in found:
        out.print(f"{run.path}  {run.then} -> {run.now or 'not recorded'}", highlight=False, soft_wrap=True)
    out.print(f"{len(found)} runs are of a method as it no longer is")
    return 1 if found else 0


def results(args: argparse.Namespace) -> int:
    from peftlib import experiments

    store = experiments.Store(args.results)
    for track in experiments.profile(args.profile).tracks:
        records = store.records(args.profile, track)
        if records:
            _results(experiments.summarize(records, records[0]["metric"], args.split), f"{args.profile}: {track}")
    if args.figure:
        from peftlib.report import pages

        with open(args.figure, "wb") as file:
            file.write(pages.quality_figure(store, args.profile))
        out.print(f"written: {args.figure}")
    return 0


def backbones(args: argparse.Namespace) -> int:
    from peftlib import backbones as source

    out.print("\n".join(source.names()))
    out.print("[dim]and any model of a known family by its hub name or folder[/dim]")
    return 0


def convert(args: argparse.Namespace) -> int:
    from pathlib import Path

    from peftlib import convert as source
    from peftlib import saved, tasks

    texts = []
    for name in args.texts:
        file = Path(name)
        texts += file.read_text().splitlines() if file.is_file() else tasks.texts(name)
    given = {name: getattr(args, name) for name in ("steps", "objective", "seed") if getattr(args, name) is not None}
    options = _options(args.option)
    converted = source(args.backbone, args.method, [t for t in texts if t.strip()], **given, **options)
    out.print(f"{args.method} for {args.backbone}: {converted.notes['conversion']['steps']} steps, in the cache")
    if args.to:
        out.print(f"Written: {saved.write(converted, args.to)}")
    return 0


def inspect(args: argparse.Namespace) -> int:
    import dataclasses

    from peftlib import inspect as look

    found = look(args.folder)
    text = json.dumps(dataclasses.asdict(found), indent=2, default=str) if args.json else str(found)
    out.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


def import_(args: argparse.Namespace) -> int:
    from peftlib import from_adapters, from_hf_peft

    read = from_adapters if args.format == "adapters" else from_hf_peft
    adapted = read(_backbone_of(args), args.folder)
    out.print(f"{adapted.name}, {adapted.count().trained:,} parameters. Written: {adapted.save(args.to)}")
    return 0


def export(args: argparse.Namespace) -> int:
    from peftlib import load, to_hf_peft

    adapted = load(_backbone_of(args), args.folder)
    out.print(f"{adapted.name}, {adapted.count().trained:,} parameters. Written: {to_hf_peft(adapted, args.to)}")
    return 0


def _backbone_of(args: argparse.Namespace):
    """The model that an adapter's folder was made for."""
    from peftlib import backbones
    from peftlib import inspect as look

    head = args.head or look(args.folder).head
    if not head:
        raise PeftlibError(f"{args.folder} does not say which head its model has; give --head, such as causal_lm")
    return backbones.load(args.backbone, head=head, num_labels=args.labels).model


def notebooks(args: argparse.Namespace) -> int:
    from peftlib.report import notebooks as source

    return source.main(args.profile, args.names, force=args.force)


def book(args: argparse.Namespace) -> int:
    from peftlib.report import book as source

    return source.main(args.profile, execute=not args.no_execute)


def bench(args: argparse.Namespace) -> int:
    from peftlib import experiments
    from peftlib.efficiency import bench as step
    from peftlib.efficiency import memory, speed

    compare, table = {
        "step": (step.compare, step.table),
        "memory": (memory.compare, memory.table),
        "variants": (speed.compare_known, speed.table),
    }[args.kind]
    rows = []
    for row in compare(args.methods, backbone=args.backbone):
        rows.append(row)
        if args.store:
            path = experiments.write_costs(args.kind, args.backbone, [row], args.results)
    out.print(table(rows))
    if args.store:
        out.print(f"stored in {path}")
    return 0


def plan(args: argparse.Namespace) -> int:
    from peftlib.efficiency import planner

    plans = [
        planner.plan(
            args.backbone,
            method,
            batch_size=args.batch_size,
            length=args.length,
            precision=args.precision,
            optimizer=args.optimizer,
            checkpointing=args.checkpointing,
            head=args.head,
        )
        for method in args.methods
    ]
    out.print(planner.table(plans, args.gpu))
    return 0


def _options(pairs: Sequence[str]) -> dict:
    """``name=value`` pairs; values are JSON where they parse as it, else text."""
    found = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals:
            raise PeftlibError(f"{pair!r} is not name=value")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _read(path):
    from peftlib.experiments.store import read

    return read(path)


def _metric(path) -> str:
    return _read(path)["metric"]


def _searched_rate(store, chosen, method: str) -> float | None:
    """The rate that the search on the profile's first track found; None where there was no search."""
    from peftlib.experiments.store import best_rate

    runs = store.searched(chosen.name, next(iter(chosen.tracks)), method)
    return best_rate(runs, runs[0]["metric"]) if runs else None


def _front(log) -> None:
    """The Pareto set of a search, and what it dominates."""
    title = f"Seed {log.spec.seed}: no other trial is better and smaller"
    table = Table("parameters", "validation", "test", "structure", title=title)
    for trial in log.pareto():
        table.add_row(
            f"{trial['parameters']:,}", f"{trial['score']:.4f}", f"{trial['test']:.4f}", str(trial["options"])
        )
    out.print(table)
    out.print(f"dominated share of outcomes: {log.hypervolume():.3f}")


def _results(rows: list[dict], title: str | None = None) -> None:
    table = Table("method", "rate", "mean", "std", "seeds", "trained", "%", "stored kB", "s/step", title=title)
    for row in sorted(rows, key=lambda r: -r["mean"]):
        table.add_row(
            row["method"],
            f"{row['learning_rate']:g}",
            f"{row['mean']:.4f}",
            f"{row['std']:.4f}",
            ",".join(map(str, row["seeds"])),
            f"{row['trained']:,}",
            f"{row['percent']:.3f}",
            f"{row['stored_bytes'] / 1000:,.0f}",
            f"{row['seconds_per_step']:.3f}",
        )
    out.print(table)


def _import_methods(args: argparse.Namespace) -> None:
    """Where a method is given as ``module:Class``, import it from the present folder and go on with its name."""
    given = [*(getattr(args, "methods", None) or ()), getattr(args, "method", "")]
    if not any(":" in name for name in given):
        return
    from peftlib.methods.registry import named

    sys.path.insert(0, os.getcwd())
    if "methods" in args:
        args.methods = [named(name) for name in args.methods or ()]
    else:
        args.method = named(args.method)


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    top = argparse.ArgumentParser(prog="peftlib", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(function, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(function.__name__.rstrip("_"), help=summary, description=summary)
        sub.set_defaults(function=function)
        return sub

    def stored(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub.add_argument("--profile", default="embedded", help="smoke, embedded (default), glue or paper")
        sub.add_argument("--results", default="results", help="folder of the run files (default: results)")
        return sub

    sub = command(methods, "list the methods in the survey's order")
    sub.add_argument("category", nargs="?", help="a part of the taxonomy, such as additive/adapters")
    sub = command(card, "what a method is: equation, sites, what trains, merge, options")
    sub.add_argument("method")
    sub = stored(command(run, "one run: train, measure, record"))
    sub.add_argument("method")
    sub.add_argument("--track", help="default: the profile's first")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--lr", type=float, help="default: the method's own")
    sub.add_argument("-o", "--option", action="append", metavar="NAME=VALUE", help="an option of the method")
    sub.add_argument("-s", "--set", action="append", metavar="NAME=VALUE", help="a setting of the track")
    sub = stored(command(sweep, "every run that the store lacks; interrupt it anywhere, the same call goes on"))
    sub.add_argument("--methods", nargs="+", metavar="NAME", help="default: all that are available")
    sub.add_argument("--tracks", nargs="+", metavar="NAME", help="default: all of the profile")
    sub.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    sub.add_argument("--search", action="store_true", help="the learning-rate search, on the profile's first track")
    sub.add_argument("--default-rates", action="store_true", help="the methods' own rates, not those the search found")
    sub.add_argument("--executor", default="local", help="local (default) or ray")
    sub.add_argument("--workers", type=int, default=1, help="runs at a time (default: 1)")
    sub = stored(command(search, "search structures; interrupt it anywhere, the same call goes on"))
    sub.add_argument("method", help="one that has a search over its structures")
    sub.add_argument("--track", help="default: the profile's first")
    sub.add_argument(
        "--trials", type=int, help="trainings a seed, or structures to compare with (default: the method's own)"
    )
    sub.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="a search each (default: 0)")
    sub.add_argument("--lr", type=float, help="of every training; default: the method's own")
    sub.add_argument("-o", "--option", action="append", metavar="NAME=VALUE", help="an option of the method")
    sub.add_argument("-s", "--set", action="append", metavar="NAME=VALUE", help="a setting of the track")
    sub.add_argument(
        "--workers", type=int, default=1, help="runs at a time (default: 1), where none needs another's score"
    )
    group = sub.add_argument_group("settings of the search, where the method's has them (default: its own)")
    group.add_argument("--strategy", metavar="NAME", help="how structures are proposed, such as bayesian or random")
    group.add_argument("--initial", type=int, metavar="N", help="random trials before the first model")
    group.add_argument("--batch", type=int, metavar="N", help="trials that are proposed together")
    group.add_argument("--surrogate", metavar="NAME", help="the model of the outcomes, such as saas or gp")
    sub = command(conformance, "check a method, peftlib's or your own, on tiny models of every family")
    sub.add_argument("methods", nargs="+", metavar="METHOD", help="a name, or module:Class of a registered method")
    sub.add_argument("--family", nargs="+", metavar="NAME", help="default: all")
    sub.add_argument("--check", nargs="+", metavar="NAME", help="default: all")
    sub = command(fingerprint, "what each method computes, in numbers, compared with the record")
    sub.add_argument("methods", nargs="*", metavar="METHOD", help="default: all")
    sub.add_argument("--record", action="store_true", help="record what differs, after a change that was meant")
    sub.add_argument("--tolerance", type=float, default=1e-6, help="relative (default: 1e-6; one machine holds 1e-9)")
    sub.add_argument("--results", default="results", help="folder that holds the record (default: results)")
    sub = command(stale, "the stored runs whose method has changed its behaviour since")
    sub.add_argument("--results", default="results", help="folder of the run files (default: results)")
    sub = stored(command(results, "the stored results as tables"))
    sub.add_argument("--split", default="test", choices=("test", "validation"))
    sub.add_argument("--figure", metavar="FILE", help="also draw quality against parameters on the first track, as SVG")
    sub = command(convert, "the phase on unlabelled text with which a method begins, once for a backbone")
    sub.add_argument("method")
    sub.add_argument("--backbone", default="minilm-l6", metavar="NAME", help="default: minilm-l6")
    sub.add_argument(
        "--texts",
        nargs="+",
        default=["sentences", "reviews"],
        metavar="TEXT",
        help="tasks whose training texts are read, or files with a text a line (default: sentences reviews)",
    )
    sub.add_argument("--steps", type=int, help="default: 1000")
    sub.add_argument("--objective", help="masked, spans or states (default: as the backbone was trained, where it can)")
    sub.add_argument("--seed", type=int, help="default: 0")
    sub.add_argument("-o", "--option", action="append", metavar="NAME=VALUE", help="an option of the method")
    sub.add_argument("--to", metavar="FOLDER", help="also write it to a folder")
    command(backbones, "the backbones that need no network")
    sub = command(inspect, "what an adapter's folder holds: peftlib's, HF peft's or that of adapters")
    sub.add_argument("folder", help="the adapter")
    sub.add_argument("--json", action="store_true", help="as JSON")
    for sub, formats in (
        (command(import_, "an adapter that another library saved, as one of peftlib's"), ("hf-peft", "adapters")),
        (command(export, "one of peftlib's adapters, as another library loads it"), ("hf-peft",)),
    ):
        sub.add_argument("folder", help="the adapter")
        sub.add_argument("to", help="the folder to write")
        sub.add_argument("--format", default="hf-peft", choices=formats, help="of the other library (default: hf-peft)")
        sub.add_argument("--backbone", required=True, metavar="NAME", help="the backbone that it was made for")
        sub.add_argument(
            "--head", help="the backbone's head, such as causal_lm (default: what the adapter's files say)"
        )
        sub.add_argument("--labels", type=int, default=2, help="classes of a classification head (default: 2)")
    sub = command(notebooks, "execute the notebooks that changed")
    sub.add_argument("names", nargs="*", help="default: all")
    sub.add_argument("--profile", default="embedded")
    sub.add_argument("--force", action="store_true", help="execute them even if nothing changed")
    sub = command(book, "execute what changed and build the book into _build/html")
    sub.add_argument("--profile", default="embedded")
    sub.add_argument("--no-execute", action="store_true", help="take executed notebooks as they are")
    sub = command(bench, "speed and memory of the methods on this machine")
    sub.add_argument("methods", nargs="*", metavar="METHOD", help="default: all that are measured; with --memory a few")
    kinds = sub.add_mutually_exclusive_group()
    for kind, text in (
        ("memory", "peak memory of calibration and training, instead of time"),
        ("variants", "FLOPs and time of methods with an option that is there to save time"),
    ):
        kinds.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind, default="step", help=text)
    sub.add_argument("--store", action="store_true", help="keep what was measured, for the book's page of costs")
    sub.add_argument("--results", default="results", help="folder to keep it in (default: results)")
    sub.add_argument("--backbone", default="minilm-l6", metavar="NAME", help="default: minilm-l6")
    sub = command(plan, "the memory that a training step will take, from shapes alone")
    sub.add_argument("backbone", help="a published model, such as llama-7b or roberta-base, or any hub name or folder")
    sub.add_argument("methods", nargs="+", metavar="method")
    sub.add_argument("--batch-size", type=int, default=1)
    sub.add_argument("--length", type=int, default=512, help="tokens a row (default: 512)")
    sub.add_argument("--precision", default="bfloat16", help="float32, bfloat16 (default) or mixed")
    sub.add_argument("--optimizer", default="adamw", help="adamw (default), adamw-8bit, sgd-momentum or sgd")
    sub.add_argument("--checkpointing", action="store_true", help="recompute layers in the backward pass")
    sub.add_argument("--head", default="causal_lm", help="causal_lm (default), classification, seq2seq, ...")
    sub.add_argument("--gpu", type=float, metavar="GB", help="memory of a GPU, to see what fits")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Errors that peftlib raises on purpose are printed in one line; exit status 2."""
    args = parser().parse_args(argv)
    try:
        _import_methods(args)
        return args.function(args)
    except PeftlibError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
