"""The planner: what it counts is what a real step has alive, category by category."""

import math
from pathlib import Path

import pytest
import torch

import peftlib
from peftlib import backbones, cli
from peftlib.efficiency import planner
from peftlib.errors import UnknownNameError, UnsupportedError

ROOT = Path(__file__).parents[2]
TINY = {"batch_size": 4, "length": 16, "precision": "float32"}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "head"), [("tiny-bert", "classification"), ("tiny-llama", "causal_lm"), ("tiny-t5", "seq2seq")]
)
def test_shapes_alone_tell_what_a_real_step_has_alive(name, head, checkpointing):
    found = []
    for model in (backbones.shapes(name, head=head), backbones.load(name, head=head).model):
        adapted = peftlib.attach(model, "lora")
        found.append(planner._activations(model, adapted, torch.float32, 4, 16, head, checkpointing))
    assert found[0] == pytest.approx(found[1], rel=0.1), "kernels differ a little in what they keep"
    assert found[0] > 4 * 16 * 32 * 4


def test_weights_gradients_and_states_are_those_of_the_parameters():
    full = planner.plan("roberta-base", "full", head="classification", length=8)
    assert full.trained == 124_647_170
    buffers = sum(b.numel() * b.element_size() for b in backbones.shapes("roberta-base").to(torch.bfloat16).buffers())
    assert full.weights == 2 * full.trained + buffers
    assert full.gradients == 2 * full.trained and full.optimizer == 4 * full.trained
    mixed = planner.plan("roberta-base", "full", head="classification", length=8, precision="mixed")
    assert mixed.gradients == 4 * full.trained and mixed.optimizer == 8 * full.trained
    assert mixed.activations == full.activations, "mixed precision computes in bfloat16"
    lora = planner.plan("roberta-base", "lora", head="classification", length=8)
    head, new = 592_130, 294_912
    assert lora.trained == head + new
    assert lora.gradients == 4 * (head + new), "what trains is float32"
    assert lora.weights == full.weights + 2 * head + 4 * new, (
        "the head is float32, and bfloat16 in a whole bfloat16 model"
    )
    eight = planner.plan("roberta-base", "lora", head="classification", length=8, optimizer="adamw-8bit")
    assert eight.optimizer == 2 * lora.trained
    assert lora.total == lora.weights + lora.gradients + lora.optimizer + lora.activations


def test_quantized_weights_and_checkpointing_take_less():
    plans = {
        (method, recompute): planner.plan("tiny-llama", method, checkpointing=recompute, rank=4, **TINY)
        for method in ("lora", "qlora")
        for recompute in (False, True)
    }
    assert plans["qlora", False].weights < plans["lora", False].weights
    for method in ("lora", "qlora"):
        assert plans[method, True].activations < plans[method, False].activations


def test_the_introduction_s_figures_for_falcon_180b_are_the_planner_s():
    plan = planner.plan("falcon-180b", "full", precision="mixed", length=2048)  # a family without a table of its parts
    assert plan.trained == pytest.approx(179e9, rel=0.01)
    text = (ROOT / "book" / "intro.md").read_text()
    states = plan.weights + plan.gradients + plan.optimizer
    assert states == pytest.approx(16 * plan.trained, rel=1e-3)
    for figure in (f"{states / 1e9:,.0f} GB", f"{plan.activations / 1e9:,.0f} GB", f"{plan.total / 1e9:,.0f} GB"):
        assert figure in text
    assert f"{math.ceil(plan.total / 80e9)} GPUs" in text


def test_what_cannot_be_planned_says_why():
    with pytest.raises(UnsupportedError, match=r"fish_mask chooses from data.*peftlib\.efficiency\.memory"):
        planner.plan("tiny-bert", "fish_mask", head="classification", density=0.1, **TINY)
    with pytest.raises(UnsupportedError, match="falcon"):
        planner.plan("falcon-180b", "lora")
    with pytest.raises(UnknownNameError, match="'float23'; did you mean 'float32'"):
        planner.plan("tiny-bert", "lora", head="classification", precision="float23")
    with pytest.raises(UnknownNameError, match="optimizer 'adam'"):
        planner.plan("tiny-bert", "lora", head="classification", optimizer="adam")


def test_the_command_prints_what_fits(capsys, monkeypatch):
    monkeypatch.setattr(cli.out, "width", 160)
    assert cli.main(["plan", "tiny-llama", "full", "lora", "--length", "16", "--gpu", "24"]) == 0
    printed = capsys.readouterr().out
    assert "fits 24 GB" in printed and printed.count("yes") == 2
