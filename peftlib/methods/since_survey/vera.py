r"""VeRA: one frozen random pair of factors for all maps, of each of which two vectors train.

.. math:: y = W x + b \odot B \bigl(d \odot A x\bigr)

Shapes, with n rows of t tokens: x (n, t, in), y (n, t, out), W (out, in), A (r, in), B (out, r), d (r,), b (out,). A
and B are drawn Kaiming-uniform once for the whole model (bounds sqrt(6 / in) and sqrt(6 / r)), as large as the largest
input and output among the targets; a map of other sizes takes the first columns of A and rows of B. b starts at zero
and d at ``d_initial``, so the start is the identity. The pair is random, so r may be larger than the maps. Merge:
exact, :math:`W \leftarrow W + \operatorname{diag}(b)\, B \operatorname{diag}(d)\, A`. Trained: out + r a matrix.

A file holds the vectors and, instead of the pair, its seed, as the paper counts it: A and B are drawn from
``projection_seed`` on the CPU, whatever device the model is on. Another version of torch may draw other numbers, so the
file also has the last eight of them, and loading refuses a file whose numbers are others. With ``save_projection`` it
holds the pair.

Source: Kopiczko et al. 2024, arXiv:2310.11454, without public code: queries and values, r = 1024 for base models and
256 for large ones, d_initial 0.1, learning rates up to 1e-2. The pair serves maps of different sizes, and is drawn,
number by number, as in HF peft, so that its files without a pair can be read. HF peft stores the pair unless told
otherwise. For a fused map it has one d and one piece of B; here each part has its own d, and all take the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.anatomy import Anatomy, Site
from peftlib.errors import LoadError, UnsupportedError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.precision import cast
from peftlib.methods.base import Method, MethodConfig, at_least
from peftlib.methods.bases import hf_peft
from peftlib.methods.bases.low_rank import LowRankUpdates


@dataclass(frozen=True)
class VeRAConfig(MethodConfig):
    """``rank`` r, ``targets`` (site patterns), ``d_initial``, the start of d, ``projection_seed``, from which A and B
    are drawn, ``save_projection``: files hold A and B, ``dropout`` on the product's input."""

    rank: int = 1024
    targets: tuple[str, ...] | str = ("*attention.query", "*attention.value")
    d_initial: float = 0.1
    projection_seed: int = 0
    save_projection: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        at_least("rank", self.rank, 1)
        at_least("projection_seed", self.projection_seed, 0)


class Projection(nn.Module):
    """The pair A (r, in) and B (out, r) that all maps share, drawn from a seed. Files hold it where it is ``saved``,
    else its last numbers, by which another draw is noticed."""

    def __init__(self, in_features: int, out_features: int, rank: int, seed: int, saved: bool):
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(seed)
        A, B = (
            nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.float32, device="cpu"), generator=generator)
            for shape in ((rank, in_features), (out_features, rank))
        )
        like = torch.empty(0)  # of the device and dtype of what is attached
        self.register_buffer("A", A.to(like), persistent=saved)
        self.register_buffer("B", B.to(like), persistent=saved)
        if not saved:
            self.register_buffer("last", self.drawn_last().clone())

    def drawn_last(self) -> torch.Tensor:
        return torch.cat([self.A.flatten()[-4:], self.B.flatten()[-4:]])


