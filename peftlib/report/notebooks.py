"""Execute the notebooks, each only when something it depends on has changed.

Sources in ``notebooks/`` hold no outputs. Executed copies live in ``_build/executed/<profile>/`` beside a JSON file
that names what they depended on: the notebook, its parameters, the lock file, each module of peftlib that it imported
with its HTML templates, and the run files, where it read the store. When one of those has another hash, the notebook is
executed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import nbformat
import papermill
from nbformat import NotebookNode
from rich.console import Console

from peftlib.errors import PeftlibError, UnknownNameError
from peftlib.experiments import profile as known_profile

ROOT = Path(__file__).resolve().parents[2]
SOURCES, EXECUTED = "notebooks", "_build/executed"
#: What stands in a notebook that reads the store of results.
READS_STORE = re.compile(r"\b(Store|Standings)\(")
#: What a notebook can depend on in the library: modules, and the templates of what is shown in place.
LIBRARY = ("*.py", "*.html.j2")
#: The last cell of an executed notebook, removed again: which files of the library its kernel had imported.
TRACE = """\
import json as _json, sys as _sys
print(_json.dumps(sorted(m.__file__ for n, m in list(_sys.modules.items())
                         if n.split(".")[0] == "peftlib" and getattr(m, "__file__", None))))"""


class NotebookError(PeftlibError, RuntimeError):
    """A notebook that failed, or that holds an error output."""


def sources(names: Iterable[str] = (), root: Path = ROOT) -> list[Path]:
    """The notebooks in book order, all or the named ones (with or without suffix). Raises UnknownNameError."""
    found = {path.stem: path for path in sorted((root / SOURCES).glob("*.ipynb"))}
    wanted = [Path(name).stem for name in names] or list(found)
    for name in wanted:
        if name not in found:
            raise UnknownNameError("notebook", name, found)
    return [found[name] for name in wanted]


def executed_path(source: Path, profile: str, root: Path = ROOT) -> Path:
    """Where the executed copy of a notebook is."""
    return root / EXECUTED / profile / source.name


def is_fresh(source: Path, profile: str, root: Path = ROOT) -> bool:
    """Whether the executed copy is there and everything it depended on is unchanged."""
    target = executed_path(source, profile, root)
    try:
        record = json.loads(target.with_suffix(".json").read_text())
        return target.is_file() and record == _dependencies(source, profile, record["files"], root)
    except (FileNotFoundError, ValueError, KeyError):
        return False


def execute(source: Path, profile: str, root: Path = ROOT, threads: int = 1) -> Path:
    """Execute one notebook with papermill and keep the result. Raises NotebookError naming the cell that failed."""
    target = executed_path(source, profile, root)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Taken before, so that what changes meanwhile counts as changed.
    library = [str(path.relative_to(root)) for kind in LIBRARY for path in (root / "peftlib").rglob(kind)]
    record = _dependencies(source, profile, library, root)
    notebook = nbformat.read(source, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(TRACE))
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        # tqdm asks for widgets, which a page without a kernel cannot show.
        "PYTHONWARNINGS": "ignore:IProgress not found",
    }
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        given, made = Path(scratch) / "in.ipynb", Path(scratch) / "out.ipynb"
        nbformat.write(notebook, given)
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        try:
            papermill.execute_notebook(
                given,
                made,
                parameters={"PROFILE": profile},
                kernel_name="python3",
                cwd=root,
                progress_bar=False,
                # The kernel logs that it talks over TCP and that it was stopped; errors come as messages.
                extra_arguments=["--log-level=CRITICAL"],
            )
        except papermill.PapermillExecutionError as error:
            number = next(n for n, cell in enumerate(notebook.cells, 1) if cell.source == error.source)
            raise NotebookError(f"{source.name} failed in cell {number}: {error.ename}: {error.evalue}") from error
        result = nbformat.read(made, as_version=4)
    trace = result.cells.pop()
    imported = {Path(f).resolve() for f in json.loads("".join(o.get("text", "") for o in trace.outputs))}
    record["files"] = {name: hashed for name, hashed in record["files"].items() if _module(root / name) in imported}
    for problem in problems(result):
        raise NotebookError(f"{source.name}: {problem}")
    nbformat.write(tidy(result), target)
    target.with_suffix(".json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return target


def problems(notebook: NotebookNode) -> Iterator[str]:
    """Errors that stand in a notebook's outputs."""
    for number, cell in enumerate(notebook.cells, 1):
        for output in cell.get("outputs", ()):
            if output.output_type == "error":
                yield f"cell {number} holds an error: {output.ename}: {output.evalue}"


def tidy(notebook: NotebookNode) -> NotebookNode:
    """The notebook as the book shows it: no times and paths of papermill, one cell with the parameters in force."""
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
    injected = next((c for c in notebook.cells if "injected-parameters" in c.metadata.get("tags", [])), None)
    if injected is not None:
        notebook.cells.remove(injected)
        for cell in notebook.cells:
            if "parameters" in cell.metadata.get("tags", []):
                cell.source = injected.source.removeprefix("# Parameters\n").strip()
    return notebook


def execute_changed(
    profile: str, names: Iterable[str] = (), *, force: bool = False, root: Path = ROOT, workers: int | None = None
) -> list[Path]:
    """Execute what changed, a few at a time, with a line a notebook; return all executed copies in book order.

    Every notebook is tried; then the failures are raised together as one NotebookError.
    """
    known_profile(profile)
    chosen = sources(names, root)
    todo = [source for source in chosen if force or not is_fresh(source, profile, root)]
    cores = os.cpu_count() or 1
    workers = workers or min(4, cores)
    console = Console(stderr=True)
    console.print(f"notebooks: {len(chosen) - len(todo)} unchanged, {len(todo)} to execute ({profile})")
    failures: list[NotebookError] = []
    with ThreadPoolExecutor(workers) as pool:
        started = time.perf_counter()
        jobs = {pool.submit(execute, s, profile, root, max(1, cores // workers)): s for s in todo}
        for job in as_completed(jobs):
            elapsed = time.perf_counter() - started
            error = job.exception()
            if error is None:
                console.print(f"  {jobs[job].stem} after {elapsed:.0f} s")
            elif isinstance(error, NotebookError):
                console.print(f"  {jobs[job].stem} FAILED after {elapsed:.0f} s", style="red")
                failures.append(error)
            else:
                raise error
    if failures:
        raise NotebookError("\n".join(str(f) for f in failures))
    return [executed_path(source, profile, root) for source in chosen]


def main(profile: str, names: Iterable[str] = (), *, force: bool = False) -> int:
    """The ``peftlib notebooks`` command."""
    execute_changed(profile, names, force=force)
    return 0


def _dependencies(source: Path, profile: str, files: list[str], root: Path) -> dict:
    text = source.read_text()
    return {
        "notebook": _hash(text.encode()),
        "profile": profile,
        "lock": _hash((root / "requirements.lock").read_bytes()),
        "results": _hash_results(root) if READS_STORE.search(text) else None,
        "files": {name: _hash((root / name).read_bytes()) for name in files},
    }


def _module(path: Path) -> Path:
    """A module itself; for a template the package that it belongs to."""
    path = path.resolve()
    return path if path.suffix == ".py" else path.parents[1] / "__init__.py"


def _hash_results(root: Path) -> str:
    paths = sorted((root / "results").rglob("*.json"))
    return _hash("".join(f"{p.relative_to(root)}:{_hash(p.read_bytes())};" for p in paths).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
