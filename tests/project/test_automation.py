"""Lint, the Makefile and the workflows: what they call exists, and the layering rule can fail."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from peftlib import cli

from . import ROOT, pyproject

BIN = Path(sys.executable).parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([BIN / "lint-imports", "--no-cache"], cwd=folder, capture_output=True, text=True, timeout=300)


def test_layering_holds():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_layering_rule_notices_an_import_that_points_up(tmp_path):
    shutil.copytree(ROOT / "peftlib", tmp_path / "peftlib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    module = tmp_path / "peftlib" / "errors.py"
    module.write_text(module.read_text() + "\nimport peftlib.adapted\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    assert "peftlib.errors is not allowed to import peftlib.adapted" in done.stdout


def test_types_are_checked_strictly(tmp_path):
    """The checker that lint runs refuses a function without types in the core, and lets it pass around it."""
    for name, found in (("errors", True), ("report/markdown", False)):
        module = tmp_path / "peftlib" / f"{name}.py"
        module.parent.mkdir(parents=True, exist_ok=True)
        module.write_text("def untyped(x):\n    return x\n")
        for folder in {module.parent, tmp_path / "peftlib"}:
            (folder / "__init__.py").touch()
        command = [
            BIN / "mypy",
            "--config-file",
            ROOT / "pyproject.toml",
            "--cache-dir",
            os.devnull,
            f"peftlib/{name}.py",
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert ("no-untyped-def" in done.stdout) is found, done.stdout + done.stderr
        assert done.returncode == found


def test_commits_run_what_lint_runs():
    """The hooks of pre-commit are the commands of `make lint`, in order, and fetch nothing."""
    recipe = re.search(r"^lint: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == commands
    assert all(hook["language"] == "unsupported" and not hook["pass_filenames"] for hook in repository["hooks"])


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_issue_form(path):
    """What GitHub asks of a form; it drops one that is not so without a word."""
    form = yaml.safe_load(path.read_text())
    assert form.keys() <= {"name", "description", "labels", "body"}
    assert form["name"]
    assert form["description"]
    ids = [element["id"] for element in form["body"]]
    assert len(ids) == len(set(ids))
    for element in form["body"]:
        assert element["type"] in {"input", "textarea", "dropdown", "checkboxes"}
        assert element["attributes"]["label"]
        assert bool(element["attributes"].get("options")) == (element["type"] in {"dropdown", "checkboxes"})


def test_help_lists_the_commands():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    listed = set(re.findall(r"^  make (\w+)", done.stdout, re.MULTILINE))
    assert listed == TARGETS
    assert listed >= {"env", "book", "test", "lint", "notebooks", "serve", "bench", "clean", "help"}


def test_env_does_nothing_when_it_is_up_to_date():
    """Only where the tests run in the environment that the Makefile made."""
    if BIN != ROOT / ".venv" / "bin":
        pytest.skip("the tests run in another environment than .venv")
    done = subprocess.run(
        ["make", "--dry-run", "env"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert "pip" not in done.stdout


def test_makefile_calls_commands_that_peftlib_has():
    called = set(re.findall(r"\$\(BIN\)/peftlib (\w+)", (ROOT / "Makefile").read_text()))
    assert called == {"book", "notebooks", "bench"}
    for command in called:
        assert cli.parser().parse_args([command]).function is getattr(cli, command)


def test_workflows_call_commands_that_peftlib_has():
    lines = [line for path in WORKFLOWS for line in re.findall(r"bin/peftlib (.*)", path.read_text())]
    assert lines
    for line in lines:
        cli.parser().parse_args(shlex.split(line))


def test_there_are_workflows():
    assert {path.stem for path in WORKFLOWS} == {"ci", "publish", "refresh"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow(path):
    """Actions are pinned to a commit, with the version beside it; make targets exist; rights start at reading."""
    text = path.read_text()
    uses = re.findall(r"uses: (.*)", text)
    assert all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line) for line in uses), uses
    assert set(re.findall(r"\bmake ([a-z]+)", text)) <= TARGETS
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())


def test_one_pin_an_action():
    pins = {pin for path in WORKFLOWS for pin in re.findall(r"uses: (\S+)", path.read_text())}
    names = [pin.partition("@")[0] for pin in pins]
    assert len(names) == len(set(names)), sorted(pins)


def test_scripts_start_in_strict_mode():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail" in script.read_text()
    subprocess.run(["bash", "-n", script], check=True)


def test_extras_are_the_documented_ones():
    assert {"quantization", "ray", "dev"} <= set(pyproject()["project"]["optional-dependencies"])
