"""``torchrun`` with two processes on the CPU (``accelerate launch`` has no such launcher without MPI)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import peftlib
from peftlib import tasks
from peftlib.conformance.case import Case, backbone, tokenizer

SCRIPT = Path(__file__).with_name("launch_script.py")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora"])
def test_two_processes_train_one_adapter(method, tmp_path):
    """Two processes with four rows each agree, and take the steps of one that accumulates two batches of four."""
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *(str(SCRIPT), method, str(tmp_path / "adapter")),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=SCRIPT.parents[2],
        env=os.environ
        | {
            "ACCELERATE_USE_CPU": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(SCRIPT.parents[2]),
        },
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "processes: 2" in run.stdout
    loaded = peftlib.load(backbone("bert"), tmp_path / "adapter")
    alone = Case(method, "bert").attach()
    peftlib.fit(
        alone,
        tasks.load("smoke"),
        tokenizer=tokenizer("bert"),
        steps=4,
        batch_size=4,
        gradient_accumulation=2,
        learning_rate=1e-3,
        evaluate_on=None,
        progress=False,
    )
    for name, parameter in alone.trainable().items():
        assert torch.allclose(parameter, loaded.trainable()[name], atol=1e-5), name
