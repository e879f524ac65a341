r"""QLoRA: LoRA beside weights that are kept in 4 bits.

.. math:: y = \operatorname{deq}\bigl(c_1, c_2, W^{\mathrm{NF4}}\bigr)\, x + \frac{\alpha}{r} B A x

Shapes: W (out, in) as 4-bit NormalFloat codes in blocks of 64; c2 (out in / 64,) the blocks' scales in 8 bits, c1 the
scales of 256 such scales; A (r, in), B (out, r). Together 4.127 bits a frozen weight. W is dequantized for each product
and again in the backward pass, never kept. B starts at zero, so the start is the quantized backbone, near the original.
Trained: r (in + out) a matrix. The merge adds the product to the dequantized weight, which then is a plain one, and is
exact with respect to the quantized backbone: it does not bring back what quantization lost.

Source: Dettmers et al. 2023, arXiv:2305.14314: rank 64, alpha 16, every linear map of the layers (embeddings, norms and
heads stay as they are), dropout 0.1 (0.05 in its code's scripts for 13B parameters and more), bfloat16 products on
CUDA; on a CPU they have the input's dtype. Its paged optimizers live in the optimizer (bitsandbytes), not here. The
scales' 8-bit type is the dynamic one of the paper's code. Saved files hold LoRA's factors alone; loading quantizes the
backbone again, with the same result. ``attach(..., keep_original=False)`` frees the original weights; otherwise they
wait on the CPU for ``detach()``.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftlib.anatomy import Site
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import LowRank
from peftlib.mechanisms.quantized import DTYPES, QuantizedLinear, quantize_sites
from peftlib.methods.base import MethodConfig, at_least, one_of
from peftlib.methods.bases.low_rank import QuantizedUpdates


@dataclass(frozen=True)
class QLoRAConfig(MethodConfig):
    """``rank`` r, ``alpha`` (the update is scaled by alpha / r), ``targets`` of the update and ``quantize``, the maps
    kept in 4 bits (site patterns), ``dropout`` on the update's input, ``compute`` dtype of the frozen products (None:
    bfloat16 on CUDA, elsewhere the input's)."""

    rank: int = 64
    alpha: float = 16.0
    targets: tuple[str, ...] | str = "all-linear"
    quantize: tuple[str, ...] | str = "all-linear"
    dropout: float = 0.1
    compute: str | None = None

    def __post_init__(self):
        at_least("rank", self.rank, 1)
        one_of("compute", self.compute, (None, *DTYPES))


class QLoRA(QuantizedUpdates):
    Config = QLoRAConfig
    learning_rate = 2e-3

    def quantize(self, host: Host) -> dict[str, QuantizedLinear]:
        return quantize_sites(host, self.config.quantize, compute=self.config.compute)

    def update(self, site: Site) -> LowRank:
        c = self.config
        return LowRank(site.in_features, site.out_features, c.rank, c.alpha / c.rank, c.dropout)
