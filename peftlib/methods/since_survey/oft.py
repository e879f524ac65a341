r"""OFT: a trained block-diagonal rotation of the inputs of frozen linear maps.

.. math:: y = W R x + b, \qquad R = \mathrm{diag}(R_1, \dots, R_k), \qquad
          R_i = (I + Q_i)(I - Q_i)^{-1}, \qquad Q_i = -Q_i^\top

Shapes: W (out, in), Q_i (s, s) with k = in / s blocks. Cayley's transform makes every R_i orthogonal, so the rows of W
keep their lengths and the angles between them. Q starts at zero, so the start is the identity. The input is rotated;
W R is formed only to merge, exactly: :math:`W \leftarrow W R`, rounded once to W's dtype. Trained: the k s (s - 1) / 2
numbers above the diagonals, in all maps of the attention; with ``block_share`` one block serves as all k.

Source: Qiu et al. 2023, arXiv:2306.07280, who divide each input into 4 blocks; Qiu et al. 2025, arXiv:2506.19847
(OFTv2), who rotate the input and take s = 32. ``terms=5`` is OFTv2's Cayley-Neumann form: (I - Q)^-1 becomes the sum of
the powers of Q below ``terms - 1``, so R R^T is (I - Q^(terms - 1))^2 for odd ``terms``, which is near I while Q is
small. ``eps`` is constrained OFT: after every step ||Q_i||_F is at most eps / sqrt(k); their code has eps = 1e-5 s^2.

Where we differ: their code trains s^2 numbers P a block, with Q = (P - P^T) / 2. The counts that they publish are of
the free ones, as here, and AdamW takes the same steps. HF peft's exact form is this one; its Neumann form has -Q in the
place of Q, and its files are turned around. Several maps in one module, as GPT-2's query, key and value, have one input
and so one R. Not here: their factors for the lengths of the rows, and convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peftlib.anatomy import Anatomy, Site
from peftlib.errors import TargetError, UnsupportedError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.precision import cast, without_autocast
from peftlib.methods.base import Method, MethodConfig, TrainingState, at_least
from peftlib.methods.bases import hf_peft


@dataclass(frozen=True)
class OFTConfig(MethodConfig):
    """``block_size`` s, ``targets`` (site patterns), ``terms`` of the Neumann series (0: the exact inverse), ``eps``
    (0: no constraint), ``block_share``."""

    block_size: int = 32
    targets: tuple[str, ...] | str = ("*attention.*",)
    terms: int = 0
    eps: float = 0.0
    block_share: bool = False

    def __post_init__(self):
        at_least("block_size", self.block_size, 2)
        at_least("terms", self.terms, 4 if self.terms else 0)
        at_least("eps", self.eps, 0)


class Rotation(nn.Module):
    """``forward(x) = R x``; ``Q`` (k or 1, s (s - 1) / 2) holds what stands above the blocks' diagonals, row by row."""

    def __init__(self, blocks: int, block_size: int, terms: int = 0):
        super().__init__()
        self.Q = nn.Parameter(torch.zeros(blocks, block_size * (block_size - 1) // 2))
        self.block_size, self.terms = block_size, terms

    def R(self) -> torch.Tensor:
        """The blocks (k or 1, s, s), in float32 or wider."""
        s, upper = self.block_size, self.Q.to(torch.promote_types(self.Q.dtype, torch.float32))
        rows, columns = torch.triu_indices(s, s, 1, device=upper.device)
        I = torch.eye(s, dtype=upper.dtype, device=upper.device)  # noqa: E741 - as in the equation
        with without_autocast(upper):
            Q = upper.new_zeros(len(upper), s, s)
            Q[:, rows, columns] = upper  # (k, s (s - 1) / 2) -> (k, s, s)
            Q = Q - Q.mT
            if not self.terms:
                return torch.linalg.solve(I - Q, I + Q)  # (k, s, s)
            inverse = I.expand_as(Q)
            for _ in range(self.terms - 2):
                inverse = I + Q @ inverse  # (k, s, s)
            return inverse + Q @ inverse  # (k, s, s)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        R = self.R()  # (k, s, s)
        blocks = cast(x, R).unflatten(-1, (-1, self.block_size))  # (b, t, in) -> (b, t, k, s)
        return torch.einsum("kij,...kj->...ki", R, blocks).flatten(-2).to(x.dtype)  # (b, t, in)

    @torch.no_grad()
    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """``W R`` for W (out, in), in float32 or wider."""
        R = self.R()
        W = weight.to(torch.promote_types(weight.dtype, R.dtype)).unflatten(-1, (-1, self.block_size))
        return torch.einsum("okj,kji->oki", W, R.to(W.dtype)).flatten(-2)

    @torch.no_grad()
    def constrain(self, radius: float) -> None:
        """Scale the blocks with ||Q_i||_F > radius to that norm."""
        norm = math.sqrt(2) * self.Q.norm(dim=1, keepdim=True)  # every number stands in Q twice
        self.Q.mul_((radius / norm.clamp(min=1e-30)).clamp(max=1))


@dataclass(frozen=True)
class HFOFT(hf_peft.Updates):
    """HF peft's exact files have our Q; those of its Neumann form, which has been this one since 0.18, have -Q."""

    kind: str = "OFT"
    tensors: Mapping[str, str] = field(default_factory=lambda: {"oft_R.weight": "Q"})
    rows: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=lambda: {"block_share": "block_share"})
    used: Mapping[str, Any] = field(
        default_factory=lambda: {
            "coft": False,
            "eps": 6e-5,
            "block_share": False,
            "use_cayley_neumann": True,
            "num_cayley_neumann_terms": 5,
        }
    )
    unused: tuple[str, ...] = (*hf_peft.MAPS, "r", "oft_block_size", "init_weights")
    refused: tuple[str, ...] = ("module_dropout", "bias")

    def check(self, settings: dict, folder: object) -> None:
        version = (settings.get("peft_version") or "0").partition("@")[0]
        terms = self.terms(settings)
        if terms and (terms < 3 or [int(n) for n in version.split(".")[:2]] < [0, 18]):
            raise UnsupportedError(
                f"{folder} has the {terms} terms of the Neumann series that HF peft {version} has; peftlib takes 3 and "
                "more terms of 0.18 and later"
            )

    def terms(self, settings: dict) -> int:
        return settings["num_cayley_neumann_terms"] if settings["use_cayley_neumann"] else 0

    def read(self, settings: dict, tensors: dict, parts: Anatomy, folder: object) -> tuple[dict, hf_peft.Fill]:
        settings = self.settled(settings, folder)
        if self.terms(settings):
            tensors.update({name: -value for name, value in tensors.items() if name.endswith("oft_R.weight")})
        options, fill = super().read(settings, tensors, parts, folder)

        def constrained(method: OFT) -> None:
            fill(method)
            method.constrain()

        return options, constrained

    def more_options(self, settings: dict, values: hf_peft.Values, folder: object) -> dict:
        sizes = {(1 + math.isqrt(1 + 8 * found["Q"].shape[1])) // 2 for found in values.values()}
        if len(sizes) > 1:
            raise UnsupportedError(f"{folder} has blocks of sizes {sorted(sizes)}; peftlib's oft has one size")
        terms = self.terms(settings)
        return {
            "block_size": sizes.pop(),
            "terms": terms and max(4, terms),  # HF peft computes the same with 3 and with 4
            "eps": settings["eps"] if settings["coft"] else 0.0,
        }

    def whole(self, attribute: str, updates: dict[Site, nn.Module]) -> torch.Tensor:
        site, rotation = next(iter(updates.items()))
        if site.transposed:
            raise UnsupportedError(f"{site.path} is a Conv1D, for which HF peft has no OFT")
        return -rotation.Q if rotation.terms else rotation.Q

    def more_settings(self, method: OFT) -> dict:
        c = method.config
        neumann = {"use_cayley_neumann": bool(c.terms), "num_cayley_neumann_terms": c.terms or 5}
        constraint = {"coft": bool(c.eps), "eps": c.eps}
        return {"r": 0, "oft_block_size": c.block_size, "bias": "none", "peft_version": "0.18.0"} | neumann | constraint


class OFT(Method):
    Config = OFTConfig
    learning_rate = 2e-3
    hf_peft = HFOFT()

    def attach(self, host: Host) -> None:
        c = self.config
        self.updates: dict[Site, Rotation] = {}
        for path, updates in hf_peft.by_module(dict.fromkeys(host.anatomy.sites(c.targets))).items():
            sites = list(updates)
            site = sites[0]
            blocks, rest = divmod(site.in_features, c.block_size)
            if rest:
                raise TargetError(f"block_size={c.block_size} does not divide the {site.in_features} inputs of {site}")
            if site.part and len(sites) < site.part[1]:
                raise TargetError(
                    f"{path} is {site.part[1]} maps in one, whose input is rotated for all of them; name all "
                    f"{site.part[1]} as targets, and not {', '.join(s.name for s in sites)} alone"
                )
            rotation = Rotation(1 if c.block_share else blocks, c.block_size, c.terms)
            self.updates |= dict.fromkeys(sites, host.before(site, "oft", rotation))

    def hooks(self) -> tuple[str, ...]:
        return super().hooks() if self.config.eps else ()

    def on_step_end(self, training: TrainingState) -> None:
        self.constrain()

    def constrain(self) -> None:
        if self.config.eps:
            for rotation in self.updates.values():
                rotation.constrain(self.config.eps / math.sqrt(len(rotation.Q)))

    @torch.no_grad()
    def merge_inputs(self) -> None:
        for site, rotation in self.updates.items():
            site.weight.copy_(rotation.merged(site.weight))
