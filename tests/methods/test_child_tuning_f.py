"""Child-Tuning F: a fresh Bernoulli mask on the gradients, rescaled, the same for everyone at a step."""

from __future__ import annotations

import pytest
import torch

import peftlib
from peftlib.conformance.case import backbone, batch, train
from peftlib.errors import ConfigError
from peftlib.methods.base import TrainingState
from tests.methods.facts import Count, Default, Facts, Trains

CODE = "alibaba/AliceMind, ChildTuning/ChildTuningOptimizer.py, step"

FACTS = Facts(
    "child_tuning_f",
    Default("density", 0.3, "alibaba/AliceMind, ChildTuning/run.sh: REVERSE_P=0.3"),
    Trains(("*",), f"{CODE}: every parameter that has a gradient is masked and steps"),
    Count("roberta-base", 124_055_040, "all parameters below the head"),
    Count("t5-base", 222_903_552, "all parameters"),
    Count("llama-7b", 6_738_415_616, "all parameters"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()


def gradients(adapted: peftlib.Adapted, step: int = 0) -> tuple[dict, dict]:
    """The gradients of a batch before and after the method has seen them."""
    adapted.model.zero_grad()
    with adapted.lifecycle(10):
        adapted.model.eval()
        adapted.model(**batch("bert")).loss.backward()
        before = {n: p.grad.clone() for n, p in adapted.trainable().items()}
        adapted.method.on_gradients(TrainingState(step, 10))
    return before, {n: p.grad.clone() for n, p in adapted.trainable().items()}


def masks(adapted: peftlib.Adapted, step: int = 0) -> torch.Tensor:
    """Which entries of all parameters passed at a step."""
    for parameter in adapted.trainable().values():
        parameter.grad = torch.ones_like(parameter)
    adapted.method.on_gradients(TrainingState(step, 10))
    return torch.cat([p.grad.flatten() > 0 for p in adapted.trainable().values()])


def test_what_passes_is_divided_by_p_and_the_rest_is_zero():
    adapted = peftlib.attach(backbone("bert"), "child_tuning_f", density=0.25)
    before, after = gradients(adapted)
    assert set(before) == {n for n, _ in adapted.model.named_parameters()}
    for name, gradient in before.items():
        passed = after[name] != 0
        assert torch.equal(after[name], torch.where(passed, gradient / 0.25, torch.zeros(())))


@pytest.mark.parametrize("density", [0.05, 0.3, 0.9])
def test_the_share_that_passes_is_p_and_the_mean_of_many_masks_the_gradient(density):
    adapted = peftlib.attach(backbone("bert"), "child_tuning_f", density=density)
    drawn = torch.stack([masks(adapted, step) for step in range(200)]).float()
    deviation = (density * (1 - density)) ** 0.5
    assert abs(float(drawn.mean()) - density) < 5 * deviation / drawn.numel() ** 0.5
    spread = (drawn.mean(0) - density) / (deviation / 200**0.5)
    assert abs(float(spread.std()) - 1) < 0.05, "entries are not drawn independently at each step"


def test_a_step_has_one_mask_and_another_step_or_seed_another():
    one, twin, other = (peftlib.attach(backbone("bert"), "child_tuning_f", seed=s) for s in (0, 0, 1))
    assert torch.equal(masks(one, 3), masks(twin, 3))
    assert not torch.equal(masks(one, 3), masks(one, 4))
    assert not torch.equal(masks(one, 3), masks(other, 3))


def test_with_p_one_it_is_full_fine_tuning():
    child = peftlib.attach(backbone("bert"), "child_tuning_f", density=1.0)
    full = peftlib.attach(backbone("bert"), "full")
    assert train(child, batch("bert")) == train(full, batch("bert"))
    assert child.count() == full.count()


def test_p_must_be_a_share():
    for density in (0.0, 1.5, "half"):
        with pytest.raises(ConfigError, match="density"):
            peftlib.attach(backbone("bert"), "child_tuning_f", density=density)
