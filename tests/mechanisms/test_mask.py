"""Straight-through masks."""

from __future__ import annotations

import pytest
import torch

from peftlib.errors import LoadError, StateError
from peftlib.mechanisms.mask import StraightThroughMask, binarize


def test_the_step_is_strict_and_its_gradient_the_identitys():
    scores = torch.tensor([-1.0, 0.0, 0.5, 0.50001, 7.0], requires_grad=True)
    hard = binarize(scores, 0.5)
    assert hard.tolist() == [0, 0, 0, 1, 1]
    hard.backward(torch.arange(5.0))
    assert scores.grad.tolist() == [0, 1, 2, 3, 4]


def test_the_scores_gradient_is_weight_times_the_masked_weights_gradient():
    torch.manual_seed(0)
    weight, scores, x = torch.randn(4, 6), torch.randn(4, 6), torch.randn(3, 6)
    mask = StraightThroughMask(scores.clone(), 0.0)
    masked = (weight * (scores > 0)).requires_grad_()
    (x @ masked.T).square().sum().backward()
    (x @ mask(weight).T).square().sum().backward()
    torch.testing.assert_close(mask.scores.grad, masked.grad * weight)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_part_of_the_tensor(dim):
    tensor, index = torch.arange(24.0).reshape(4, 6) + 1, torch.tensor([0, 2])
    scores = torch.tensor([-1.0, 1.0]).repeat(6)[: 2 * tensor.shape[1 - dim]]
    scores = scores.reshape(2, -1) if dim == 0 else scores.reshape(-1, 2)
    mask = StraightThroughMask(scores, 0.0, dim, index)
    expected = tensor.clone()
    expected.index_copy_(dim, index, tensor.index_select(dim, index) * (scores > 0))
    assert torch.equal(mask(tensor), expected)
    assert (expected == 0).any()


def test_a_deployed_mask_computes_the_same_and_refuses_training():
    torch.manual_seed(0)
    weight, mask = torch.randn(5, 7), StraightThroughMask(torch.randn(5, 7), 0.1)
    before, packed = mask(weight).detach(), mask.pack()
    assert packed.numel() == 5
    fresh = StraightThroughMask(torch.randn(5, 7), 0.1).eval()
    with pytest.raises(LoadError):
        fresh.deploy(packed[:-1])
    fresh.deploy(packed)
    assert torch.equal(fresh(weight), before)
    assert torch.equal(fresh.pack(), packed)
    assert not list(fresh.parameters())
    fresh.train()
    with pytest.raises(StateError, match="bits only"):
        fresh(weight)
    with torch.no_grad():
        assert torch.equal(fresh(weight), before)
