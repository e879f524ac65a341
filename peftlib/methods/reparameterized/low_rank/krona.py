r"""KronA: a Kronecker product of two small matrices beside frozen linear maps, in place of LoRA's low-rank product.

.. math:: y = W x + s\,(A \otimes B)\,x, \qquad (A \otimes B)\,\operatorname{vec}(X) = \operatorname{vec}(A X B^\top)

Shapes: W (out, in); A (k, k) and B (out / k, in / k) for the factor k; vec goes row by row, X is (k, in / k). The
layer computes the right side: it never forms the product, which has full rank when A and B have. B starts at zero, so
the start is the identity. Merge: exact for ``form="krona"``, :math:`W \leftarrow W + s\,A \otimes B`. Trained:
k k + out in / (k k) a matrix.

``form="krona_b"`` stands beside each feed-forward block instead: :math:`y = \mathrm{FFN}(x) + s\,(A \otimes B)\,x`, and
``form="krona_b_res"`` adds :math:`\rho x` with a trained scalar :math:`\rho`. These two do not merge, because the block
has a nonlinearity inside.

Source: Edalati et al. 2022, arXiv:2212.10650, which has no public code. Only its abstract and descriptions of it were
at hand, so these are chosen here: A Kaiming-uniform and B zero, a square A, no biases, s = 1 (the paper searches it)
and a scalar that starts at ``residual`` = 0, so that the third form is the identity as well (a third-party
implementation has 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from peftlib.anatomy import Anatomy, Site
from peftlib.errors import MergeError, TargetError, UnknownNameError, UnsupportedError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.low_rank import kaiming
from peftlib.mechanisms.precision import cast
from peftlib.methods.base import Method, MethodConfig, at_least, fitted, is_default
from peftlib.methods.bases import hf_peft
from peftlib.methods.bases.low_rank import LowRankUpdates

FORMS = ("krona", "krona_b", "krona_b_res")


@dataclass(frozen=True)
class KronAConfig(MethodConfig):
    """``factor`` k, the size of A; ``scale`` s; ``form``: "krona" beside the maps in ``targets`` (site patterns),
    "krona_b" or "krona_b_res" beside the feed-forward blocks; ``residual``, the start of the latter's scalar."""

    factor: int = 32
    scale: float = 1.0
    form: Literal["krona", "krona_b", "krona_b_res"] = "krona"
    targets: tuple[str, ...] | str = ("*attention.query", "*attention.value")
    residual: float = 0.0

    def __post_init__(self):
        at_least("factor", self.factor, 1)
        if self.form not in FORMS:
            raise UnknownNameError("form", self.form, FORMS)


