"""Run a selection of the tests on the lowest versions that pyproject.toml allows.

    .venv/bin/python tools/lowest.py FOLDER [PYTEST ARGUMENTS ...]

Makes an environment in FOLDER: uv resolves the lowest versions of what peftlib itself requires, with the extra
``quantization``, for the running Python; torch is the one of requirements.lock, of which pip's index has a build for
this machine. An environment that is there is used again. Without arguments it runs SELECTION.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("pytest>=9", "pytest-timeout>=2.4", "pytest-xdist>=3.8", "hypothesis>=6.100", "packaging>=24")
SELECTION = (
    "tests/conformance",
    "-k",
    "lora-bert or lora-gpt2 or prefix_tuning-llama or prefix_tuning-t5 or prompt_tuning-bart or bitfit-opt",
)


def run(*command: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, text=True, **options)  # type: ignore[call-overload]


def resolve(torch: str) -> str:
    """The lowest versions, one pin a line, without what torch brings along."""
    given = f"-e .[quantization]\n{torch}\n" + "\n".join(TESTS)
    command = (sys.executable, "-m", "uv", "pip", "compile", "-", "--resolution", "lowest-direct")
    done = run(*command, "--no-header", "--no-annotate", "-q", input=given, stdout=subprocess.PIPE, check=True)
    pins = [line for line in done.stdout.splitlines() if not line.startswith("-e")]
    return "\n".join(p for p in pins if not re.match(r"(nvidia-|cuda-|triton|torch==)", p)) + "\n"


def environment(folder: Path) -> Path:
    """The Python of an environment of these versions."""
    python, pins = folder / "bin" / "python", folder / "lowest.txt"
    if pins.exists():
        return python
    torch = re.search(r"^torch==\S+", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert torch is not None
    run(sys.executable, "-m", "venv", str(folder), check=True)
    found = resolve(torch[0])
    pip = (str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    run(*pip, torch[0], "setuptools", check=True)
    run(*pip, "--no-deps", *found.split(), check=True)
    pins.write_text(found)
    return python


def main(folder: Path, arguments: list[str]) -> int:
    python = environment(folder)
    settings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return run(str(python), "-m", "pytest", "-q", *(arguments or SELECTION), env=settings).returncode


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2:]))
