"""Additions behind a module, against the same change of the module's own weights."""

import pytest
import torch

import peftlib
from peftlib.mechanisms.additions import LowRankLinear, Stretch
from tests.methods.helpers import backbone


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_a_stretch_is_a_change_of_the_norm_s_weight(family):
    norm = next(iter(peftlib.anatomy.of(backbone(family)).layers[0].norms.values()))
    torch.manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(torch.randn_like(norm.weight))
        x, stretch = torch.randn(2, 5, len(norm.weight)) * 3 + 1, Stretch(norm)
        before = norm(x)
        assert torch.equal(stretch(x, before), before)
        stretch.w.copy_(torch.randn_like(stretch.w))
        found = stretch(x, before)
        norm.weight.add_(stretch.w)
        torch.testing.assert_close(found, norm(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_low_rank_map_is_linear_and_of_its_rank():
    torch.manual_seed(0)
    linear = LowRankLinear(7, 5, rank=2)
    linear.bias.copy_(torch.randn(5))
    weight = (linear(torch.eye(7)) - linear.bias).T
    assert torch.linalg.matrix_rank(weight) == 2
    x = torch.randn(3, 7)
    torch.testing.assert_close(linear(x), torch.nn.functional.linear(x, weight, linear.bias))
