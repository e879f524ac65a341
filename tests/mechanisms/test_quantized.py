"""NF4 and double quantization: the paper's definition, bitsandbytes bit for bit, the quantized linear map."""

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftlib.anatomy import weights
from peftlib.errors import UnsupportedError
from peftlib.mechanisms import quantized
from peftlib.mechanisms.quantized import NF4, NormalFloatWeight, QuantizedLinear, dynamic_levels


def normal_float_levels(offset: float = 0.9677083, bits: int = 4) -> list[float]:
    """Dettmers et al. 2023: quantiles of N(0, 1), eight negative and nine positive ones that share the zero, scaled to
    [-1, 1]. ``offset`` is the outermost quantile. With two ``bits``: two negative and three positive ones."""
    half = 2 ** (bits - 1)

    def quantiles(count: int) -> list[float]:
        step = (offset - 0.5) / (count - 1)
        return [float(norm.ppf(offset - i * step)) for i in range(count - 1)]

    levels = [*quantiles(half + 1), 0.0, *(-q for q in quantiles(half))]
    largest = max(levels)
    return sorted(level / largest for level in levels)


def quantize(values: list[float], levels: list[float], block: int) -> tuple[list[int], list[float]]:
    """Nearest level of each value over its block's largest magnitude."""
    codes, scales = [], []
    for start in range(0, len(values), block):
        part = values[start : start + block]
        scales.append(max(abs(v) for v in part))
        scale = scales[-1] or 1.0
        codes += [min(range(len(levels)), key=lambda c: abs(v / scale - levels[c])) for v in part]
    return codes, scales


