"""How a method's adapters stand in the files of Hugging Face peft: what a method says in ``hf_peft``.

:mod:`peftlib.interchange` reads and writes the files; here is what differs from method to method. A method whose
layers stand beside linear maps says it with :class:`Updates` in a few lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from peftlib.anatomy import Anatomy, Layer, Site
from peftlib.errors import LoadError, UnsupportedError
from peftlib.mechanisms import prefix

Settings = dict[str, Any]
Tensors = dict[str, torch.Tensor]
Fill = Callable[[Any], None]
"""Copies a file's values into an attached method, under ``torch.no_grad``; the method is of the class that has the
format."""

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForCausalLM": "CAUSAL_LM",
    "GPT2LMHeadModel": "CAUSAL_LM",
}
"""End of a model's class name -> HF peft's name of the task, on which its prompts and prefixes depend."""


class Format:
    """One kind of adapter in HF peft's files.

    ``kind`` is its ``peft_type``, ``outer`` what its tensors' names begin with, ``marks`` the settings that tell it
    from others of its kind: name -> value, or a function of the value.
    """

    kind: str
    outer = "base_model.model."
    marks: Mapping[str, Any] = {}

    def claims(self, settings: Settings) -> bool:
        """Whether a file with these settings is one of this method."""
        if settings.get("peft_type") != self.kind:
            return False
        values = ((mark, settings.get(name)) for name, mark in self.marks.items())
        return all(mark(value) if callable(mark) else mark == value for mark, value in values)

    def read(self, settings: Settings, tensors: Tensors, parts: Anatomy, folder: object) -> tuple[Settings, Fill]:
        """The method's options, and what fills in the values once it is attached. Takes what it uses out of
        ``tensors`` (names inside the backbone); raises LoadError or UnsupportedError for what it cannot use."""
        raise NotImplementedError

    def write(self, method: Any) -> tuple[Settings, Tensors]:
        """HF peft's settings and tensors; raises UnsupportedError for what HF peft cannot load."""
        raise NotImplementedError


@dataclass(frozen=True)
class Updates(Format):
    """Layers beside linear maps, as :class:`peftlib.methods.bases.low_rank.LowRankUpdates` has them.

    Args:
        kind: the ``peft_type``.
        tensors: end of a tensor's name in the file -> attribute of the layer.
        rows: the attributes that have a row an output. Of a map that HF peft sees whole and we in parts, as GPT-2's
            query, key and value, each part has its own rows.
        options: HF peft's setting -> option of the method.
        marks: see :class:`Format`; values that are no functions are written too.
        refused: settings under which a file computes something else.
        settings: what is written beside that, whatever the options.
    """

    kind: str
    tensors: Mapping[str, str]
    rows: tuple[str, ...]
    options: Mapping[str, str]
    marks: Mapping[str, Any] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def read(self, settings: Settings, tensors: Tensors, parts: Anatomy, folder: object) -> tuple[Settings, Fill]:
        self.check(settings, folder)
        first, *_ = self.tensors
        values: dict[str, dict[str, torch.Tensor]] = {}
        for path in sorted({name.removesuffix(f".{first}") for name in tensors if name.endswith(f".{first}")}):
            found = {}
            for end, attribute in self.tensors.items():
                if f"{path}.{end}" not in tensors:
                    raise LoadError(f"{folder} has no {path}.{end}")
                found[attribute] = tensors.pop(f"{path}.{end}")
            row = 0
            for site in sites_of(parts, path, folder):
                rows = slice(row, row := row + site.out_features)
                values[str(site)] = {name: v[rows] if name in self.rows else v for name, v in found.items()}
        all_used(tensors, values, folder)
        options = {ours: settings[theirs] for theirs, ours in self.options.items() if theirs in settings}
        options |= self.more_options(settings, values, folder)
        options["targets"] = patterns(parts, [site for site in parts.sites() if str(site) in values])

        def fill(method: Any) -> None:
            for site, update in method.updates.items():
                for end, attribute in self.tensors.items():
                    name = f"{site}.{end.removesuffix('.weight')}"
                    copy(getattr(update, attribute), values[str(site)][attribute], name)

        return options, fill

    def check(self, settings: Settings, folder: object) -> None:
        """Raise UnsupportedError for a file whose settings make it compute something else."""
        found = [name for name in self.refused if settings.get(name)]
        if settings.get("bias", "none") != "none":
            found.append(f"bias={settings['bias']!r}")
        if found:
            raise UnsupportedError(
                f"{folder} is a {self.kind} adapter with {', '.join(found)}, which peftlib's method does not have"
            )

    def more_options(self, settings: Settings, values: dict[str, dict[str, torch.Tensor]], folder: object) -> Settings:
        """Options that are not one setting each; ``values``: site -> attribute -> tensor."""
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
            **self.settings,
            **self.more_settings(method),
        }
        return settings, tensors

    def whole(self, attribute: str, updates: dict[Site, nn.Module]) -> torch.Tensor:
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


