"""Write requirements.lock and environment.yml from the packages installed in the running Python.

    .venv/bin/python tools/lock.py

The lock is the closure of what pyproject.toml requires (with the extras named in ``[tool.peftlib.lock]``),
at the versions that are installed. Two kinds of packages are treated apart:

* CUDA's own packages and Triton are left out: torch requires the ones that fit it, on machines that use them.
* Packages of ``no-deps`` carry models; what they require is not followed. The lock marks them, and
  environment.yml leaves them out, since conda cannot install without requirements.
"""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
ENVIRONMENT = ROOT / "environment.yml"
NO_DEPS = "# no-deps"
BROUGHT_BY_TORCH = re.compile(r"(nvidia-|cuda-|triton$|pytorch-triton)")


def resolve(project: dict) -> dict[str, str]:
    """The closure of the project's requirements: canonical name -> installed version, without local part."""
    settings = project["tool"]["peftlib"]["lock"]
    name = canonicalize_name(project["project"]["name"])
    extras = project["project"]["optional-dependencies"]
    no_deps = {canonicalize_name(package) for package in settings["no-deps"]}

    pins: dict[str, str] = {}
    followed: set[tuple[str, str]] = set()
    todo = [Requirement(f"{name}[{','.join(settings['extras'])}]"), *map(Requirement, sorted(no_deps))]
    while todo:
        requirement = todo.pop()
        package = canonicalize_name(requirement.name)
        for extra in ("", *sorted(requirement.extras)):
            if (package, extra) in followed or BROUGHT_BY_TORCH.match(package):
                continue
            followed.add((package, extra))
            if package == name:
                lines = extras[extra] if extra else project["project"]["dependencies"]
            else:
                pins[package] = metadata.version(package).partition("+")[0]
                lines = [] if package in no_deps else metadata.requires(package) or []
            for line in lines:
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    todo.append(needed)
    return dict(sorted(pins.items()))


def too_new(pins: dict[str, str], python: str) -> list[str]:
    """Pins that do not install on the Python release ``python``, as "name version: what it requires"."""
    wanted = {name: metadata.metadata(name).get("Requires-Python") or "" for name in pins}
    return [f"{n} {pins[n]}: {w}" for n, w in wanted.items() if not SpecifierSet(w).contains(python)]


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


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    no_deps = {canonicalize_name(package) for package in project["tool"]["peftlib"]["lock"]["no-deps"]}
    pins = resolve(project)
    oldest = project["project"]["requires-python"].removeprefix(">=") + ".0"
    if unfit := too_new(pins, oldest):
        raise SystemExit(f"not for Python {oldest}: {'; '.join(unfit)}. Install an older version, then lock again.")
    LOCK.write_text(lock_text(pins, no_deps))
    ENVIRONMENT.write_text(environment_text(pins, no_deps))
    print(f"{len(pins)} packages: {LOCK.name}, {ENVIRONMENT.name}")


if __name__ == "__main__":
    main()