def dequantized(values: list[float], levels: list[float], scale_levels: list[float]) -> list[float]:
    """What remains of a weight: c2 = 8-bit codes of the scales without their mean, c1 = the scales of these."""
    codes, scales = quantize(values, levels, 64)
    mean = sum(scales) / len(scales)
    c2, c1 = quantize([s - mean for s in scales], scale_levels, 256)
    scales = [scale_levels[code] * c1[i // 256] + mean for i, code in enumerate(c2)]
    return [levels[code] * scales[i // 64] for i, code in enumerate(codes)]


SHAPES = [(256, 320), (1000, 1024), (257, 321), (3, 5), (1, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _weight(shape, dtype=torch.float32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


# What it is


def test_levels_are_quantiles_of_the_normal_distribution():
    assert list(NF4) == pytest.approx(normal_float_levels(), abs=1e-6)
    assert 0.0 in NF4
    assert list(NF4) == sorted(NF4)


def test_levels_of_the_scales_are_those_of_bitsandbytes():
    assert dynamic_levels() == bnb.create_dynamic_map().tolist()


@pytest.mark.parametrize("shape", [(40, 72), (3, 5)], ids=str)
def test_dequantized_weight_is_the_papers(shape):
    weight = _weight(shape)
    expected = dequantized(weight.flatten().tolist(), list(NF4), dynamic_levels())
    torch.testing.assert_close(
        NormalFloatWeight(weight)(torch.float32).flatten(), torch.tensor(expected), atol=1e-7, rtol=1e-5
    )


# The same as bitsandbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_scales_are_those_of_bitsandbytes_bit_for_bit(shape, dtype):
    weight = _weight(shape, dtype)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes, scales = quantized.quantize(weight, torch.tensor(NF4), 64)
    assert torch.equal(scales, state.absmax)
    assert torch.equal(NormalFloatWeight(weight).codes, packed.flatten())
    high = packed.flatten() >> 4
    assert torch.equal(codes[::2], high)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_double_quantization_is_that_of_bitsandbytes(shape, dtype):
    """Mean and outer scales bit for bit. bitsandbytes' search on a CPU misses the nearest level for a few scales in a
    thousand that lie near the middle between two; there ours is the nearer one."""
    weight = _weight(shape, dtype)
    _, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    mine = NormalFloatWeight(weight)
    scales = mine.scales.view(torch.float32)
    assert torch.equal(scales[-1], state.offset)
    assert torch.equal(scales[:-1], state.state2.absmax)
    _, exact = quantized.quantize(weight, torch.tensor(NF4), 64)
    outer = scales[:-1].repeat_interleave(256)[: len(exact)]
    other = ((state.absmax != mine.scale_codes) & (outer > 0)).nonzero().flatten()
    assert len(other) <= 0.01 * len(exact)
    levels, units = torch.tensor(dynamic_levels()), ((exact - scales[-1]) / outer)[other]
    theirs, ours = levels[state.absmax.int()[other]], levels[mine.scale_codes.int()[other]]
    assert ((theirs - ours).abs() < 0.015).all()
    assert ((units - ours).abs() <= (units - theirs).abs()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantization_is_that_of_bitsandbytes_bit_for_bit(shape, dtype):
    """From the same codes, single and doubly quantized."""
    weight = _weight(shape, dtype)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    mine = NormalFloatWeight(weight)
    mine.scale_codes.copy_(state.absmax)
    assert torch.equal(mine(dtype), bnb.dequantize_4bit(packed, state).view(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fast_kernel_gives_the_same_bits(shape):
    mine = NormalFloatWeight(_weight(shape))
    for dtype in DTYPES:
        assert torch.equal(quantized._kernel(mine.codes, mine.block_scales(), mine.shape, dtype), mine(dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_what_the_cpu_gives():
    weight = _weight((1000, 1024))
    mine = NormalFloatWeight(weight)
    expected = mine(torch.float32)
    torch.testing.assert_close(mine.cuda()(torch.float32).cpu(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(NormalFloatWeight(weight.cuda())(torch.float32).cpu(), expected, atol=1e-6, rtol=1e-6)


# Memory and state


def test_memory_is_4_127_bits_an_entry():
    weight = torch.empty(1024, 1024).normal_(std=0.02)
    mine = NormalFloatWeight(weight)
    assert mine.nbytes * 8 / weight.numel() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    assert sum(t.numel() * t.element_size() for t in mine.state_dict().values()) == mine.nbytes


def test_a_change_of_dtype_leaves_the_levels_alone():
    mine = NormalFloatWeight(_weight((40, 64)))
    before = mine(torch.float32)
    assert torch.equal(mine.to(torch.bfloat16).to(torch.float64)(torch.float32), before)
    assert mine.like.dtype == torch.float64


def test_a_weight_of_zeros_stays_zero():
    assert not NormalFloatWeight(torch.zeros(8, 64))(torch.float32).any()


# The linear map


def _modules(kind):
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Linear(40, 24)
    if kind == "no bias":
        return nn.Linear(40, 24, bias=False)
    module = Conv1D(24, 40)
    nn.init.normal_(module.bias)
    return module


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_quantized_map_is_a_product_with_the_dequantized_weight(kind):
    module = _modules(kind)
    mine = QuantizedLinear(module)
    assert (mine.in_features, mine.out_features) == (40, 24)
    assert mine.weight.shape == (24, 40)
    frozen = module.weight.detach().T if kind == "conv1d" else module.weight.detach()
    assert 0 < float((mine.weight - frozen).norm() / frozen.norm()) < 0.12
    x = torch.randn(2, 3, 40, requires_grad=True)
    direction = torch.randn(2, 3, 24)
    expected = F.linear(x, mine.weight, module.bias)
    assert torch.equal(mine(x), expected)
    (theirs,) = torch.autograd.grad((expected * direction).sum(), x)
    (ours,) = torch.autograd.grad((mine(x) * direction).sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_a_bias_can_train():
    mine = QuantizedLinear(nn.Linear(40, 24))
    direction = torch.randn(2, 3, 24)
    (mine(torch.randn(2, 3, 40)) * direction).sum().backward()
    torch.testing.assert_close(mine.bias.grad, direction.sum((0, 1)))


@pytest.mark.parametrize("mode", ["plain", "autocast", "compute"])
def test_the_dequantized_weight_is_not_kept_for_the_backward_pass(mode):
    mine = QuantizedLinear(nn.Linear(256, 512), torch.bfloat16 if mode == "compute" else None)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    x = torch.randn(4, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", enabled=mode == "autocast"):
        y = mine(x)
    assert y.dtype == (torch.bfloat16 if mode == "autocast" else torch.float32)
    assert sum(t.numel() for t in kept) < 256 * 512
    y.sum().backward()
    torch.testing.assert_close(x.grad[0], mine.weight.sum(0), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_plain_is_a_module_of_the_same_kind(kind):
    module = _modules(kind)
    mine = QuantizedLinear(module)
    weights.unpack(mine)
    plain = mine
    assert type(plain) is type(module)
    assert plain.bias is module.bias
    assert list(plain.state_dict()) == list(module.state_dict())
    x = torch.randn(5, 40)
    torch.testing.assert_close(plain(x), mine(x), atol=1e-6, rtol=1e-5)


def test_what_is_not_a_linear_map():
    with pytest.raises(UnsupportedError, match="Embedding"):
        QuantizedLinear(nn.Embedding(4, 4))
