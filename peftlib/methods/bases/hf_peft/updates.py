"""HF peft's files of adapters whose layers stand beside linear maps, and of LoRA's two factors among them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from peftlib.anatomy import Anatomy, Site
from peftlib.errors import LoadError, UnsupportedError
from peftlib.methods.bases.hf_peft.format import (
    MAPS,
    Fill,
    Format,
    Settings,
    Tensors,
    all_used,
    by_module,
    copy,
    module_names,
    patterns,
    sites_of,
)

Values = dict[Site, dict[str, torch.Tensor]]
"""Site -> attribute of its layer -> tensor."""


@dataclass(frozen=True)
class Updates(Format):
    """Layers beside linear maps, as :class:`peftlib.methods.bases.low_rank.LowRankUpdates` has them.

    Args:
        kind: the ``peft_type``.
        tensors: end of a tensor's name in the file -> attribute of the layer.
        rows: the attributes that have a row an output. Of a map that HF peft sees whole and we in parts, as GPT-2's
            query, key and value, each part has its own rows.
        options: HF peft's setting -> option of the method.
        marks, used, unused, refused, reads: see :class:`Format`; marks that are no functions are written too.
        written: what is written beside that, whatever the options.
    """

    kind: str
    tensors: Mapping[str, str]
    rows: tuple[str, ...]
    options: Mapping[str, str]
    marks: Mapping[str, Any] = field(default_factory=dict)
    used: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = MAPS
    refused: tuple[str, ...] = ()
    reads: bool = True
    written: Mapping[str, Any] = field(default_factory=dict)

    def read(self, settings: Settings, tensors: Tensors, parts: Anatomy, folder: object) -> tuple[Settings, Fill]:
        settings = self.settled(settings, folder)
        self.check(settings, folder)
        first, *_ = self.tensors
        values: Values = {}
        for path in sorted({name.removesuffix(f".{first}") for name in tensors if name.endswith(f".{first}")}):
            whole = {}
            for end, attribute in self.tensors.items():
                if f"{path}.{end}" not in tensors:
                    raise LoadError(f"{folder} has no {path}.{end}")
                whole[attribute] = tensors.pop(f"{path}.{end}")
            sites = sites_of(parts, path, folder)
            values |= self.parts(sites, self.fitting(settings, path, sites[0], whole, folder))
        all_used(tensors, values, folder)
        options = {ours: settings[theirs] for theirs, ours in self.options.items()}
        options |= self.more_options(settings, values, folder)
        options["targets"] = patterns(parts, [site for site in parts.sites() if site in values])
        found = {str(site): named for site, named in values.items()}
        ends = {attribute: end.removesuffix(".weight") for end, attribute in self.tensors.items()}

        def fill(method: Any) -> None:
            for site, update in method.updates.items():
                for attribute, value in found[str(site)].items():
                    copy(getattr(update, attribute), value, f"{site}.{ends.get(attribute, attribute)}")

        return options, fill

    def check(self, settings: Settings, folder: object) -> None:
        """Raise UnsupportedError for a file whose settings together make it compute something else."""

    def fitting(
        self, settings: Settings, path: str, first: Site, whole: dict[str, torch.Tensor], folder: object
    ) -> dict[str, torch.Tensor]:
        """The tensors of the module at a path, as they fit the method and the frozen weight of the map ``first``."""
        return whole

    def parts(self, sites: list[Site], whole: dict[str, torch.Tensor]) -> Values:
        """A module's tensors for each of its maps: their rows, and what has none as it is."""
        values, row = {}, 0
        for site in sites:
            rows = slice(row, row := row + site.out_features)
            values[site] = {name: v[rows] if name in self.rows else v for name, v in whole.items()}
        return values

    def more_options(self, settings: Settings, values: Values, folder: object) -> Settings:
        """Options that are not one setting each."""
        return {}

    def write(self, method: Any) -> tuple[Settings, Tensors]:
        tensors = {}
        for path, updates in by_module(method.updates).items():
            for end, attribute in self.tensors.items():
                tensors[f"{self.outer}{path}.{end}"] = self.whole(attribute, updates)
        settings = {theirs: getattr(method.config, ours) for theirs, ours in self.options.items()}
        settings |= {name: mark for name, mark in self.marks.items() if not callable(mark)}
        settings |= {
            "target_modules": module_names(method.host.model, list(by_module(method.updates))),
            **self.written,
            **self.more_settings(method),
        }
        return settings, tensors

    def whole(self, attribute: str, updates: dict[Site, Any]) -> torch.Tensor:
        """One tensor for all parts of a map; by default only for a map that has one."""
        if len(updates) > 1 or next(iter(updates)).part is not None:
            raise UnsupportedError(
                f"{next(iter(updates)).path} is one map of which peftlib adapts parts, each on its own; HF peft's "
                f"{self.kind} adapts it whole"
            )
        return getattr(next(iter(updates.values())), attribute)

    def more_settings(self, method: Any) -> Settings:
        """Settings that are not one option each."""
        return {}


