"""Schedules over any number of steps, and stages that each have one."""

import pytest
import torch
import transformers

import peftlib
from peftlib.errors import ConfigError
from peftlib.mechanisms.schedules import Schedule, Stage, current, staged
from peftlib.methods.base import TrainingState
from tests.methods.helpers import backbone

OPTIONS = {"cosine_with_min_lr": {"min_lr": 0.02}, "warmup_stable_decay": {"num_decay_steps": 3}}


@pytest.mark.parametrize(
    "name", ["linear", "cosine", "polynomial", "constant", "inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay"]
)
def test_is_transformers_own(name):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    theirs = transformers.get_scheduler(name, optimizer, 2, 10, OPTIONS.get(name))
    factor = Schedule(name, 0.2, OPTIONS.get(name), rate=0.1).over(10)
    for step in range(10):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * factor(step), abs=1e-12)
        optimizer.step()
        theirs.step()


def test_warmup_is_a_share_or_a_number():
    assert Schedule("linear", 0.25).warmup_steps(12) == 3
    assert Schedule("linear", 5).warmup_steps(12) == 5


def test_a_stage_starts_anew_and_may_have_a_schedule_of_its_own():
    stages = (Stage("one", 2), Stage("two", 3, Schedule("constant")), Stage("three", 4))
    factor = staged(Schedule("linear"), stages)
    assert [factor(step) for step in range(9)] == pytest.approx([1, 0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert [current(stages, step)[0].title for step in (0, 1, 2, 4, 5, 8, 9)] == [
        "one", "one", "two", "two", "three", "three", "three",
    ]  # fmt: skip


def test_what_begins_later_has_the_schedule_that_is_left():
    state = TrainingState(6, 10, Schedule("linear", 2), (Stage("", 10),))
    assert state.rate() == pytest.approx(4 / 8)
    assert state.rate_since(4) == pytest.approx(1.0)  # two steps of warm-up, as the whole has
    assert state.rate_since(4, warmup_steps=4) == pytest.approx(0.5)
    assert TrainingState(6, 10).rate_since(4, warmup_steps=4) == pytest.approx(0.5)  # a constant rate, with a warm-up


def test_parts_with_different_stages_cannot_be_trained_together():
    class Other(peftlib.Method):
        def stages(self, total):
            return (Stage("one", 1), Stage("two", total - 1))

    adapted = peftlib.attach(backbone("bert"), peftlib.combine("hadamard_adapter", "lora"))
    assert [stage.title for stage in adapted.lifecycle(8).stages] == ["task head", "adapter and norms"]
    adapted.method.parts[1].stages = Other(peftlib.MethodConfig()).stages
    with pytest.raises(ConfigError, match="hadamard_adapter and lora train in different stages"):
        adapted.lifecycle(8)