class Kronecker(nn.Module):
    """``forward(x, y) = y + s (A kron B) x``, with ``residual`` + rho x.

    Shapes, with b rows of t tokens: x (b, t, in), y (b, t, out), A (k, k), B (out / k, in / k); rho is ``shortcut``, a
    scalar that starts at ``residual`` (None: there is none). Two thin products, and no (out, in) matrix.
    """

    def __init__(self, in_features: int, out_features: int, factor: int, scale: float, residual: float | None = None):
        super().__init__()
        self.A = nn.Parameter(torch.empty(factor, factor))
        self.B = nn.Parameter(torch.zeros(out_features // factor, in_features // factor))
        self.shortcut = None if residual is None else nn.Parameter(torch.full((), float(residual)))
        self.scale = scale
        kaiming(self.A)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        A, B = self.A, self.B
        x = cast(x, A)
        X = x.unflatten(-1, (len(A), -1))  # (b, t, in) -> (b, t, k, in / k)
        # The narrower side of B first: fewer multiplications, and a smaller result kept for the backward pass.
        if len(B) <= B.shape[1]:
            AXB = A @ (X @ B.T)  # -> (b, t, k, out / k)
        else:
            AXB = (A @ X) @ B.T  # -> (b, t, k, out / k)
        change = self.scale * AXB.flatten(-2)  # -> (b, t, out)
        if self.shortcut is not None:
            change = change + self.shortcut * x  # (b, t, out), where out = in
        return y + change.to(y.dtype)  # (b, t, out)

    def delta(self) -> torch.Tensor:
        """The (out, in) update ``s A kron B``, formed in float32 or wider; the shortcut is not in it."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        return self.scale * torch.kron(self.A.detach().to(dtype), self.B.detach().to(dtype))


class _Files(hf_peft.Updates):
    """HF peft's LoKr, whose w1 and w2 are A and B where neither is itself a product, and s is alpha / r."""

    def check(self, settings: dict, folder: object) -> None:
        if settings["rank_pattern"] or settings["alpha_pattern"]:
            raise UnsupportedError(
                f"{folder} has rank_pattern={settings['rank_pattern']!r} and "
                f"alpha_pattern={settings['alpha_pattern']!r}; peftlib's krona has one scale"
            )

    def read(self, settings: dict, tensors: dict, parts: Anatomy, folder: object) -> tuple[dict, hf_peft.Fill]:
        if products := sorted(name for name in tensors if name.endswith(("_w1_a", "_w1_b", "_w2_a", "_w2_b", "_t2"))):
            raise UnsupportedError(
                f"{folder} has factors that are products themselves, such as {products[0]}; peftlib's krona trains "
                "them whole, as LoKr with an r of at least half of their size"
            )
        return super().read(settings, tensors, parts, folder)

    def parts(self, sites: list[Site], whole: dict[str, torch.Tensor]) -> hf_peft.Values:
        if len(sites) > 1:
            raise UnsupportedError(
                f"{sites[0].path} is one map of which peftlib adapts parts, each on its own; this LoKr adapts it whole"
            )
        return super().parts(sites, whole)

    def more_options(self, settings: dict, values: hf_peft.Values, folder: object) -> dict:
        shapes = {tuple(found["A"].shape) for found in values.values()}
        if len(shapes) > 1 or len(set(next(iter(shapes)))) > 1:
            raise UnsupportedError(
                f"{folder} has factors w1 of shapes {sorted(shapes)}; peftlib's krona has one square size, which a "
                "decompose_factor that divides all inputs and outputs gives"
            )
        return {"factor": next(iter(shapes))[0], "scale": settings["alpha"] / settings["r"]}

    def write(self, method: Method) -> tuple[dict, dict]:
        if method.config.form != "krona":
            raise UnsupportedError(
                f'HF peft has nothing beside a feed-forward block; form="{method.config.form}" cannot be written'
            )
        return super().write(method)

    def whole(self, attribute: str, updates: dict[Site, nn.Module]) -> torch.Tensor:
        site = next(iter(updates))
        if site.transposed:
            raise UnsupportedError(f"{site.path} is a Conv1D, for which HF peft has no LoKr")
        return super().whole(attribute, updates)

    def more_settings(self, method: Method) -> dict:
        c = method.config
        r = max(max(update.B.shape) for update in method.updates.values())  # large enough that w2 is no product
        return {"r": r, "alpha": c.scale * r, "decompose_factor": c.factor}


class KronA(LowRankUpdates):
    Config = KronAConfig
    learning_rate = 1e-2
    child = "krona"
    hf_peft = _Files(
        kind="LOKR",
        tensors={"lokr_w1": "A", "lokr_w2": "B"},
        rows=(),
        options={},
        used={"r": 8, "alpha": 8, "rank_pattern": {}, "alpha_pattern": {}},
        unused=(
            *hf_peft.MAPS,
            *("init_weights", "decompose_both", "decompose_factor", "use_effective_conv2d", "rank_dropout_scale"),
        ),
        refused=("rank_dropout", "module_dropout"),
    )

    def targets(self, host: Host) -> list[Site]:
        sites = host.anatomy.sites(self.config.targets)
        self._fit(math.gcd(*(size for site in sites for size in (site.in_features, site.out_features))), sites[0])
        for site in sites:
            check_factor(self.config.factor, site.in_features, site.out_features, site)
        return sites

    def update(self, site: Site) -> Kronecker:
        return Kronecker(site.in_features, site.out_features, self.config.factor, self.config.scale)

    def attach(self, host: Host) -> None:
        d = host.anatomy.d
        if self.config.form == "krona":
            return super().attach(host)
        self._fit(d, host.anatomy.layers[0].path)
        c = self.config
        for layer in host.anatomy.layers:
            first, last = layer.sites["ffn.up"], layer.sites["ffn.down"]
            check_factor(c.factor, d, d, f"the feed-forward block of {layer.path}")
            update = Kronecker(d, d, c.factor, c.scale, c.residual if c.form == "krona_b_res" else None)
            host.connect(first, last, self.child, update)

    def _fit(self, both: int, where: object) -> None:
        """Put the largest factor below a default that does not divide ``both`` in its place."""
        factor = self.config.factor
        if both % factor and is_default(self.config, "factor"):
            self.config = fitted(self.config, where, factor=max(n for n in range(1, factor) if both % n == 0))

    def check_mergeable(self) -> None:
        if self.config.form != "krona":
            raise MergeError(
                f'krona with form="{self.config.form}" has no merge: it stands beside a feed-forward block, whose '
                "nonlinearity it cannot pass. Keep it attached, or save() it and load() it later."
            )


def check_factor(factor: int, in_features: int, out_features: int, where: object) -> None:
    """Raise TargetError unless the factor divides both sizes."""
    if in_features % factor or out_features % factor:
        both = math.gcd(in_features, out_features)
        fits = ", ".join(str(n) for n in range(1, both + 1) if both % n == 0)
        raise TargetError(
            f"factor={factor} does not divide {where} ({out_features} x {in_features}); choose one of {fits}, or other "
            "targets"
        )
