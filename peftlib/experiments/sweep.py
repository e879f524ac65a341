"""Many runs: on the cores of this machine, or on a Ray cluster. Interrupt it anywhere; the same call goes on."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from peftlib.errors import UnknownNameError, UnsupportedError
from peftlib.experiments.run import run
from peftlib.experiments.spec import RunSpec, next_rate, profile, run_spec, search_specs
from peftlib.experiments.store import Store, best_rate, decided
from peftlib.methods.registry import outside

Outcome = tuple[RunSpec, str]


def _one(root: str, threads: int | None, modules: Sequence[str], spec: RunSpec) -> str:
    if threads:
        torch.set_num_threads(threads)
    for module in modules:
        importlib.import_module(module)  # it registers methods from outside of peftlib
    return run(spec, Store(root))


def local(specs: Sequence[RunSpec], store: Store, workers: int = 1) -> Iterator[Outcome]:
    """Each run in a fresh process, so that its memory peak is its own; the cores are shared out among ``workers``."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peftlib.experiments.run"])
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        jobs = {pool.submit(_one, str(store.root), threads, outside(), spec): spec for spec in specs}
        for job in as_completed(jobs):
            yield jobs[job], job.result()


def on_ray(specs: Sequence[RunSpec], store: Store, workers: int = 1) -> Iterator[Outcome]:
    """Each run as a Ray task with ``1 / workers`` of a GPU where there are GPUs, else one core.

    The store's folder must be shared by the cluster's machines.
    """
    try:
        import ray
    except ImportError as error:
        raise UnsupportedError(
            'the ray executor needs ray: pip install "peftlib[ray]", or use executor="local"'
        ) from error
    ray.init(ignore_reinit_error=True)
    gpus = 1 / workers if torch.cuda.is_available() else 0
    one = ray.remote(num_cpus=1, num_gpus=gpus, max_calls=1)(_one)
    pending = {one.remote(str(store.root.resolve()), None, outside(), spec): spec for spec in specs}
    while pending:
        (ready, *_), _ = ray.wait(list(pending))
        yield pending.pop(ready), ray.get(ready)


EXECUTORS: dict[str, Callable[..., Iterator[Outcome]]] = {"local": local, "ray": on_ray}


def progress_bar(shown: bool) -> Progress:
    """A bar on the standard error: how many are done, and for how long it went and will go."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not shown)


def sweep(
    specs: Iterable[RunSpec],
    store: Store | None = None,
    *,
    executor: str = "local",
    workers: int = 1,
    progress: bool = True,
) -> Counter:
    """Do every run that the store lacks. Returns how many were "done", "there" already, or "failed".

    A run is claimed with a file lock while it goes, so two sweeps over one folder share the work, and the claim of a
    killed process is free at once. Results are written whole; a run that was cut off is done again. Failures are kept
    in ``failed/`` and tried again by the next call.
    """
    if executor not in EXECUTORS:
        raise UnknownNameError("executor", executor, EXECUTORS)
    store = store or Store()
    specs = _unique(specs)
    todo = [spec for spec in specs if not store.has(spec)]
    outcomes = Counter(there=len(specs) - len(todo))
    with progress_bar(progress) as bar:
        shown = bar.add_task("sweep", total=len(specs), completed=len(specs) - len(todo))
        for spec, outcome in EXECUTORS[executor](todo, store, workers):
            if outcome == "there" and not store.has(spec):
                _wait(store, spec)
            outcomes[outcome] += 1
            bar.advance(shown)
            if progress:
                bar.console.print(f"{outcome:>6}  {spec.label}", style="red" if outcome == "failed" else None)
    return outcomes


def search_rates(
    profile_name: str, names: Iterable[str], store: Store | None = None, *, seed: int = 0, **settings
) -> Counter:
    """The stated search for each method's learning rate, on the profile's first track: the rates of ``SEARCH_RATES``,
    and, where the best of those tried is the lowest or the highest of them, the next one of ``RATES`` until it is not;
    as long as they do not differ by more than noise, the next higher one.

    ``settings`` are those of :func:`sweep`. Returns what it returns, summed; a method with failed runs goes no further.
    """
    store, names = store or Store(), list(names)
    track = next(iter(profile(profile_name).tracks))
    outcomes = sweep(search_specs(profile_name, names, seed), store, **settings)
    while True:
        further = []
        for name in names:
            tried = store.searched(profile_name, track, name, seed)
            if not tried:
                continue
            metric = tried[0]["metric"]
            rates = [r["spec"]["learning_rate"] for r in tried]
            rate = next_rate(rates, best_rate(tried, metric), decided(tried, metric))
            if rate is not None:
                further.append(run_spec(profile_name, None, name, seed=seed, learning_rate=rate))
        if not further:
            return outcomes
        done = sweep(further, store, **settings)
        outcomes += done
        names = [spec.method for spec in further if store.has(spec)]


def _unique(specs: Iterable[RunSpec]) -> list[RunSpec]:
    return list({spec.key: spec for spec in specs}.values())


def _wait(store: Store, spec: RunSpec) -> None:
    """Another process is doing this run: wait for it, or do it if that process ends without a result."""
    while not store.has(spec):
        if run(spec, store) != "there":
            return
        time.sleep(1.0)