LORA_REFUSED = (
    *("bias", "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication", "megatron_config"),
    *("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "monteclora_config"),
    *("velora_config", "kasa_config", "enable_lora", "merge_weights"),
)
"""What a LoRA can be in HF peft, and ours is not; the last two are of its first versions."""

LORA_UNUSED = (
    *MAPS,
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of starts, which init_lora_weights names
    *("qalora_group_size", "megatron_core"),  # of what is refused
    *("runtime_config", "ensure_weight_tying"),  # where tensors stand, and who shares what is refused
)

SAFE_STARTS = ("true", "false", "none", "gaussian", "eva", "orthogonal")
"""The starts (``init_lora_weights``) that leave the frozen weights as they are."""


@dataclass(frozen=True)
class LowRank(Updates):
    """LoRA's two factors, ``A`` (r, in) and ``B`` (out, r), and whatever else ``tensors`` names.

    ``starts``: those whose files are read. One whose start is OLoRA's becomes LoRA of rank 2 r, as HF peft's own
    conversion makes it: OLoRA takes s B_0 A_0, of W's QR decomposition, off the frozen weight, and
    (W - s B_0 A_0) + s B A = W + s [B, -B_0] [A; A_0].
    """

    kind: str = "LORA"
    tensors: Mapping[str, str] = field(default_factory=lambda: {"lora_A.weight": "A", "lora_B.weight": "B"})
    rows: tuple[str, ...] = ("B",)
    options: Mapping[str, str] = field(default_factory=lambda: {"lora_dropout": "dropout"})
    used: Mapping[str, Any] = field(
        default_factory=lambda: {
            "r": 8,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "use_rslora": False,
            "rank_pattern": {},
            "alpha_pattern": {},
            "init_lora_weights": True,
        }
    )
    unused: tuple[str, ...] = LORA_UNUSED
    refused: tuple[str, ...] = LORA_REFUSED
    starts: tuple[str, ...] = (*SAFE_STARTS, "olora")
    by_pattern: bool = False
    """Whether the method has a rank and an alpha for a pattern of sites."""

    def check(self, settings: Settings, folder: object) -> None:
        start = str(settings["init_lora_weights"])
        if start.lower() not in self.starts:
            raise UnsupportedError(
                f"{folder} has init_lora_weights={start!r}, a start that rewrites the frozen weights or trains one "
                "factor alone, and the file does not hold what it made; save it in HF peft as plain LoRA: "
                "save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
            )

    def fitting(
        self, settings: Settings, path: str, first: Site, whole: dict[str, torch.Tensor], folder: object
    ) -> dict[str, torch.Tensor]:
        rank = _matched(settings["rank_pattern"], path, settings["r"])
        if len(whole["A"]) != rank or whole["B"].shape[1] != rank:
            raise LoadError(
                f"{folder} says rank {rank} for {path}, whose factors are of shapes {tuple(whole['A'].shape)} and "
                f"{tuple(whole['B'].shape)}"
            )
        if str(settings["init_lora_weights"]).lower() != "olora":
            return whole
        A_0, B_0 = _olora(first, rank, path, folder)
        A, B = whole["A"].to(A_0), whole["B"].to(B_0)
        return whole | {"A": torch.cat([A, A_0]), "B": torch.cat([B, -B_0], dim=1)}

    def parts(self, sites: list[Site], whole: dict[str, torch.Tensor]) -> Values:
        """Where each column of B belongs to one part of the module, as :meth:`whole` writes them, each part has the
        columns that are its own; one without any is not adapted."""
        by_rows = super().parts(sites, whole)
        own = {site: values["B"].any(dim=0) for site, values in by_rows.items()}  # (r,) each
        ranks = {int(columns.sum()) for columns in own.values()} - {0}
        if len(sites) == 1 or len(ranks) > 1 or not torch.stack(list(own.values())).sum(dim=0).eq(1).all():
            return by_rows
        return {
            site: values | {"A": values["A"][own[site]], "B": values["B"][:, own[site]]}
            for site, values in by_rows.items()
            if own[site].any()
        }

    def more_options(self, settings: Settings, values: Values, folder: object) -> Settings:
        root = 0.5 if settings["use_rslora"] else 1.0
        ranks = {site: len(found["A"]) for site, found in values.items()}
        alphas = {}
        for site, rank in ranks.items():
            alpha = _matched(settings["alpha_pattern"], site.path, settings["lora_alpha"])
            whole = _matched(settings["rank_pattern"], site.path, settings["r"])
            alphas[site] = round(float(alpha) * (rank / whole) ** root, 9)  # the scale stays what it was
        (rank, other_ranks), (alpha, other_alphas) = _by_pattern(ranks), _by_pattern(alphas)
        options = {"rank": rank, "alpha": alpha, "rank_stabilized": bool(settings["use_rslora"])}
        if not (other_ranks or other_alphas):
            return options
        if not self.by_pattern:
            raise UnsupportedError(
                f"{folder} has rank_pattern or alpha_pattern: ranks {sorted(set(ranks.values()))} and alphas "
                f"{sorted(set(alphas.values()))}; of the methods with these files, peftlib's lora alone has more than "
                "one"
            )
        return options | {"rank_pattern": other_ranks, "alpha_pattern": other_alphas}

    def whole(self, attribute: str, updates: dict[Site, Any]) -> torch.Tensor:
        """The factors of a map's parts side by side, of the sum of their ranks; other rows one below the other. The
        scale is that of the first part, the others' is in their B."""
        layers = list(updates.values())
        values = [getattr(layer, attribute).detach() for layer in layers]
        if attribute == "A":
            return torch.cat(values)
        first = next(iter(updates))
        rows = first.out_features * (first.part or (0, 1))[1]
        if attribute != "B":
            whole = self.untouched(attribute, first, rows, values[0])
            for site, value in zip(updates, values):
                whole[site.rows] = value
            return whole
        ranks = [value.shape[1] for value in values]
        B = values[0].new_zeros(rows, sum(ranks))
        for i, (site, layer) in enumerate(updates.items()):
            start = sum(ranks[:i])
            B[site.rows, start : start + ranks[i]] = values[i] * (layer.scale / layers[0].scale)
        return B

    def untouched(self, attribute: str, first: Site, rows: int, like: torch.Tensor) -> torch.Tensor:
        """What an attribute with a row an output has where no part of the map is adapted."""
        return like.new_zeros(rows, *like.shape[1:])

    def more_settings(self, method: Any) -> Settings:
        stabilized = getattr(method.config, "rank_stabilized", False)
        modules = by_module(method.updates)
        ranks = {path: sum(len(layer.A) for layer in layers.values()) for path, layers in modules.items()}
        scales = {path: next(iter(layers.values())).scale for path, layers in modules.items()}
        alphas = {path: round(scales[path] * r ** (0.5 if stabilized else 1.0), 9) for path, r in ranks.items()}
        rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
        return {
            "r": rank,
            "lora_alpha": alpha,
            "use_rslora": stabilized,
            "bias": "none",
            "fan_in_fan_out": any(site.transposed for site in method.updates),
            "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
            "alpha_pattern": {path: a for path, a in alphas.items() if a != alpha},
        }


def _matched(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first regular expression that matches the end of a path from a dot on, as HF peft finds it."""
    found = (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", path))
    return next(found, default)


def _commonest(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


def _by_pattern(values: dict[Site, Any]) -> tuple[Any, tuple[tuple[str, Any], ...]]:
    """The commonest value; and the others by the name of their sites where all of that name have it, else by path."""
    commonest, others = _commonest(values.values()), {}
    for site, value in values.items():
        if value != commonest:
            alike = all(v == value for other, v in values.items() if other.name == site.name)
            others[site.name if alike else site.path] = value
    return commonest, tuple(others.items())


def _olora(first: Site, rank: int, path: str, folder: object) -> tuple[torch.Tensor, torch.Tensor]:
    """A_0 (r, in) and B_0 (out, r) of a whole module's weight."""
    weight = first.module.weight
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.is_meta:
        raise UnsupportedError(
            f"{folder} has init_lora_weights='olora', which decomposes the weight of {path}; load the backbone "
            "unquantized and not on the meta device"
        )
    Q, R = torch.linalg.qr(weight.detach().to("cpu", torch.float32))
    # HF peft decomposes a Conv1D's weight as it is stored, (in, out).
    return (Q[:, :rank].T, R[:rank].T) if first.transposed else (R[:rank], Q[:, :rank])
