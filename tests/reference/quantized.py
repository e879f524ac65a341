"""Quantized weights as their papers write them, one entry at a time, in Python's doubles."""

import torch
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


def group_quantized(rows: list[list[float]], bits: int, group: int) -> list[list[float]]:
    """Xu et al. 2023: each group of a row on 2^bits levels between its smallest and its largest entry."""
    found = []
    for row in rows:
        found.append([])
        for start in range(0, len(row), group):
            part = row[start : start + group]
            low = min(part)
            step = (max(part) - low) / (2**bits - 1)
            found[-1] += [low + step * round((w - low) / step) for w in part]
    return found


def qa_lora(x, weight, bias, a, b, alpha, rank, group):
    """Xu et al. 2023: W x + (alpha / r) B A pool(x), means over groups of inputs, for each row of x."""
    rows = []
    for token in x.tolist():
        pooled = [sum(token[i : i + group]) / group for i in range(0, len(token), group)]
        inner = [sum(w * v for w, v in zip(row, pooled)) for row in a.tolist()]
        rows.append(
            [
                sum(w * v for w, v in zip(row, token)) + c + alpha / rank * sum(w * v for w, v in zip(up, inner))
                for row, c, up in zip(weight.tolist(), bias.tolist(), b.tolist())
            ]
        )
    return torch.tensor(rows)
