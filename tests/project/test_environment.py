"""The environment is one thing said in three places: pyproject.toml, requirements.lock and environment.yml."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from . import ROOT, pyproject

PIN = re.compile(r"(?P<name>[a-z0-9]+(?:-[a-z0-9]+)*)==(?P<version>[^\s+]+)(?:  # (?P<mark>no-deps|apart))?")


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
    settings = pyproject()["tool"]["peftlib"]["lock"]
    for mark in ("no-deps", "apart"):
        named = {canonicalize_name(Requirement(line).name) for line in settings[mark]}
        assert {name for name, match in LOCK.items() if match["mark"] == mark} == named


def test_environment_yml_is_the_lock_for_conda():
    text = (ROOT / "environment.yml").read_text()
    dependencies = yaml.safe_load(text)["dependencies"]
    assert dependencies[:2] == ["python=3.11", "pip"]
    pins = [f"{n}=={m['version']}" for n, m in LOCK.items() if not m["mark"]]
    assert dependencies[2:] == [{"pip": pins}]
    extra, apart = (
        " ".join(f"{n}=={m['version']}" for n, m in LOCK.items() if m["mark"] == mark) for mark in ("no-deps", "apart")
    )
    assert f"#   pip install --no-deps {extra}\n" in text
    assert f'#   pip install --no-deps --target "$CONDA_PREFIX/apart" {apart}\n' in text


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
    folder = str(Path(sys.prefix) / "apart")
    apart = {canonicalize_name(found.name): found.version for found in metadata.distributions(path=[folder])}
    installed = {
        name: apart.get(name) if match["mark"] == "apart" else metadata.version(name).partition("+")[0]
        for name, match in LOCK.items()
    }
    assert installed == {name: match["version"] for name, match in LOCK.items()}


def closure() -> set[str]:
    """What pyproject.toml requires and what that requires in turn, as the installed packages say."""
    project, settings = pyproject()["project"], pyproject()["tool"]["peftlib"]["lock"]
    cuda, found = tool().BROUGHT_BY_TORCH, set()
    followed: set[tuple[str, str]] = set()
    todo = [Requirement(f"peftlib[{','.join(settings['extras'])}]"), *map(Requirement, settings["no-deps"])]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in followed or cuda.match(name):
                continue
            followed.add((name, extra))
            if name == "peftlib":
                lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
            else:
                found.add(name)
                lines = [] if name in settings["no-deps"] else metadata.requires(name) or []
            todo += [r for r in map(Requirement, lines) if not r.marker or r.marker.evaluate({"extra": extra})]
    return found


def test_lock_holds_what_is_required_neither_more_nor_less():
    assert closure() == {name for name, match in LOCK.items() if match["mark"] != "apart"}


def test_every_pin_installs_on_the_oldest_python():
    oldest = pyproject()["project"]["requires-python"].removeprefix(">=") + ".0"
    wanted = {name: metadata.metadata(name)["Requires-Python"] or "" for name in closure()}
    assert not {name: python for name, python in wanted.items() if not SpecifierSet(python).contains(oldest)}


# The lock tool, on a project of its own with the packages of one folder


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project that requires ``app``; ``app`` and ``part`` have newer versions than its lock."""
    index = tmp_path / "index"
    index.mkdir()

    def wheel(name: str, version: str, *requires: str, python: str = ">=3.11") -> None:
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", f"Requires-Python: {python}"]
        with zipfile.ZipFile(index / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as file:
            folder = f"{name.replace('-', '_')}-{version}.dist-info"
            file.writestr(f"{folder}/METADATA", "\n".join([*lines, *(f"Requires-Dist: {r}" for r in requires), ""]))
            file.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            file.writestr(f"{folder}/RECORD", "")

    for version in ("1.0", "2.0"):
        wheel("app", version, "part", "nvidia-part", "triton; sys_platform == 'linux'", "mac; sys_platform == 'darwin'")
        wheel("part", version)
        wheel("model", version, "runtime")
    wheel("part", "3.0", python=">=3.11.4")
    for name in ("nvidia-part", "triton", "mac", "runtime"):
        wheel(name, "1.0")
    wheel("late", "1.0+cpu", "part>=2")
    wheel("beside", "1.0", "runtime")
    write_project(tmp_path, "app")
    (tmp_path / "requirements.lock").write_text("app==1.0\nmodel==1.0\npart==1.0\n")
    for name, value in {"FIND_LINKS": index, "NO_INDEX": 1, "OFFLINE": 1, "CACHE_DIR": tmp_path / "cache"}.items():
        monkeypatch.setenv(f"UV_{name}", str(value))
    return tmp_path


def write_project(root: Path, *required: str) -> None:
    (root / "pyproject.toml").write_text(
        f'[project]\nname = "own"\nversion = "1"\nrequires-python = ">=3.11"\ndependencies = {list(required)}\n'
        "[project.optional-dependencies]\ndev = []\n"
        '[tool.peftlib.lock]\nextras = ["dev"]\nno-deps = ["model"]\napart = ["beside"]\n'
    )


def test_lock_tool_keeps_what_the_lock_has(project):
    """Without CUDA's packages, those of other systems, and what packages that only carry models require."""
    for _ in range(2):
        tool().main(project, [])
        lines = [line for line in (project / "requirements.lock").read_text().splitlines() if line[0] != "#"]
        assert lines == ["app==1.0", "beside==1.0  # apart", "model==1.0  # no-deps", "part==1.0"]
    dependencies = yaml.safe_load((project / "environment.yml").read_text())["dependencies"]
    assert dependencies[2:] == [{"pip": ["app==1.0", "part==1.0"]}]


@pytest.mark.parametrize(
    ("upgrade", "changed"),
    [
        (["part"], {"part": "2.0"}),  # 3.0 does not install on the oldest Python
        (["app", "model"], {"app": "2.0", "model": "2.0"}),
        (["part==2.0"], {"part": "2.0"}),
        (["Part<2"], {}),
    ],
    ids=str,
)
def test_lock_tool_changes_what_is_named(project, upgrade, changed):
    pins, marks = tool().resolve(project, upgrade)
    assert pins == {"app": "1.0", "beside": "1.0", "model": "1.0", "part": "1.0"} | changed
    assert marks == {"model": "no-deps", "beside": "apart"}


def test_lock_tool_changes_what_a_new_requirement_rules_out(project):
    write_project(project, "app", "late")
    expected = {"app": "1.0", "beside": "1.0", "late": "1.0", "model": "1.0", "part": "2.0"}
    assert tool().resolve(project)[0] == expected


def test_lock_tool_says_what_cannot_be(project, capfd):
    for name in ("triton", "another"):
        with pytest.raises(SystemExit, match=f"^{name} does not fit what is required; it would be left out$"):
            tool().resolve(project, [name])
    with pytest.raises(SystemExit, match=r"^1$"):
        tool().resolve(project, ["part==9"])
    assert "part==9" in capfd.readouterr().err
    write_project(project, "app", "part>9")
    with pytest.raises(SystemExit, match=r"^1$"):
        tool().resolve(project)
    assert "part>9" in capfd.readouterr().err


@pytest.mark.parametrize("program", ["jupyter-book", "papermill", "jupyter-lab", "peftlib"])
def test_programs_are_installed_beside_python(program):
    """The Makefile and the notebooks call them from the environment's own folder."""
    path = Path(sys.executable).parent / program
    assert path.exists()
    done = subprocess.run([path, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
