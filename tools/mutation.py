"""Change the methods and their mechanisms in small ways, one at a time, and tell which changes no test notices.

    .venv/bin/python tools/mutation.py [PATH ...] [--sample N] [--seed S] [--workers W] [--minutes M] [--trust]

cosmic-ray makes the changes: another number, operator, comparison or boolean, a decorator left out, a loop that does
not run; own is that a float is doubled. Annotations and default learning rates are left alone. Each change is tried by
the tests of its file, which stop at the first failure, in a fork of a process that has imported torch and transformers
already. Nothing is written: the fork imports the changed source in the file's place, so a run can be cut off at any
time.

The tests of a file are those of its name. A mechanism, or a base of methods, has those of the methods that use it too,
the shortest few. Subprocesses of tests see the unchanged code.

What survives is to be looked at: either a test is missing, or the change makes no difference (such as another default
of an argument that is always given). A survivor is no error; the exit code is 1 where the tests fail without a change.
"""

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = ("peftlib/methods", "peftlib/mechanisms")
TESTED_AS = {
    "changes": "host",
    "undo": "host",
    "bayesian": "autopeft",
    "search": "autopeft",
    "format": "hf_peft",
    "updates": "hf_peft",
    "prompts": "hf_peft",
}
"""Files that are tried by the tests of another name, where they have none of their own."""
USERS = 3
"""Test files of methods that try a mechanism, beside its own."""
TIMEOUT = 600.0
"""Seconds for one change where nothing is known of its tests; else four times what they take without a change."""

# Of cosmic-ray's exchanges of one operator by any other, those that differ least.
BINARY = ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_FloorDiv", "Pow_Mul")
COMPARISON = ("Eq_NotEq", "NotEq_Eq", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Is_IsNot", "IsNot_Is")
UNARY = ("USub_Nothing", "Not_Nothing", "Delete_Not", "Delete_USub")
OTHERS = (
    "AddNot",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "NumberReplacer",
    "RemoveDecorator",
    "ZeroIterationForLoop",
)


@dataclass(frozen=True)
class Mutant:
    """One change: ``source`` is the whole changed file, ``line`` where it differs, ``was`` and ``now`` that line."""

    file: str
    source: str
    line: int
    was: str
    now: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.was}  ->  {self.now}"


@cache
def operators() -> list:
    """cosmic-ray's operators, and the doubled float."""
    import parso
    from cosmic_ray import plugins
    from cosmic_ray.ast import is_number
    from cosmic_ray.operators.operator import Example, Operator

    class DoubledFloat(Operator):
        def mutation_positions(self, node):
            if is_number(node) and isinstance(ast.literal_eval(node.value), float) and ast.literal_eval(node.value):
                yield node.start_pos, node.end_pos

        def mutate(self, node, index):
            return parso.python.tree.Number(f" {2 * ast.literal_eval(node.value)}", node.start_pos)

        @classmethod
        def examples(cls):
            return (Example("x = 0.5", "x = 1.0"),)

    wanted = {f"core/ReplaceBinaryOperator_{n}" for n in BINARY}
    wanted |= {f"core/ReplaceComparisonOperator_{n}" for n in COMPARISON}
    wanted |= {f"core/ReplaceUnaryOperator_{n}" for n in UNARY} | {f"core/{n}" for n in OTHERS}
    known = sorted(wanted & set(plugins.operator_names()))
    return [*(plugins.get_operator(name)() for name in known), DoubledFloat()]


def places(file: str) -> list[tuple[str, int, int]]:
    """Where a file can be changed: the file, which operator, and which of its occurrences."""
    from cosmic_ray.ast import ast_nodes, get_ast

    nodes = list(ast_nodes(get_ast((ROOT / file).read_text())))
    return [
        (file, which, occurrence)
        for which, operator in enumerate(operators())
        for occurrence in range(sum(len(list(operator.mutation_positions(node))) for node in nodes))
    ]


