"""Write requirements.lock and environment.yml: what pyproject.toml requires, at the versions that the lock has.

    .venv/bin/python tools/lock.py [PACKAGE | PACKAGE==VERSION ...]

uv resolves the requirements, with the extras of ``[tool.peftlib.lock]``, for the oldest Python of ``requires-python``
on Linux; it installs nothing. A version that the lock has stays unless a requirement rules it out or the package is
named here, which takes its newest version or the given one. Three kinds of packages are treated apart:

* CUDA's own packages and Triton are left out: torch requires the ones that fit it, on machines that use them.
* Packages of ``no-deps`` carry models; what they require is not followed. The lock marks them, and
  environment.yml leaves them out, since conda cannot install without requirements.
* Packages of ``apart`` go into a folder of their own, likewise without what they require: they are for tests that run a
  program with this folder on its path, since other packages would import them wherever they find them.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCK, ENVIRONMENT = "requirements.lock", "environment.yml"
BROUGHT_BY_TORCH = re.compile(r"(nvidia-|cuda-|triton$|pytorch-triton)")


def resolve(root: Path, upgrade: Sequence[str] = ()) -> tuple[dict[str, str], dict[str, str]]:
    """Name -> version of all that the project in ``root`` requires, and name -> "no-deps" or "apart" for those of them
    that go in without what they require. Exits where no versions fit together, and uv says why, or where they are none
    that ``upgrade`` asks for."""
    project = tomllib.loads((root / "pyproject.toml").read_text())
    settings = project["tool"]["peftlib"]["lock"]
    python = project["project"]["requires-python"].removeprefix(">=")
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / LOCK

        def pins(*arguments: str, given: str = "") -> dict[str, str]:
            # What stands in the output is what uv prefers.
            output.write_text((root / LOCK).read_text())
            command = [sys.executable, "-m", "uv", "pip", "compile", *arguments, "--output-file", str(output)]
            command += ["--python-version", python, "--python-platform", "linux", "--no-header", "--no-annotate", "-q"]
            command += [part for package in upgrade for part in ("--upgrade-package", package)]
            if code := subprocess.run(command, cwd=root, input=given, text=True).returncode:
                raise SystemExit(code)
            # The local part says which build of a version it is, such as torch's "+cpu". That differs by machine.
            return {n: v.partition("+")[0] for n, _, v in (x.partition("==") for x in output.read_text().splitlines())}

        extras = [part for extra in settings["extras"] for part in ("--extra", extra)]
        required = pins("pyproject.toml", *extras)
        marks, alone = {}, {}
        for mark in ("no-deps", "apart"):
            these = pins("-", "--no-deps", given="\n".join(settings.get(mark, ())))
            marks |= dict.fromkeys(these, mark)
            alone |= these
    found = {n: v for n, v in sorted({**required, **alone}.items()) if not BROUGHT_BY_TORCH.match(n)}
    for wanted in map(Requirement, upgrade):
        version = found.get(canonicalize_name(wanted.name))
        if version is None or version not in wanted.specifier:
            raise SystemExit(f"{wanted} does not fit what is required; it would be {version or 'left out'}")
    return found, marks


def lock_text(pins: dict[str, str], marks: dict[str, str]) -> str:
    """The lock: one pin a line."""
    head = (
        "# Every package of the environment, at the versions that are tested. Written by tools/lock.py.\n"
        "# CUDA's own packages are not listed: torch brings the ones that it needs.\n"
        '# A line marked "no-deps" or "apart" goes in without what it requires, the latter into a folder of its own:\n'
        "# [tool.peftlib.lock] in pyproject.toml.\n"
    )
    return head + "".join(f"{n}=={v}{f'  # {marks[n]}' if n in marks else ''}\n" for n, v in pins.items())


def environment_text(pins: dict[str, str], marks: dict[str, str]) -> str:
    """The same environment for conda."""
    extra, apart = (
        " ".join(f"{n}=={v}" for n, v in pins.items() if marks.get(n) == mark) for mark in ("no-deps", "apart")
    )
    head = (
        "# The environment of requirements.lock for conda. Written by tools/lock.py.\n"
        "# conda cannot install a package without what it requires, so after\n"
        "#   conda env create -f environment.yml && conda activate peftlib\n"
        "# these commands are needed too:\n"
        f"#   pip install --no-deps {extra}\n"
        f'#   pip install --no-deps --target "$CONDA_PREFIX/apart" {apart}\n'
        "#   pip install --no-deps --no-build-isolation -e .\n"
        "name: peftlib\n"
        "channels:\n  - conda-forge\n"
        "dependencies:\n  - python=3.11\n  - pip\n  - pip:\n"
    )
    return head + "".join(f"      - {n}=={v}\n" for n, v in pins.items() if n not in marks)


def main(root: Path, upgrade: Sequence[str]) -> None:
    pins, marks = resolve(root, upgrade)
    (root / LOCK).write_text(lock_text(pins, marks))
    (root / ENVIRONMENT).write_text(environment_text(pins, marks))
    print(f"{len(pins)} packages: {LOCK}, {ENVIRONMENT}")


if __name__ == "__main__":
    main(ROOT, sys.argv[1:])
