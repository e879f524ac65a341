"""Threshold mask: the mask itself, its start, its straight-through gradient, and its one bit a weight."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

import peftlib
from peftlib.conformance.case import backbone, batch, logits, train
from peftlib.errors import ConfigError, LoadError, StateError, TargetError
from peftlib.methods.partial.pretrained_weight_masking.threshold_mask import StraightThroughMask, binarize
from tests.methods.facts import Count, Default, Distribution, Facts, Start, Trains

CODE = "ptlmasking/maskbert, code/masking/maskers.py"
# (-c, s) with c = 0.02, tau = 0.01, rho = 0.05: s = (c + tau) / rho - c = 0.58.
SCORES = Distribution("uniform (-0.02, 0.58)", lambda fan_in, fan_out: 1.0, stats.uniform(-0.02, 0.60))

FACTS = Facts(
    "threshold_mask",
    Default("threshold", 0.01, "ptlmasking/maskbert, code/parameters.py: --threshold"),
    Default("scale", 0.02, "ptlmasking/maskbert, code/parameters.py: --init_scale"),
    Default("biases", False, "ptlmasking/maskbert, code/parameters.py: --mask_biases"),
    Default("init", "uniform", f"{CODE}, MaskedLinearX: uniform unless controlled_init is given"),
    Default("sparsity", 0.05, "chosen here: a setting of the masking schedule, for which the code has no default"),
    Start("*.parametrizations.weight.0.scores", SCORES, f"{CODE}, get_init_scales of MaskedLinear1"),
    Trains(("*.parametrizations.weight.0.scores",), f"{CODE}, replace: weights and biases do not train"),
    Count("roberta-base", 84_934_656, "12 x (4 x 768^2 + 2 x 768 x 3,072): one score a weight of the layers' maps"),
    Count("t5-base", 198_180_864, "12 layers of 4 d^2 + 2 d f and 12 of 8 d^2 + 2 d f, d = 768, f = 3,072"),
    Count("llama-7b", 6_476_005_376, "32 x (4 x 4,096^2 + 3 x 4,096 x 11,008)"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()


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


def attached(family: str = "bert", **options) -> peftlib.Adapted:
    return peftlib.attach(backbone(family), "threshold_mask", **options)


def zeros(adapted: peftlib.Adapted) -> float:
    scores = torch.cat([m.scores.detach().flatten() for m in adapted.method.masks.values()])
    return float((scores <= adapted.config.threshold).float().mean())


@pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.8])
def test_the_initial_share_of_zeros(sparsity):
    adapted = attached(sparsity=sparsity)
    count = adapted.count().method
    assert abs(zeros(adapted) - sparsity) < 5 * (sparsity * (1 - sparsity) / count) ** 0.5
    scores = torch.cat([m.scores.detach().flatten() for m in adapted.method.masks.values()])
    assert scores.min() >= -0.02
    assert scores.max() <= 0.03 / sparsity - 0.02


def test_magnitude_drops_the_smallest_weights_of_each_matrix():
    adapted = attached(sparsity=0.25, init="magnitude")
    plain = dict(backbone("bert").named_parameters())
    for name, mask in adapted.method.masks.items():
        kept = mask.scores > 0.01
        assert int((~kept).sum()) == plain[name].numel() // 4
        assert plain[name][kept].abs().min() >= plain[name][~kept].abs().max()


def test_scores_follow_the_straight_through_gradient():
    adapted, dense = attached(sparsity=0.3), backbone("bert")
    with torch.no_grad():
        for name, mask in adapted.method.masks.items():
            dense.get_parameter(name).mul_(mask.scores > 0.01)
    dense.eval()(**batch("bert")).loss.backward()
    adapted.model(**batch("bert")).loss.backward()
    plain = dict(backbone("bert").named_parameters())
    for name, mask in adapted.method.masks.items():
        torch.testing.assert_close(mask.scores.grad, dense.get_parameter(name).grad * plain[name], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "bart"])
def test_every_projection_is_masked_and_nothing_else(family):
    adapted = attached(family)
    sites = peftlib.anatomy.of(backbone(family)).sites()
    assert adapted.count().method == sum(s.weight.numel() for s in sites)
    assert not any("embed" in n or "norm" in n.lower() for n in adapted.method.masks)


def test_a_part_of_a_fused_projection():
    adapted, plain = attached("gpt2", targets=("attention.value",), sparsity=0.5), backbone("gpt2")
    d = plain.config.n_embd
    for layer, before in zip(adapted.model.transformer.h, plain.transformer.h):
        masked, weight = layer.attn.c_attn.weight, before.attn.c_attn.weight
        assert torch.equal(masked[:, : 2 * d], weight[:, : 2 * d])
        share = float((masked[:, 2 * d :] == 0).float().mean())
        assert 0.35 < share < 0.65
    train(adapted, batch("gpt2"))
    before = logits(adapted.model, **batch("gpt2"))
    torch.testing.assert_close(logits(adapted.merge(), **batch("gpt2")), before)


def test_biases_on_request():
    plain = attached().count().method
    biases = sum(s.out_features for s in peftlib.anatomy.of(backbone("bert")).sites())
    assert attached(biases=True).count().method == plain + biases
    with pytest.raises(TargetError, match="biases=True"):
        attached("llama", biases=True)


def test_training_moves_the_mask_and_no_weight():
    adapted = attached(sparsity=0.3)
    before = {n: m.pack() for n, m in adapted.method.masks.items()}
    plain = {id(p): p.detach().clone() for p in adapted.model.parameters() if not p.requires_grad}
    train(adapted, batch("bert"), steps=5, rate=0.05, weight_decay=0.1)
    assert sum(not torch.equal(m.pack(), before[n]) for n, m in adapted.method.masks.items()) > len(before) // 2
    for parameter in adapted.model.parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, plain[id(parameter)])


def test_one_bit_a_weight_is_stored_and_a_loaded_mask_is_for_use(tmp_path):
    adapted = attached()
    train(adapted, batch("bert"))
    folder = adapted.save(tmp_path / "mask")
    tensors = load_file(folder / "adapter.safetensors")
    count = adapted.count()
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == count.method // 8 + 4 * count.head
    loaded = peftlib.load(backbone("bert"), folder)
    assert torch.equal(logits(loaded.model, **batch("bert")), logits(adapted.model, **batch("bert")))
    assert set(loaded.trainable()) == set(loaded.head_names)
    with pytest.raises(StateError, match="attach the method anew"):
        train(loaded, batch("bert"))
    again = peftlib.load(backbone("bert"), loaded.save(tmp_path / "again"))
    merged = logits(again.merge(), **batch("bert"))
    torch.testing.assert_close(merged, logits(adapted.model, **batch("bert")))


def test_masks_of_other_targets_are_refused():
    state = attached(targets=("ffn.up",)).state()
    with pytest.raises(LoadError, match="not those of this config"):
        attached().method.load_state(state)


def test_merging_leaves_zeros_where_the_mask_has_them():
    adapted = attached(sparsity=0.4)
    plain = dict(backbone("bert").named_parameters())
    masks = {n: m.scores.detach() > 0.01 for n, m in adapted.method.masks.items()}
    merged = adapted.merge()
    for name, mask in masks.items():
        assert torch.equal(merged.get_parameter(name), plain[name] * mask)


def test_bad_settings():
    for options in ({"sparsity": 0}, {"sparsity": 1.5}, {"scale": 0}, {"threshold": -0.5}, {"init": "zeros"}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            attached(**options)
    with pytest.raises(ConfigError, match="threshold"):
        attached(init="magnitude", threshold=0)
