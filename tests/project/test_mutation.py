"""The tool that changes the code and sees what no test notices."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys

import pytest

from . import ROOT

pytest.importorskip("cosmic_ray")
LORA = "peftlib/methods/reparameterized/low_rank/lora.py"


@pytest.fixture(scope="module")
def mutation():
    spec = importlib.util.spec_from_file_location("mutation_tool", ROOT / "tools" / "mutation.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_each_file_has_tests(mutation):
    files = mutation.files(())
    assert LORA in files
    assert [f for f in files if not mutation.tests(f)] == []
    assert mutation.tests(LORA) == ("tests/methods/test_lora.py",)
    assert "tests/mechanisms/test_sparse.py" in mutation.tests("peftlib/mechanisms/sparse.py")


def test_changes_are_other_programs_on_one_line(mutation):
    source = (ROOT / LORA).read_text()
    found = list(itertools.islice(mutation.mutants(mutation.places(LORA)), 60))
    assert len({m.source for m in found}) == len(found) >= 15
    assert all(m.was != m.now and m.source != source for m in found)
    assert any("alpha: float = 32.0" in m.now for m in found), "floats are doubled"
    assert not [m for m in found if "tuple[str, ...] | str" in m.was], "annotations stay"


def test_a_changed_module_is_imported_and_nothing_is_written(mutation):
    """In a process of its own, which would otherwise have the module already."""
    code = (
        "import sys; sys.path.insert(0, 'tools'); import mutation\n"
        f"changes = mutation.mutants(mutation.places({LORA!r}))\n"
        "mutant = next(m for m in changes if 'alpha: float = 32.0' in m.now)\n"
        "sys.meta_path.insert(0, mutation._Instead(mutant))\n"
        "import peftlib; print(peftlib.config('lora').alpha)"
    )
    before = (ROOT / LORA).read_text()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.split()[-1:] == ["32.0"], done.stderr
    assert (ROOT / LORA).read_text() == before