def mutants(found: Iterable[tuple[str, int, int]]) -> Iterator[Mutant]:
    """The changes at these places that are other programs."""
    from cosmic_ray.mutating import mutate_code

    seen: dict[str, set[str]] = {}
    for file, which, occurrence in found:
        source = (ROOT / file).read_text()
        changed = mutate_code(source, operators()[which], occurrence)
        try:
            meaning = _meaning(changed)
        except SyntaxError:
            continue
        known = seen.setdefault(file, {_meaning(source)})
        if meaning in known:
            continue
        known.add(meaning)
        pairs = zip(source.splitlines(), changed.splitlines())
        line, (was, now) = next((i, p) for i, p in enumerate(pairs, 1) if p[0] != p[1])
        if was.strip().startswith("learning_rate ="):
            continue  # what a search found, no fact
        yield Mutant(file, changed, line, was.strip(), now.strip())


def _meaning(source: str) -> str:
    """The program without annotations, which do nothing here."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
    return ast.dump(tree)


def files(paths: Iterable[str]) -> list[str]:
    found = []
    for path in paths or DEFAULT:
        full = (ROOT / path).resolve()
        if not full.exists():
            raise SystemExit(f"{path} does not exist; give a file or a folder, such as {DEFAULT[0]}")
        found += [full] if full.is_file() else sorted(full.rglob("*.py"))
    return [str(f.relative_to(ROOT)) for f in dict.fromkeys(found) if f.name != "__init__.py"]


@cache
def tests(file: str) -> tuple[str, ...]:
    """The test files that try a file of the library."""
    path = Path(file)
    name = path.parent.name if path.stem in ("method", "layer") else path.stem
    if path.parent.name in ("autopeft", "s3delta"):
        name = path.parent.name
    names = dict.fromkeys((name, TESTED_AS.get(name, name)))
    folders = ("mechanisms", "methods", "training", "interchange")
    own = [ROOT / "tests" / folder / f"test_{n}.py" for n in names for folder in folders]
    found = [test for test in own if test.is_file()]
    if "mechanisms" in path.parts or "bases" in path.parts or not found:
        users = [f for f in files(("peftlib/methods",)) if f != file and _imports(f, path)]
        names = {Path(f).parent.name if Path(f).stem in ("method", "layer") else Path(f).stem for f in users}
        more = [test for n in names if (test := ROOT / "tests" / "methods" / f"test_{n}.py").is_file()]
        found += sorted(set(more) - set(found), key=lambda test: (test.stat().st_size, test.name))[:USERS]
    return tuple(str(test.relative_to(ROOT)) for test in found)


def _imports(user: str, path: Path) -> bool:
    return ".".join(path.with_suffix("").parts) in _imported(user)


@cache
def _imported(file: str) -> set[str]:
    """What a file imports from, and what could be modules among the names that it imports."""
    nodes = [n for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, ast.ImportFrom)]
    return {n.module for n in nodes} | {f"{n.module}.{alias.name}" for n in nodes for alias in n.names}


class _Instead(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Imports a changed source in the place of one module's."""

    def __init__(self, mutant: Mutant):
        self.module = ".".join(Path(mutant.file).with_suffix("").parts)
        super().__init__(self.module, str(ROOT / mutant.file))
        self.source = mutant.source

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name == self.module else None

    def get_code(self, name):
        return compile(self.source, self.path, "exec", dont_inherit=True)


def _child(mutant: Mutant | None, chosen: tuple[str, ...], log: str) -> None:
    """In a fork: run the tests, and end the process with pytest's exit code."""
    code = 99
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        import pytest

        if mutant is not None:
            sys.meta_path.insert(0, _Instead(mutant))
        code = pytest.main(["-q", "-x", "--no-header", "-p", "no:cacheprovider", *chosen])
    finally:
        os._exit(int(code))


