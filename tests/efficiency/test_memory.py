"""Memory of training: the count of live tensors, and what k values cost beside full fine-tuning."""

from __future__ import annotations

import pytest
import torch

import peftlib
from peftlib import cli
from peftlib.efficiency import memory
from peftlib.efficiency.memory import LiveTensors

OPTIONS = {"backbone": "tiny-bert", "batch_size": 4, "length": 8, "device": "cpu"}


def test_live_tensors_are_counted_when_made_and_when_gone():
    before = torch.zeros(1000)
    with LiveTensors() as meter:
        view = before.view(10, 100).t()
        before.add_(1)
        assert meter.now == 0
        a = torch.ones(1000)
        b = a[:500] + 1
        assert (meter.now, meter.peak) == (6000, 6000)
        del a
        assert (meter.now, meter.peak) == (2000, 6000)
        assert meter.restart() == 6000
        c = b.double()
        assert (meter.now, meter.peak) == (6000, 6000)
        d = c.view(2, 250)
        del c
        assert meter.now == 6000
        del d
    assert meter.now == 2000
    assert view.shape == (100, 10)


def test_a_backward_pass_is_counted():
    weight = torch.randn(100, 100, requires_grad=True)
    with LiveTensors() as meter:
        (weight.exp() * 2).sum().backward()
    assert meter.now == weight.grad.numel() * 4
    assert meter.peak >= 3 * 40_000


@pytest.mark.parametrize("name", ["fish_mask", "sam", "lt_sft", "diff_pruning"])
def test_training_k_values_takes_states_and_gradients_of_k_values(name):
    options = {"charge_head": False} if name == "fish_mask" else {}
    row = memory.measure(name, peftlib.config(name, density=0.01, **options), **OPTIONS)
    full = memory.measure("full", peftlib.config("full"), **OPTIONS)
    assert row.gradients == 4 * row.trained
    assert row.optimizer == 8 * row.trained
    assert full.optimizer == 8 * full.trained
    assert row.training < 0.6 * full.training
    assert full.calibration == 0
    if name in ("lt_sft", "diff_pruning"):
        assert row.calibration > full.training, "the warm-up training trains everything"


def test_the_table_names_what_was_measured():
    shown = memory.table(memory.compare(("full", "lora"), **OPTIONS))
    assert list(shown.columns[0].cells) == ["full", "lora"]
    assert "cpu" in shown.caption


def test_the_command_measures_memory(capsys):
    assert cli.main(["bench", "full", "lora", "--memory", "--backbone", "tiny-bert"]) == 0
    printed = capsys.readouterr().out
    assert "34,722" in printed
    assert "optimizer" in printed
