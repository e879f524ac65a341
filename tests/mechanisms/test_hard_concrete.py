"""Hard-concrete gates against their definition and against chance itself."""

from __future__ import annotations

import pytest
import torch

from peftlib.mechanisms import hard_concrete as hc

LOW, HIGH, DRAWS = -0.4, 1.3, 20_000


def draws(alpha: torch.Tensor) -> torch.Tensor:
    return hc.gate(alpha, hc.noise_like(alpha.expand(DRAWS, *alpha.shape)), LOW, HIGH)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_expected_number_of_open_gates_is_what_many_draws_give():
    alpha = torch.linspace(-4, 4, 9)
    z = draws(alpha)
    assert float(z.min()) == 0 and float(z.max()) == 1
    opened = (z > 0).float()
    error = (opened.mean(0) - hc.open_probability(alpha, LOW, HIGH)).abs()
    assert (error < 4 * opened.std(0) / DRAWS**0.5 + 2e-4).all()  # u keeps 1e-4 away from its ends
    count = opened.sum(1)
    expected = float(hc.expected_open(alpha, None, LOW, HIGH))
    assert abs(float(count.mean()) - expected) < 4 * float(count.std()) / DRAWS**0.5


@pytest.mark.parametrize("group", [-1.5, 0.0, 3.0])
def test_with_a_gate_of_the_whole_tensor_both_must_be_open(group):
    alpha, group = torch.linspace(-3, 3, 8).reshape(2, 4), torch.tensor(group)
    count = (draws(alpha) * draws(group)[:, None, None] > 0).float().sum((1, 2))
    expected = float(hc.expected_open(alpha, group, LOW, HIGH))
    assert abs(float(count.mean()) - expected) < 4 * float(count.std()) / DRAWS**0.5
    assert expected < 0.99 * float(hc.expected_open(alpha, None, LOW, HIGH))


def test_a_gate_is_its_formula_and_has_its_gradient_where_it_is_neither_open_nor_closed():
    alpha = torch.tensor([-5.0, -0.5, 0.7, 5.0], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([0.0, 0.3, -0.2, 0.0], dtype=torch.float64)
    z = hc.gate(alpha, noise, LOW, HIGH)
    s = 1 / (1 + (-(alpha + noise)).exp())
    assert torch.allclose(z, (s * 1.7 - 0.4).clamp(0, 1), atol=1e-12)
    z.sum().backward()
    inside = (s * 1.7 - 0.4 > 0) & (s * 1.7 - 0.4 < 1)
    assert inside.tolist() == [False, True, True, False]
    assert torch.allclose(alpha.grad, torch.where(inside, 1.7 * s * (1 - s), 0.0), atol=1e-12)