class Runner:
    """Runs tests in forks, several at a time."""

    def __init__(self, workers: int, minutes: float | None, folder: str):
        self.workers, self.folder = workers, folder
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.running: dict[int, tuple[Mutant | None, float, float]] = {}
        self.count = 0

    def start(self, mutant: Mutant | None, chosen: tuple[str, ...], timeout: float) -> None:
        self.count += 1
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            _child(mutant, chosen, f"{self.folder}/{self.count}.log")
        self.running[pid] = mutant, time.monotonic(), timeout

    def finished(self) -> Iterator[tuple[Mutant | None, int, float]]:
        """Waits for one or more runs: the mutant, pytest's exit code (-1: no time left) and the seconds."""
        while self.running:
            done, status = os.waitpid(-1, os.WNOHANG)
            if done:
                mutant, began, _ = self.running.pop(done)
                yield mutant, os.waitstatus_to_exitcode(status), time.monotonic() - began
                return
            for pid, (mutant, began, timeout) in list(self.running.items()):
                if time.monotonic() - began > timeout:
                    os.killpg(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    del self.running[pid]
                    yield mutant, -1, timeout
                    return
            time.sleep(0.05)

    def over(self) -> bool:
        return self.end is not None and time.monotonic() > self.end


def baseline(runner: Runner, sets: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
    """How long each set of tests takes without a change. Exits where they fail."""
    seconds = {}
    for chosen in sets:
        runner.start(None, chosen, TIMEOUT)
        for _, code, took in runner.finished():
            if code:
                log = Path(f"{runner.folder}/{runner.count}.log").read_text()
                raise SystemExit(f"{log[-3000:]}\nthese tests fail without any change: {' '.join(chosen)}")
            seconds[chosen] = took
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("paths", nargs="*", help=f"files or folders; default: {' '.join(DEFAULT)}")
    parser.add_argument("--sample", type=int, help="so many changes, drawn at random; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--workers", type=int, default=1, help="changes that are tried at a time")
    parser.add_argument("--minutes", type=float, help="start no further change after so many")
    parser.add_argument("--trust", action="store_true", help="do not run the tests without a change first")
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

    tested = [file for file in files(options.paths) if tests(file)]
    found = [place for file in tested for place in places(file)]
    print(f"{len(found)} places to change in {len(tested)} files")
    if options.sample is None:
        waiting, sets = mutants(found), {tests(file) for file in tested}
    else:
        random.Random(options.seed).shuffle(found)
        chosen_ones = list(itertools.islice(mutants(found), options.sample))
        waiting, sets = iter(chosen_ones), {tests(m.file) for m in chosen_ones}

    for name in ("torch", "transformers", "scipy.stats", "peft"):  # in every fork, imported once
        importlib.import_module(name)
    began, survivors, noticed, late = time.monotonic(), [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(options.workers, options.minutes, folder)
        seconds = {} if options.trust else baseline(runner, sorted(sets))
        done = 0
        while True:
            while len(runner.running) < options.workers and not runner.over():
                mutant = next(waiting, None)
                if mutant is None:
                    break
                chosen = tests(mutant.file)
                runner.start(mutant, chosen, 20 + 4 * seconds[chosen] if chosen in seconds else TIMEOUT)
            if not runner.running:
                break
            for mutant, code, _ in runner.finished():
                assert mutant is not None
                done += 1
                noticed, late = noticed + (code not in (0, -1)), late + (code == -1)
                if code == 0:
                    survivors.append(mutant)
                    print(f"survives  {mutant}", flush=True)
                    if "GITHUB_ACTIONS" in os.environ:
                        print(f"::notice file={mutant.file},line={mutant.line}::no test notices: {mutant.now}")
    print(
        f"{done} changes in {time.monotonic() - began:.0f} s: {noticed} noticed, {late} that did not end, "
        f"{len(survivors)} survive"
    )


if __name__ == "__main__":
    main()
