"""Write requirements.lock and environment.yml: what pyproject.toml requires, at the versions that the lock has.

    .venv/bin/python tools/lock.py [PACKAGE | PACKAGE==VERSION ...]

uv resolves the requirements, with the extras of ``[tool.peftlib.lock]``, for the oldest Python of ``requires-python``
on Linux; it installs nothing. A version that the lock has stays unless a requirement rules it out or the package is
named here, which takes its newest version or the given one. Two kinds of packages are treated apart:

* CUDA's own packages and Triton are left out: torch requires the ones that fit it, on machines that use them.
* Packages of ``no-deps`` carry models; what they require is not followed. The lock marks them, and
  environment.yml leaves them out, since conda cannot install without requirements.
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
NO_DEPS = "# no-deps"
BROUGHT_BY_TORCH = re.compile(r"(nvidia-|cuda-|triton$|pytorch-triton)")


def resolve(root: Path, upgrade: Sequence[str] = ()) -> tuple[dict[str, str], set[str]]:
    """Name -> version of all that the project in ``root`` requires, and those of them that go in without what they
    require. Exits where no versions fit together, and uv says why, or where they are none that ``upgrade`` asks for."""
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
        alone = pins("-", "--no-deps", given="\n".join(settings["no-deps"]))
    found = {n: v for n, v in sorted({**required, **alone}.items()) if not BROUGHT_BY_TORCH.match(n)}
    for wanted in map(Requirement, upgrade):
        version = found.get(canonicalize_name(wanted.name))
        if version is None or version not in wanted.specifier:
            raise SystemExit(f"{wanted} does not fit what is required; it would be {version or 'left out'}")
    return found, set(alone)


def lock_text(pins: dict[str, str], no_deps: set[str]) -> str:
    """The lock: one pin a line."""
    head = (
        "# Every package of the environment, at the versions that are tested. Written by tools/lock.py.\n"
        "# CUDA's own packages are not listed: torch brings the ones that it needs.\n"
        f'# A line marked "{NO_DEPS[2:]}" goes in without what it requires: [tool.peftlib.lock] in pyproject.toml.\n'
    )
    return head + "".join(f"{n}=={v}{f'  {NO_DEPS}' if n in no_deps else ''}\n" for n, v in pins.items())


def environment_text(pins: dict[str, str], no_deps: set[str]) -> str:
    """The same environment for conda."""
    extra = " ".join(f"{n}=={v}" for n, v in pins.items() if n in no_deps)
    head = (
        "# The environment of requirements.lock for conda. Written by tools/lock.py.\n"
        "# conda cannot install a package without what it requires, so after\n"
        "#   conda env create -f environment.yml && conda activate peftlib\n"
        "# two more commands are needed:\n"
        f"#   pip install --no-deps {extra}\n"
        "#   pip install --no-deps --no-build-isolation -e .\n"
        "name: peftlib\n"
        "channels:\n  - conda-forge\n"
        "dependencies:\n  - python=3.11\n  - pip\n  - pip:\n"
    )
    return head + "".join(f"      - {n}=={v}\n" for n, v in pins.items() if n not in no_deps)


def main(root: Path, upgrade: Sequence[str]) -> None:
    pins, no_deps = resolve(root, upgrade)
    (root / LOCK).write_text(lock_text(pins, no_deps))
    (root / ENVIRONMENT).write_text(environment_text(pins, no_deps))
    print(f"{len(pins)} packages: {LOCK}, {ENVIRONMENT}")


if __name__ == "__main__":
    main(ROOT, sys.argv[1:])
