"""The environment is one thing said in three places: pyproject.toml, requirements.lock and environment.yml."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from . import ROOT, pyproject

PIN = re.compile(r"(?P<name>[a-z0-9]+(?:-[a-z0-9]+)*)==(?P<version>[^\s+]+)(?P<mark>  # no-deps)?")


def read_lock() -> dict[str, re.Match]:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    matches = [PIN.fullmatch(line) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches) if not match]
    return {match["name"]: match for match in matches}


LOCK = read_lock()


def tool():
    spec = importlib.util.spec_from_file_location("lock_tool", ROOT / "tools" / "lock.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lock_is_sorted_and_leaves_cuda_to_torch():
    assert list(LOCK) == sorted(LOCK)
    assert not [name for name in LOCK if tool().BROUGHT_BY_TORCH.match(name)]


def test_marked_lines_are_those_that_pyproject_names():
    marked = {name for name, match in LOCK.items() if match["mark"]}
    assert marked == set(pyproject()["tool"]["peftlib"]["lock"]["no-deps"])


def test_environment_yml_is_the_lock_for_conda():
    text = (ROOT / "environment.yml").read_text()
    dependencies = yaml.safe_load(text)["dependencies"]
    assert dependencies[:2] == ["python=3.11", "pip"]
    pins = [f"{n}=={m['version']}" for n, m in LOCK.items() if not m["mark"]]
    assert dependencies[2:] == [{"pip": pins}]
    extra = " ".join(f"{n}=={m['version']}" for n, m in LOCK.items() if m["mark"])
    assert f"#   pip install --no-deps {extra}\n" in text


def test_lock_meets_every_requirement_of_pyproject():
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    chosen = pyproject()["tool"]["peftlib"]["lock"]["extras"]
    lines = list(project["dependencies"])
    for extra in chosen:
        lines += extras[extra]
        nested = [Requirement(line) for line in extras[extra] if line.startswith("peftlib[")]
        lines += [line for requirement in nested for name in requirement.extras for line in extras[name]]
    requirements = [Requirement(line) for line in lines if not line.startswith("peftlib[")]
    locked = {r: LOCK.get(canonicalize_name(r.name)) for r in requirements}
    assert not [str(r) for r, match in locked.items() if not match or match["version"] not in r.specifier]


def test_installed_versions_are_the_locked_ones():
    installed = {name: metadata.version(name).partition("+")[0] for name in LOCK}
    assert installed == {name: match["version"] for name, match in LOCK.items()}


def test_lock_holds_what_the_lock_tool_would_write():
    """The closure of the requirements, neither more nor less, and every pin installs on the oldest Python."""
    pins = {name: match["version"] for name, match in LOCK.items()}
    assert tool().resolve(pyproject()) == pins
    oldest = pyproject()["project"]["requires-python"].removeprefix(">=") + ".0"
    assert tool().too_new(pins, oldest) == []


def test_lock_tool_refuses_a_pin_for_a_newer_python():
    assert tool().too_new({"numpy": "0"}, "3.6.0") == [
        f"numpy 0: {metadata.metadata('numpy')['Requires-Python']}",
    ]


@pytest.mark.parametrize("program", ["jupyter-book", "papermill", "jupyter-lab", "peftlib"])
def test_programs_are_installed_beside_python(program):
    """The Makefile and the notebooks call them from the environment's own folder."""
    path = Path(sys.executable).parent / program
    assert path.exists()
    done = subprocess.run([path, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
