r"""KronA: a Kronecker product of two small matrices beside frozen linear maps, in place of LoRA's low-rank product.

.. math:: y = W x + s\,(A \otimes B)\,x, \qquad (A \otimes B)\,\operatorname{vec}(X) = \operatorname{vec}(A X B^\top)

Shapes: W (out, in); A (k, k) and B (out / k, in / k) for the factor k; vec goes row by row, X is (k, in / k). The right
side is what is computed: the product, which has full rank when A and B have, is never formed. B starts at zero, so the
start is the identity. Merge: exact for ``form="krona"``, :math:`W \leftarrow W + s\,A \otimes B`. Trained:
k k + out in / (k k) a matrix.

``form="krona_b"`` stands beside each feed-forward block instead: :math:`y = \mathrm{FFN}(x) + s\,(A \otimes B)\,x`, and
``form="krona_b_res"`` adds :math:`\rho x` with a trained scalar :math:`\rho`. These two do not merge: a nonlinearity
stands in the block that they are beside.

Source: Edalati et al. 2022, arXiv:2212.10650, which has no public code. Chosen here, because only its abstract and
descriptions of it were at hand: A Kaiming-uniform and B zero, a square A, no biases, s = 1 (the paper searches it) and
a scalar that starts at ``residual`` = 0, so that the third form is the identity as well (a third-party implementation
has 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peftlib.errors import MergeError, UnknownNameError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.kronecker import Kronecker, check_factor
from peftlib.mechanisms.low_rank import add_to_weight
from peftlib.methods.base import Method, MethodConfig, at_least

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


class KronA(Method):
    Config = KronAConfig
    learning_rate = 1e-2

    def attach(self, host: Host) -> None:
        c = self.config
        self.updates: dict = {}
        if c.form == "krona":
            for site in host.anatomy.sites(c.targets):
                check_factor(c.factor, site.in_features, site.out_features, site)
                update = Kronecker(site.in_features, site.out_features, c.factor, c.scale)
                self.updates[site] = host.after(site, "krona", update)
            return
        d = host.anatomy.d
        for layer in host.anatomy.layers:
            first, last = layer.sites["ffn.up"], layer.sites["ffn.down"]
            check_factor(c.factor, d, d, f"the feed-forward block of {layer.path}")
            update = Kronecker(d, d, c.factor, c.scale, c.residual if c.form == "krona_b_res" else None)
            host.connect(first, last, "krona", update)

    def check_mergeable(self) -> None:
        if self.config.form != "krona":
            raise MergeError(
                f'krona with form="{self.config.form}" has no merge: it stands beside a feed-forward block, whose '
                "nonlinearity it cannot pass. Keep it attached, or save() it and load() it later."
            )

    def merge(self) -> None:
        for site, update in self.updates.items():
            add_to_weight(site, update.delta())
