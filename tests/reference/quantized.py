"""Quantized weights as their papers write them, one entry at a time, in Python's doubles."""

from scipy.stats import norm

BLOCK, SCALE_BLOCK = 64, 256


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
    codes, scales = quantize(values, levels, BLOCK)
    mean = sum(scales) / len(scales)
    c2, c1 = quantize([s - mean for s in scales], scale_levels, SCALE_BLOCK)
    scales = [scale_levels[code] * c1[i // SCALE_BLOCK] + mean for i, code in enumerate(c2)]
    return [levels[code] * scales[i // BLOCK] for i, code in enumerate(codes)]
