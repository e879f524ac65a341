r"""LoftQ: LoRA starts from the low-rank part of what quantization loses.

.. math:: \min_{Q, A, B} \Bigl\|W - Q - \frac{\alpha}{r} B A\Bigr\|_F, \qquad
    Q_t = q\Bigl(W - \frac{\alpha}{r} B_{t-1} A_{t-1}\Bigr), \quad
    \frac{\alpha}{r} B_t A_t = \operatorname{SVD}_r(W - Q_t)

Shapes: W (out, in), Q as NormalFloat codes in blocks of 64, or with ``quantizer="uniform"`` as even levels between two
standard deviations on both sides of W's mean (q quantizes and computes back), A (r, in), B (out, r). From B_0 A_0 = 0,
so Q_1 is plain quantization, ``iterations`` T times; the factors are :math:`\sqrt{S} V^\top` and :math:`U \sqrt{S}`,
each divided by :math:`\sqrt{\alpha / r}`. The start is near the backbone's, nearer than QLoRA's. Trained: r (in + out)
a matrix. Merging adds the product to the dequantized weight, which then is a plain one.

Source: Li et al. 2023, arXiv:2310.08659, and its code: T = 5 (HF peft: 1), 4 or 2 bits, or between, where the first
layers take 4 bits and the others 2; NormalFloat, or as in its GLUE script uniform levels, there with 2 bits, rank 32
and a scale of 1. That script also decomposes the tables of words and positions, (V, d); here ``embeddings`` names them,
and without a name they stay as they are, as in the code's path through HF peft. Where we differ: the best iterate is
kept, not the last (the error can rise again: at 2 bits after a few iterations, at 4 bits after more); alpha / r is
divided out, so that a scale other than 1 leaves the start as good (HF peft takes the factors as they are); a map that
is quantized and not a target is quantized plainly, one that is a target and not quantized gets LoRA's own start.
``double_quantization`` of the scales is off as in the code; on, the error counts it. Files hold the factors alone:
loading repeats the alternation on the backbone, in float64 so that the codes come out the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.anatomy import Site
from peftlib.errors import TargetError, UnsupportedError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import LowRank, kaiming
from peftlib.mechanisms.quantized import DTYPES, NormalFloatWeight, QuantizedLinear, UniformWeight
from peftlib.methods.base import ConfigError, MethodConfig, at_least, one_of
from peftlib.methods.bases.low_rank import QuantizedUpdates

Factors = tuple[torch.Tensor, torch.Tensor]
"""B and A."""


@dataclass(frozen=True)
class LoftQConfig(MethodConfig):
    """``rank`` r, ``alpha`` (the update is scaled by alpha / r), ``targets`` of the update and ``quantize``, the maps
    kept in few ``bits`` (site patterns; 4, 2 or a mean between them over the layers) by the ``quantizer``
    "normal_float" or "uniform", ``iterations`` T, ``dropout`` on the update's input, ``double_quantization`` of the
    scales, ``compute`` dtype of the frozen products (None: bfloat16 on CUDA, elsewhere the input's), ``embeddings``,
    the tables that are decomposed too, by the last part of their names, such as "word_embeddings"."""

    rank: int = 64
    alpha: float = 64.0
    targets: tuple[str, ...] | str = "all-linear"
    quantize: tuple[str, ...] | str = "all-linear"
    bits: float = 4
    quantizer: str = "normal_float"
    iterations: int = 5
    dropout: float = 0.0
    double_quantization: bool = False
    compute: str | None = None
    embeddings: tuple[str, ...] = ()

    def __post_init__(self):
        at_least("rank", self.rank, 1)
        at_least("iterations", self.iterations, 1)
        at_least("bits", self.bits, 2)
        if self.bits > 4:
            raise ConfigError(f"bits={self.bits!r} is more than 4; give 4, 2, or a mean between them over the layers")
        if not self.alpha > 0:
            raise ConfigError(f"alpha={self.alpha!r} must be above 0: the start is divided by alpha / rank")
        one_of("compute", self.compute, (None, *DTYPES))
        one_of("quantizer", self.quantizer, ("normal_float", "uniform"))
        if self.quantizer == "uniform" and self.double_quantization:
            raise ConfigError("double_quantization=True is of NormalFloat's scales; a uniform quantizer has one scale")


class QuantizedEmbedding(nn.Module):
    """A table of embeddings that keeps its weight (V, d) quantized."""

    def __init__(self, table: nn.Embedding, quantize: Callable[[torch.Tensor], nn.Module]):
        super().__init__()
        self.quantized = quantize(table.weight)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized (V, d) weight: a fresh tensor, so writing to it changes nothing."""
        return self.quantized(cast(torch.Tensor, self.quantized.like).dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight)  # (b, t) -> (b, t, d)

    def unpack(self, weight: torch.Tensor) -> None:
        """Become a plain table with this weight; hooks and children stay."""
        plain = nn.Embedding.from_pretrained(weight.to(self.weight.dtype))
        del self.quantized
        self.__class__ = nn.Embedding  # type: ignore[assignment]
        vars(self).update({name: value for name, value in vars(plain).items() if not name.startswith("_")})
        self.register_parameter("weight", plain.weight)


class EmbeddingUpdate(nn.Module):
    """``forward(ids, y) = y + scale * B[ids] A`` for the output y (b, t, d) of a table: B (V, r), A (r, d)."""

    def __init__(self, V: int, d: int, rank: int, scale: float):
        super().__init__()
        self.A = nn.Parameter(kaiming(torch.empty(rank, d)))
        self.B = nn.Parameter(torch.zeros(V, rank))
        self.scale = scale

    def forward(self, ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + (self.scale * F.embedding(ids, self.B) @ self.A).to(y.dtype)  # (b, t, r) (r, d) -> (b, t, d)

    def delta(self) -> torch.Tensor:
        """The (V, d) update."""
        return self.scale * (self.B @ self.A).detach()


class LoftQ(QuantizedUpdates):
    """``errors``: path -> Frobenius norm of W minus its approximation, over that of W: plainly quantized, then after
    each of the iterations."""

    Config = LoftQConfig
    learning_rate = 5e-4

    def attach(self, host: Host) -> None:
        tables = find_tables(host, self.config.embeddings, self.config.rank)
        super().attach(host)
        self.tables: dict[str, tuple[QuantizedEmbedding, EmbeddingUpdate]] = {}
        for path, table in tables.items():
            fit = partial(self._fit, path, {path: slice(None)}, 4 if self.config.bits == 4 else 2)
            quantized = host.replace(path, QuantizedEmbedding(table, fit))
            update = EmbeddingUpdate(*table.weight.shape, self.config.rank, self.config.alpha / self.config.rank)
            self._start(path, update)
            host.after(quantized, self.child, update)
            self.tables[path] = quantized, update

    def quantize(self, host: Host) -> dict[str, QuantizedLinear]:
        c = self.config
        self.errors: dict[str, list[float]] = {}
        self.starts: dict[str, Factors] = {}
        targets = host.anatomy.sites(c.targets)
        fine = round(host.anatomy.num_layers * (c.bits - 2) / 2)  # so many layers take 4 bits, the others 2
        layers = {site.path: i for i, layer in enumerate(host.anatomy.layers) for site in layer.sites.values()}
        modules = {}
        for path in dict.fromkeys(site.path for site in host.anatomy.sites(c.quantize, optional=True)):
            parts = {str(site): site.rows for site in targets if site.path == path}
            fit = partial(self._fit, path, parts, 4 if layers[path] < fine else 2)
            module = QuantizedLinear(host.model.get_submodule(path), DTYPES.get(c.compute), fit)
            modules[path] = host.replace(path, module)
        return modules

    def _fit(
        self, path: str, parts: dict[str, slice], bits: int, weight: torch.Tensor
    ) -> NormalFloatWeight | UniformWeight:
        quantize: Callable[[torch.Tensor], NormalFloatWeight | UniformWeight]
        if self.config.quantizer == "uniform":
            quantize = partial(UniformWeight, bits=bits)
        else:
            quantize = partial(NormalFloatWeight, bits=bits, double=self.config.double_quantization)
        if not parts or weight.is_meta:
            return quantize(weight)
        best, found, self.errors[path] = alternate(weight, parts, self.config.rank, quantize, self.config.iterations)
        self.starts.update(found)
        return best

    def update(self, site: Site) -> LowRank:
        c = self.config
        update = LowRank(site.in_features, site.out_features, c.rank, c.alpha / c.rank, c.dropout)
        self._start(str(site), update)
        return update

    @torch.no_grad()
    def _start(self, place: str, update: LowRank | EmbeddingUpdate) -> None:
        if (start := self.starts.pop(place, None)) is not None:
            for factor, value in zip((update.B, update.A), start):
                factor.copy_(value / update.scale**0.5)

    def merge(self) -> None:
        super().merge()
        for table, update in self.tables.values():
            table.unpack(table.quantized(torch.float32) + update.delta())  # (V, d)


def find_tables(host: Host, names: tuple[str, ...], rank: int) -> dict[str, nn.Embedding]:
    """Path -> table of embeddings. Raises TargetError for a name that none has or a rank that does not fit it,
    UnsupportedError for a table that computes something else than a look-up, or that other modules share."""
    tables = {path: module for path, module in host.model.named_modules() if isinstance(module, nn.Embedding)}
    found = {}
    for name in names:
        paths = [path for path in tables if path.rpartition(".")[2] == name]
        if not paths:
            known = ", ".join(sorted({path.rpartition(".")[2] for path in tables}))
            raise TargetError(f"embeddings={name!r} matches nothing in {type(host.model).__name__}; it has {known}")
        for path in paths:
            table = tables[path]
            users = sum(m._parameters.get("weight") is table.weight for m in host.model.modules())
            places = sum(m is table for _, m in host.model.named_modules(remove_duplicate=False))
            if type(table) is not nn.Embedding or users > 1 or places > 1:
                raise UnsupportedError(f"{path} is shared with other modules or no plain table; leave {name!r} out")
            if rank > min(table.weight.shape):
                raise TargetError(f"rank {rank} does not fit {path} {tuple(table.weight.shape)}; choose a smaller one")
            found[path] = table
    return found


@torch.no_grad()
def alternate(
    weight: torch.Tensor,
    parts: dict[str, slice],
    rank: int,
    quantize: Callable[[torch.Tensor], NormalFloatWeight | UniformWeight],
    iterations: int,
) -> tuple[NormalFloatWeight | UniformWeight, dict[str, Factors], list[float]]:
    """Quantization and decomposition in turn: the best iterate's quantized weight, its factors, one pair for each of
    the ``parts`` (rows of the weight), and the relative errors, of plain quantization and after each iteration. The
    product B A of a pair is the equation's (alpha / r) B A."""
    W, errors, best = weight.double(), [], None  # (out, in)
    rest = W  # W - B A, (out, in)
    for _ in range(iterations):
        Q = quantize(rest)
        lost, rest = W - Q(torch.float64), W.clone()  # W - Q and W, (out, in); B A is subtracted below
        if not errors:
            errors.append(float(lost.norm() / W.norm()))
        found = {name: factors(lost[rows], rank) for name, rows in parts.items()}
        for name, (B, A) in found.items():
            rest[parts[name]] -= B @ A  # (out, r) (r, in) -> (out, in)
            lost[parts[name]] -= B @ A
        errors.append(float(lost.norm() / W.norm()))
        if errors[-1] <= min(errors[1:]):
            best = Q, found
    Q, found = best
    Q.like = weight.new_empty(0)
    return Q, found, errors


def factors(matrix: torch.Tensor, rank: int) -> Factors:
    """B (out, r) and A (r, in) whose product is the best approximation of an (out, in) matrix, the singular values'
    roots in each, in float64.

    They come from the eigenvectors of the smaller Gram matrix, which takes a fraction of a whole decomposition's time.
    """
    matrix = matrix.double()  # (out, in)
    wide = matrix.shape[0] <= matrix.shape[1]
    M = matrix if wide else matrix.T  # (m, n) with m <= n
    U = torch.linalg.eigh(M @ M.T).eigenvectors[:, -rank:].flip(1)  # (m, m) -> (m, r)
    SV = U.T @ M  # (m, r), (m, n) -> (r, n)
    roots = SV.norm(dim=1).sqrt()  # (r, n) -> (r,)
    left, right = U * roots, SV / roots.clamp(min=1e-150)[:, None]  # (m, r), (r, n)
    return (left, right) if wide else (right.T, left.T)
