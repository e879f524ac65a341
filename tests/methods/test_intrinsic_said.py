"""Intrinsic SAID: the projection against every matrix written out, its memory, groups of scales, what is stored."""

import pytest
import torch
from scipy.linalg import hadamard

import peftlib
from peftlib.efficiency.memory import LiveTensors
from peftlib.errors import ConfigError, TargetError, UnknownNameError
from peftlib.methods.reparameterized.low_rank.intrinsic_said import Point, Projected, draw, walsh_hadamard
from tests.methods.facts import Count, Default, Facts, Start, Trains, ones, zeros
from tests.methods.helpers import backbone, inputs, perturb

CODE = "rabeehk/compacter, seq2seq/projections/intrinsic.py (the authors' code), IntrinsicDimensionLight"

FACTS = Facts(
    "intrinsic_said",
    Start("*.intrinsic.z", zeros(), f"{CODE}: intrinsic_parameter"),
    Start("*.intrinsic.scales", ones(), f"{CODE}: intrinsic_parameter_said"),
    Trains(("*.intrinsic.z", "*.intrinsic.scales"), f"{CODE}: all other parameters are frozen"),
    Default("groups", "tensor", f"{CODE}: one scale a parameter"),
    Default("dimension", 1000, "chosen here: arXiv:2012.13255 varies it, configs/intrinsic_said.json has 20,000"),
    Default("gradient", "true", "chosen here: the code's, 1 / N of it for a tensor, is an option"),
    Count("roberta-base", 1_000, "the scales are taken from the dimension, as in the code"),
    Count("t5-base", 20_000, "rabeehk/compacter, seq2seq/configs/intrinsic_said.json", {"dimension": 20_000}),
    Count("llama-7b", 1_000, "the dimension"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()


def fastfood(n, signs, order, normal):
    """The (n, d) projection ``H G Pi H B / sqrt(n sum G^2)`` with every matrix written out, of size N = len(order)."""
    N, d = len(order), len(signs)
    H = torch.tensor(hadamard(N), dtype=torch.float64)
    B = torch.zeros(N, d, dtype=torch.float64)
    B[range(d), range(d)] = signs.double()
    Pi = torch.zeros(N, N, dtype=torch.float64)
    Pi[range(N), order] = 1
    G = torch.diag(normal.double())
    return (H @ G @ Pi @ H @ B)[:n] / (n * G.square().sum()).sqrt()


@pytest.mark.parametrize("bits", [0, 1, 3, 6, 7, 11])
def test_the_transform_and_its_gradient_are_products_with_hadamards_matrix(bits):
    H = torch.tensor(hadamard(1 << bits), dtype=torch.float64)
    vector = torch.randn(1 << bits, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(1 << bits, dtype=torch.float64)
    result = walsh_hadamard(vector)
    torch.testing.assert_close(result, H @ vector)
    (gradient,) = torch.autograd.grad(result, vector, direction)
    torch.testing.assert_close(gradient, H.T @ direction)


@pytest.mark.parametrize(("shape", "d"), [((7, 9), 10), ((8, 8), 64), ((5,), 40), ((3, 100), 33)])
def test_the_projection_is_the_dense_one(shape, d):
    """Padded sizes and whole powers of two, and a point with more entries than the tensor has."""
    torch.manual_seed(0)
    point = Point(d, 2)
    torch.nn.init.normal_(point.z)
    tensor = torch.randn(shape)
    child = Projected(tensor, point, 1, seed=5)
    size = tensor.numel()
    padded = 1 << (size - 1).bit_length()
    P = fastfood(size, *draw(min(d, padded), padded, 5))
    z = point.z.detach().double()[: min(d, padded)]
    torch.testing.assert_close(child.projection().double(), (P @ z).view(shape), atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        point.scales[1] = -0.5
    torch.testing.assert_close(
        child(tensor).double(), tensor.double() - 0.5 * (P @ z).view(shape), atol=1e-6, rtol=1e-4
    )
    (gradient,) = torch.autograd.grad(child.projection().sum(), point.z)
    torch.testing.assert_close(gradient[: len(z)].double(), P.sum(0), atol=1e-5, rtol=1e-4)
    assert not gradient[len(z) :].any()


@pytest.mark.parametrize(("shape", "padded"), [((7, 9), 64), ((5,), 8), ((3, 100), 512)])
def test_the_codes_gradient_is_a_part_of_the_true_one_that_differs_by_tensor(shape, padded):
    """FastWalshHadamard.backward in the authors' code divides by sqrt(N), and a projection is two of them."""
    point, tensor = Point(8, 1), torch.randn(shape)
    torch.nn.init.normal_(point.z)
    true, code = (Projected(tensor, point, 0, seed=5, gradient=g) for g in ("true", "code"))
    assert torch.equal(true(tensor), code(tensor))
    direction = torch.randn(shape)
    for parameter, factor in ((point.z, padded), (point.scales, 1)):
        expected, found = (torch.autograd.grad(c(tensor), parameter, direction)[0] for c in (true, code))
        torch.testing.assert_close(factor * found, expected)


def test_the_codes_gradient_points_elsewhere_in_a_model():
    gradients = []
    for kind in ("true", "code"):
        torch.manual_seed(0)
        adapted = peftlib.attach(backbone("bert"), "intrinsic_said", dimension=300, gradient=kind)
        adapted.model(**inputs("bert"), labels=torch.tensor([0, 1, 1])).loss.backward()
        gradients.append(adapted.method.point.z.grad)
    assert 0.3 < float(torch.cosine_similarity(*gradients, dim=0)) < 0.9
    with pytest.raises(ConfigError, match="gradient='exact' is not known"):
        peftlib.config("intrinsic_said", gradient="exact")


def test_memory_grows_with_the_tensor_and_not_with_tensor_times_point():
    d, tensor = 1000, torch.zeros(1 << 16)
    point = Point(d, 1)
    child = Projected(tensor, point, 0, seed=0)
    kept = sum(b.numel() * b.element_size() for b in child.buffers())
    assert kept == 8 * tensor.numel() + d
    with LiveTensors() as meter:
        child(tensor).sum().backward()
    assert meter.peak < 10 * 4 * tensor.numel() < 4 * tensor.numel() * d


@pytest.mark.parametrize(("groups", "scales"), [("tensor", None), ("layer", 3)])
def test_the_dimension_has_a_scale_a_group_in_it(groups, scales):
    model = backbone("bert")
    tensors = [n for n, _ in model.bert.named_parameters()]
    adapted = peftlib.attach(model, "intrinsic_said", dimension=100, groups=groups)
    point = adapted.method.point
    assert len(point.scales) == (len(tensors) if scales is None else scales)
    assert len(point.z) + len(point.scales) == 100 == adapted.count().method


def test_a_scale_moves_its_own_layer():
    model = backbone("bert")
    before = {n: p.detach().clone() for n, p in model.bert.named_parameters()}
    adapted = peftlib.attach(model, "intrinsic_said", dimension=100, groups="layer")
    point = adapted.method.point
    with torch.no_grad():
        point.z.normal_()
        point.scales.zero_()
        point.scales[2] = 1.0  # outside the layers, first layer, second layer
    after = dict(adapted.merge().bert.named_parameters())
    moved = {n for n, p in before.items() if not torch.equal(p, after[n])}
    assert moved == {n for n in before if n.startswith("encoder.layer.1.")}


def test_stored_are_the_point_and_the_scales_alone_and_the_seed_makes_the_projections(tmp_path):
    adapted = peftlib.attach(backbone("bert"), "intrinsic_said", dimension=60, groups="layer", projection_seed=3)
    perturb(adapted)
    saved = peftlib.read(adapted.save(tmp_path / "said"))
    assert sum(t.numel() for n, t in saved.state.items() if n not in saved.head) == 60
    model = adapted.model.eval()
    with torch.no_grad():
        expected = model(**inputs("bert")).logits
        same = peftlib.load(backbone("bert"), saved).model.eval()(**inputs("bert")).logits
        other = peftlib.attach(backbone("bert"), "intrinsic_said", dimension=60, groups="layer", projection_seed=4)
        other.host.load_state(adapted.host.state())
        different = other.model.eval()(**inputs("bert")).logits
    assert torch.equal(same, expected)
    assert not torch.allclose(different, expected, atol=1e-3)


def test_bad_input_is_named():
    with pytest.raises(
        TargetError, match=r'dimension=20 leaves nothing beside the scales of \d+ groups.*groups="layer"'
    ):
        peftlib.attach(backbone("bert"), "intrinsic_said", dimension=20)
    with pytest.raises(UnknownNameError, match="'layers'; did you mean 'layer'"):
        peftlib.config("intrinsic_said", groups="layers")