class VectorScaled(nn.Module):
    """``forward(x, y) = y + b o B (d o A dropout(x))`` with the first columns of a pair's A and rows of its B."""

    def __init__(self, site: Site, pair: Projection, d_initial: float, dropout: float):
        super().__init__()
        self.d = nn.Parameter(torch.full((len(pair.A),), d_initial))
        self.b = nn.Parameter(torch.zeros(site.out_features))
        self.sizes = site.out_features, site.in_features
        self.pair = (pair,)  # in a tuple, so that it is a child of the model alone
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and B (out, r)."""
        rows, columns = self.sizes
        return self.pair[0].A[:, :columns], self.pair[0].B[:rows]

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        A, B = self.factors()
        x = cast(self.dropout(x), A)  # (n, t, in)
        dAx = self.d * F.linear(x, A)  # (n, t, in) -> (n, t, r)
        return y + (self.b * F.linear(dAx, B)).to(y.dtype)  # (n, t, r) -> (n, t, out)

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """The (out, in) update diag(b) B diag(d) A, formed in float32 or wider."""
        A, B = self.factors()
        dtype = torch.promote_types(A.dtype, torch.float32)
        A, B, b, d = (t.to(dtype) for t in (A, B, self.b, self.d))
        return (b[:, None] * B) @ (d[:, None] * A)


class _Files(hf_peft.Updates):
    """The vectors of each map, and beside them the pair where it is saved."""

    def read(self, settings: dict, tensors: dict, parts: Anatomy, folder: object) -> tuple[dict, hf_peft.Fill]:
        settings = self.settled(settings, folder)
        names = [name for name in ("A", "B") if f"base_model.vera_{name}" in tensors]
        pair = {name: tensors.pop(f"base_model.vera_{name}") for name in names}
        if settings["save_projection"] and len(pair) < 2:
            raise LoadError(f"{folder} says save_projection and holds no base_model.vera_A and vera_B")
        paths = {name.rpartition(".")[0] for name in tensors}
        if fused := [str(site) for site in parts.sites() if site.part is not None and site.path in paths]:
            raise UnsupportedError(
                f"{folder} adapts the map of {fused[0]} as a whole, with one vector d; peftlib has one for each part"
            )
        options, fill_vectors = super().read(settings, tensors, parts, folder)
        options["save_projection"] = bool(pair)

        def fill(method: Method) -> None:
            fill_vectors(method)
            for name, values in pair.items():
                hf_peft.copy(getattr(method.pair, name), values, f"vera_{name}")

        return options, fill

    def write(self, method: Method) -> tuple[dict, dict]:
        settings, tensors = super().write(method)
        if method.config.save_projection:
            tensors |= {"base_model.vera_A": method.pair.A, "base_model.vera_B": method.pair.B}
        return settings, tensors

    def more_settings(self, method: Method) -> dict:
        return {"fan_in_fan_out": any(site.transposed for site in method.updates), "bias": "none"}


class VeRA(LowRankUpdates):
    Config = VeRAConfig
    learning_rate = 5e-2
    child = "vera"
    hf_peft = _Files(
        kind="VERA",
        tensors={"vera_lambda_b": "b", "vera_lambda_d": "d"},
        rows=("b",),
        options={
            "r": "rank",
            "d_initial": "d_initial",
            "vera_dropout": "dropout",
            "projection_prng_key": "projection_seed",
            "save_projection": "save_projection",
        },
        used={"r": 256, "d_initial": 0.1, "vera_dropout": 0.0, "projection_prng_key": 0, "save_projection": True},
        unused=(*hf_peft.MAPS, "init_weights"),
        refused=("bias",),
    )

    def targets(self, host: Host) -> list[Site]:
        return host.anatomy.sites(self.config.targets)

    def attach(self, host: Host) -> None:
        c, sites = self.config, self.targets(host)
        sizes = (max(site.in_features for site in sites), max(site.out_features for site in sites))
        self.pair = host.add(
            host.anatomy.base, "vera", Projection(*sizes, c.rank, c.projection_seed, c.save_projection)
        )
        super().attach(host)

    def update(self, site: Site) -> VectorScaled:
        return VectorScaled(site, self.pair, self.config.d_initial, self.config.dropout)

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        super().load_state(state)
        if not self.config.save_projection and not torch.allclose(self.pair.last, self.pair.drawn_last(), rtol=1e-2):
            raise LoadError(
                f"projection_seed={self.config.projection_seed} draws other factors here than where the adapter was "
                "saved; save it there with save_projection=True"
            )
