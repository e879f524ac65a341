"""torchao's int8 and int4 weights: one program looks at all of it, since importing torchao takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.project import ROOT


def test_torchao_weights_are_right_or_refused():
    folder = Path(sys.prefix) / "apart"
    assert (folder / "torchao").is_dir(), "torchao is missing beside the environment: make env"
    done = subprocess.run(
        [sys.executable, "-m", "tests.mechanisms.torchao_script"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name, seen in found["right"].items():
        assert seen["counts"] and seen["trains"], name
        assert max(seen["start"], seen["file"], seen.get("merged", 0)) < 1e-5, (name, seen)
        assert seen.get("packed", 1), name
    assert not {name: text for name, text in found["refused"].items() if not text.startswith("UnsupportedError")}