@dataclass(frozen=True)
class LowRank(Updates):
    """LoRA's two factors, ``A`` (r, in) and ``B`` (out, r), and whatever else ``tensors`` names."""

    kind: str = "LORA"
    tensors: Mapping[str, str] = field(default_factory=lambda: {"lora_A.weight": "A", "lora_B.weight": "B"})
    rows: tuple[str, ...] = ("B",)
    options: Mapping[str, str] = field(default_factory=lambda: {"lora_alpha": "alpha", "lora_dropout": "dropout"})
    refused: tuple[str, ...] = (
        *("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "lora_bias", "layer_replication"),
        *("target_parameters", "trainable_token_indices", "arrow_config", "monteclora_config", "velora_config"),
        *("kasa_config", "alpha_pattern"),
    )
    rewriting: tuple[str, ...] = ("pissa", "olora", "corda", "lora_ga", "loftq")
    """The starts (``init_lora_weights``) that rewrite the frozen weights: the factors fit no others."""

    def check(self, settings: Settings, folder: object) -> None:
        super().check(settings, folder)
        start = str(settings.get("init_lora_weights", True)).lower()
        if start.startswith(self.rewriting):
            raise UnsupportedError(
                f"{folder} has init_lora_weights={start!r}: its factors fit the weights that this start rewrote, which "
                "the file does not hold; save it with HF peft's path_initial_model_for_weight_conversion"
            )

    def more_options(self, settings: Settings, values: dict[str, dict[str, torch.Tensor]], folder: object) -> Settings:
        ranks = {len(found["A"]) for found in values.values()}
        if len(ranks) > 1:
            raise UnsupportedError(f"{folder} has LoRA factors of ranks {sorted(ranks)}; peftlib's lora has one rank")
        return {
            "rank": ranks.pop(),
            "alpha": float(settings.get("lora_alpha", 8)),
            "dropout": float(settings.get("lora_dropout", 0.0)),
            "rank_stabilized": bool(settings.get("use_rslora", False)),
        }

    def whole(self, attribute: str, updates: dict[Site, nn.Module]) -> torch.Tensor:
        """The factors of a map's parts side by side, of the sum of their ranks; other rows one below the other."""
        values = [getattr(update, attribute).detach() for update in updates.values()]
        if attribute == "A":
            return torch.cat(values)
        first = next(iter(updates))
        rows = first.out_features * (first.part or (0, 1))[1]
        if attribute != "B":
            whole = self.untouched(attribute, first, rows, values[0])
            for site, value in zip(updates, values):
                whole[site.rows] = value
            return whole
        rank = values[0].shape[1]
        B = values[0].new_zeros(rows, rank * len(values))
        for i, (site, value) in enumerate(zip(updates, values)):
            B[site.rows, i * rank : (i + 1) * rank] = value
        return B

    def untouched(self, attribute: str, first: Site, rows: int, like: torch.Tensor) -> torch.Tensor:
        """What an attribute with a row an output has where no part of the map is adapted."""
        return like.new_zeros(rows, *like.shape[1:])

    def more_settings(self, method: Any) -> Settings:
        c = method.config
        ranks = {path: c.rank * len(parts) for path, parts in by_module(method.updates).items()}
        rank = max(ranks.values())
        root = 0.5 if getattr(c, "rank_stabilized", False) else 1.0
        return {
            "r": rank,
            "lora_alpha": c.scale * rank**root,
            "use_rslora": getattr(c, "rank_stabilized", False),
            "bias": "none",
            "fan_in_fan_out": any(site.transposed for site in method.updates),
            "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
            "alpha_pattern": {path: c.scale * r**root for path, r in ranks.items() if r != rank},
        }


class IA3(Format):
    kind = "IA3"

    def read(self, settings: Settings, tensors: Tensors, parts: Anatomy, folder: object) -> tuple[Settings, Fill]:
        scales: dict[str, torch.Tensor] = {}
        outputs, inputs = [], []
        for name in sorted(n for n in tensors if n.endswith(".ia3_l")):
            path, scale = name.removesuffix(".ia3_l"), tensors.pop(name)
            sites = sites_of(parts, path, folder)
            # HF peft scales inputs by a row, outputs by a column; a fused map's input is that of all its parts.
            if scale.shape[0] == 1:
                scales[str(sites[0])] = scale.flatten()
                inputs.append(sites[0])
                continue
            row = 0
            for site in sites:
                scales[str(site)] = scale.flatten()[row : row + site.out_features]
                outputs.append(site)
                row += site.out_features
        all_used(tensors, scales, folder)
        options = {"outputs": patterns(parts, outputs), "inputs": patterns(parts, inputs)}

        def fill(method: Any) -> None:
            for site, child in method.scales.items():
                copy(child.scale, scales[str(site)], f"{site}.ia3_l")

        return options, fill

    def write(self, method: Any) -> tuple[Settings, Tensors]:
        tensors, rows = {}, []
        modules = by_module(method.scales)
        inputs = {site.path for site in method.host.anatomy.sites(method.config.inputs, optional=True)}
        outputs = {site.path for site in method.host.anatomy.sites(method.config.outputs, optional=True)}
        if both := inputs & outputs:
            raise UnsupportedError(
                f"HF peft's (IA)3 scales the input or the output of a map; here {min(both)} has both"
            )
        for path, scales in modules.items():
            name = f"base_model.model.{path}.ia3_l"
            first, child = next(iter(scales.items()))
            if path in inputs:
                tensors[name] = child.scale[None]
                rows.append(path)
                continue
            whole = child.scale.new_ones(first.out_features * (first.part or (0, 1))[1])
            for site, child in scales.items():
                whole[site.rows] = child.scale
            tensors[name] = whole[:, None]
        settings = {
            "target_modules": sorted(modules),
            "feedforward_modules": sorted(rows),
            "fan_in_fan_out": any(site.transposed for site in method.scales),
        }
        return settings, tensors


class Prompt(Format):
    kind = "PROMPT_TUNING"
    outer = "base_model."

    def read(self, settings: Settings, tensors: Tensors, parts: Anatomy, folder: object) -> tuple[Settings, Fill]:
        vectors = _embeddings(tensors, folder)
        if (settings.get("num_transformer_submodules") or 1) > 1:
            raise UnsupportedError(
                f"{folder} has a prompt for the decoder too (num_transformer_submodules=2); peftlib's prompt_tuning "
                "has one before the encoder, as in its paper"
            )

        def fill(method: Any) -> None:
            (child,) = method.host.paths().values()
            copy(child.vectors, vectors, "prompt_embeddings")

        return {"length": len(vectors), "init": "random"}, fill

    def write(self, method: Any) -> tuple[Settings, Tensors]:
        if method.config.position != "front":
            raise UnsupportedError(
                f"HF peft's prompts stand in front of the input, not at position={method.config.position!r}"
            )
        (child,) = method.host.paths().values()
        settings = _virtual_tokens(method) | {"token_dim": child.vectors.shape[1], "prompt_tuning_init": "RANDOM"}
        return settings, {"prompt_embeddings": child.vectors}


class Prefix(Format):
    kind = "PREFIX_TUNING"
    outer = "base_model."

    def read(self, settings: Settings, tensors: Tensors, parts: Anatomy, folder: object) -> tuple[Settings, Fill]:
        embeddings = _embeddings(tensors, folder)
        if len(parts.stacks) > 1:
            return self._read_decoder(settings, embeddings, parts, folder)
        shape = (len(embeddings), parts.num_layers, 2, parts.kv_heads, parts.head_dim)
        if embeddings.numel() != torch.Size(shape).numel():
            raise LoadError(
                f"{folder} has prefixes of shape {tuple(embeddings.shape)}; this backbone has "
                f"{parts.num_layers} layers of {parts.kv_heads} key heads of size {parts.head_dim}"
            )
        pairs = embeddings.view(shape).permute(1, 2, 3, 0, 4)

        def fill(method: Any) -> None:
            for layer, (key, value) in zip(method.host.anatomy.layers, pairs):
                copy(_prefix(layer).key, key, "prompt_embeddings")
                copy(_prefix(layer).value, value, "prompt_embeddings")

        return {"length": len(embeddings), "reparametrize": False}, fill

    def _read_decoder(
        self, settings: Settings, embeddings: torch.Tensor, parts: Anatomy, folder: object
    ) -> tuple[Settings, Fill]:
        """Of an encoder-decoder backbone, where ``num_transformer_submodules`` of 2 repeat the row of keys and
        values."""
        _counts_by_bias(parts)
        if settings.get("num_transformer_submodules") != 2:
            raise UnsupportedError(
                f"{folder} has prefixes with num_transformer_submodules={settings.get('num_transformer_submodules')}, "
                f"with which HF peft itself does not run {type(parts.model).__name__}; 2 is its own choice for "
                "SEQ_2_SEQ_LM"
            )
        length, heads, p = len(embeddings), parts.heads, parts.head_dim
        layers = _decoder(parts)
        if embeddings.shape[1] % (2 * heads * p) or embeddings.shape[1] // (2 * heads * p) < len(layers):
            raise LoadError(
                f"{folder} has prefixes of shape {tuple(embeddings.shape)}; this backbone's decoder has {len(layers)} "
                f"layers of {heads} key heads of size {p}"
            )
        row = embeddings.view(length, -1, heads, p).permute(1, 2, 0, 3)
        row = torch.cat([row, row])

        def fill(method: Any) -> None:
            for i, layer in enumerate(_decoder(method.host.anatomy)):
                copy(_prefix(layer).key, row[4 * i], "prompt_embeddings")
                copy(_prefix(layer).value, row[4 * i + 1], "prompt_embeddings")

        options = {"length": length, "reparametrize": False, "attentions": ("decoder",), "relative_bias": True}
        return options, fill

    def write(self, method: Any) -> tuple[Settings, Tensors]:
        parts = method.host.anatomy
        if len(parts.stacks) > 1:
            return self._write_decoder(method)
        if not method.config.shift_positions:
            raise UnsupportedError(
                "HF peft's prefixes shift the text's positions; shift_positions=False cannot be written"
            )
        with torch.no_grad():
            pairs = torch.stack([torch.stack(_prefix(layer).pair()) for layer in parts.layers])
        settings = _virtual_tokens(method) | {"prefix_projection": False}
        return settings, {"prompt_embeddings": pairs.permute(3, 0, 1, 2, 4).flatten(1)}

    def _write_decoder(self, method: Any) -> tuple[Settings, Tensors]:
        c, parts = method.config, method.host.anatomy
        _counts_by_bias(parts)
        if set(c.attentions) != {"decoder"} or not c.relative_bias:
            raise UnsupportedError(
                f"HF peft's prefixes for {type(parts.model).__name__} stand in the decoder's self-attention alone and "
                f"its relative bias counts them; attentions={c.attentions!r} with relative_bias={c.relative_bias} "
                "cannot be written. Attach prefix_tuning with attentions=('decoder',) and relative_bias=True"
            )
        layers = _decoder(parts)
        places = 2 * len(layers)  # pairs a row: as many layers as HF peft is told of
        with torch.no_grad():
            pairs = [_prefix(layer).pair() for layer in layers]
            row = pairs[0][0].new_zeros(2 * places, *pairs[0][0].shape)
            for i, pair in enumerate(pairs):
                row[4 * i], row[4 * i + 1] = pair
        settings = _virtual_tokens(method) | {
            "num_layers": places,
            "num_transformer_submodules": 2,
            "prefix_projection": False,
        }
        return settings, {"prompt_embeddings": row.permute(2, 0, 1, 3).flatten(1)}


# What the formats share


def sites_of(parts: Anatomy, path: str, folder: object) -> list[Site]:
    found = [site for site in parts.sites() if site.path == path]
    if not found:
        known = dict(parts.model.named_modules())
        why = "which peftlib does not adapt" if path in known else f"which {type(parts.model).__name__} does not have"
        error = UnsupportedError if path in known else LoadError
        raise error(f"{folder} adapts {path}, {why}; peftlib adapts the linear maps of the layers (anatomy.of(model))")
    return found


def patterns(parts: Anatomy, sites: list[Site]) -> tuple[str, ...]:
    """Site names where they say it all, else paths."""
    names = tuple(dict.fromkeys(site.name for site in sites))
    return names if len(parts.sites(names)) == len(sites) else tuple(dict.fromkeys(site.path for site in sites))


def _embeddings(tensors: Tensors, folder: object) -> torch.Tensor:
    if "prompt_embeddings" not in tensors:
        raise LoadError(f"{folder} has no prompt_embeddings")
    found = tensors.pop("prompt_embeddings")
    all_used(tensors, [found], folder)
    return found


def all_used(left: Tensors, used: Sized, folder: object) -> None:
    if left:
        raise UnsupportedError(f"{folder} holds {len(left)} tensors that peftlib has no place for: {sorted(left)[:3]}")
    if not len(used):
        raise LoadError(f"{folder} holds no adapter's tensors")


def copy(parameter: nn.Parameter, value: torch.Tensor, name: str) -> None:
    if parameter.shape != value.shape:
        raise LoadError(f"{name} has shape {tuple(value.shape)} in the file, {tuple(parameter.shape)} here")
    parameter.copy_(value)


def task_of(model: nn.Module) -> str | None:
    return next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), None)


def _counts_by_bias(parts: Anatomy) -> None:
    """Raise UnsupportedError for an encoder-decoder backbone on which HF peft's prefixes do what ours cannot."""
    name = type(parts.model).__name__
    if not parts.family.stacks["decoder"].shares_bias:
        raise UnsupportedError(
            f"HF peft's prefixes shift the positions of {name}'s decoder, whose text keeps its own beside peftlib's; "
            "those of T5, whose positions are relative, go both ways"
        )
    if task_of(parts.model) != "SEQ_2_SEQ_LM":
        raise UnsupportedError(
            f"HF peft hands prefixes to a model as its cache, and {name} takes none; it can with a model for "
            "conditional generation"
        )


def _prefix(layer: Layer) -> prefix.Prefix:
    return cast(prefix.Prefix, layer.attention.prefix)


def _decoder(parts: Anatomy) -> list[Layer]:
    return [layer for layer in parts.layers if layer.stack == "decoder"]


def module_names(model: nn.Module, paths: list[str]) -> list[str]:
    """Last names of the modules where they say it all, as HF peft's users write them, else paths."""
    short = sorted({path.rpartition(".")[2] for path in paths})
    hits = {n for n, _ in model.named_modules() for end in short if n == end or n.endswith(f".{end}")}
    return short if hits == set(paths) else sorted(paths)


def by_module(children: dict[Site, Any]) -> dict[str, dict[Site, Any]]:
    found: dict[str, dict[Site, Any]] = {}
    for site, child in children.items():
        found.setdefault(site.path, {})[site] = child
    return found


def _virtual_tokens(method: Any) -> Settings:
    if task_of(method.host.model) is None:
        raise UnsupportedError(
            f"HF peft has no prompts or prefixes for {type(method.host.model).__name__}; it knows the tasks "
            + ", ".join(dict.fromkeys(_TASKS.values()))
        )
    parts = method.host.anatomy
    return {
        "num_virtual_tokens": method.config.length,
        "num_transformer_submodules": 1,
        "num_layers": parts.num_layers,
        "num_attention_heads": parts.kv_heads,
        "token_dim": parts.kv_heads * parts.head_dim,
    }
