"""Adapters of AdapterHub's library ``adapters``, as its ``save_adapter`` writes them, read into ours.

``adapter_config.json`` beside ``adapter.safetensors`` or ``pytorch_adapter.bin``, of which torch reads tensors alone
(``weights_only``). Read are the methods whose computation is compared with that library's own
(``tests/golden/adapters.py``): bottlenecks behind both blocks, behind the feed-forward block and beside it, Compacter,
MAM, UniPELT and AdapterFusion, all on encoders of BERT's shape, and LoRA. A setting is taken over, changes nothing in
what is computed, or is refused with its name.

A prefix comes as keys and values, without the network that made them. The norms of the blocks stay frozen, as there.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from peftlib import anatomy
from peftlib.adapted import Adapted, attach
from peftlib.anatomy import Anatomy, Layer, Site
from peftlib.errors import LoadError, UnsupportedError
from peftlib.interchange.files import read_json, read_tensors
from peftlib.methods.base import SavedAdapter
from peftlib.methods.bases.hf_peft import copy

CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
FUSION, FUSION_WEIGHTS = "adapter_fusion_config.json", "model_adapter_fusion.safetensors"
HEAD, HEAD_WEIGHTS = "head_config.json", "model_head.safetensors"
PICKLED = ("pytorch_adapter.bin", "pytorch_model_adapter_fusion.bin", "pytorch_model_head.bin")

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]

BOTTLENECK: Config = {
    "mh_adapter": None,
    "output_adapter": None,
    "reduction_factor": None,
    "non_linearity": None,
    "original_ln_before": False,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "is_parallel": False,
    "scaling": 1.0,
    "use_gating": False,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "inv_adapter": None,
    "cross_adapter": False,
    "leave_out": [],
    "dropout": 0.0,
    "stochastic_depth": 0.0,
    "phm_layer": False,
    "phm_dim": 4,
    "phm_rank": 1,
    "phm_bias": True,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "factorized_phm_W": True,
    "shared_W_phm": False,
    "learn_phm": True,
}
"""Settings of a bottleneck that count, with the defaults of ``adapters``."""

LORA: Config = {
    "selfattn_lora": True,
    "intermediate_lora": False,
    "output_lora": False,
    "leave_out": [],
    "r": 8,
    "alpha": 8,
    "dropout": 0.0,
    "attn_matrices": ["q", "v"],
    "composition_mode": "add",
    "use_gating": False,
    "use_dora": False,
    "vera_d": None,
    "vera_b": None,
}

PREFIX: Config = {
    "encoder_prefix": True,
    "leave_out": [],
    "flat": False,
    "prefix_length": 30,
    "non_linearity": "tanh",
    "dropout": 0.0,
    "use_gating": False,
    "shared_gating": True,
}

SAME_PREFIX = {name: value for name, value in PREFIX.items() if name != "prefix_length"}

DYNAMIC_FUSION: Config = {
    "key": True,
    "query": True,
    "value": True,
    "query_before_ln": False,
    "regularization": True,
    "residual_before": False,
    "temperature": False,
    "value_before_softmax": True,
    "dropout_prob": None,
}

STARTS = (
    *("architecture", "init_weights", "init_weights_seed", "phm_c_init", "phm_init_range", "dtype", "bottleneck_size"),
    *("hypercomplex_nonlinearity", "inv_adapter_reduction_factor", "cross_prefix", "value_initialized"),
)
"""Settings of a start, of what another setting names, of a network that made a prefix, or of a second stack."""

PLACES = {
    (True, True, False, False, False): "sequential_adapter",
    (False, True, True, False, False): "pfeiffer",
    (False, True, False, True, False): "parallel_adapter",
    (True, True, False, False, True): "compacter",
}
"""``mh_adapter``, ``output_adapter``, ``original_ln_before``, ``is_parallel``, ``phm_layer`` -> what it is."""


def from_adapters(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    sources: Sequence[str | os.PathLike[str]] = (),
    keep_original: bool = True,
) -> Adapted:
    """Attach an adapter that ``adapters`` saved to the backbone it was made for; it then trains and saves as ours.

    ``sources``: for a folder of AdapterFusion the folders of the adapters that it fuses, in its order. A task head in
    the folder is taken where it is one of transformers' own.

    Raises LoadError for files that are missing, damaged or of another backbone, UnsupportedError for what peftlib's
    methods do not compute.
    """
    folder = Path(folder)
    document, tensors = read(folder)
    method = method_of(document, folder)
    parts = anatomy.of(model)
    if document.get("model_type") not in (None, parts.config.model_type):
        raise LoadError(f"{folder} was made for {document['model_type']}; this model is {parts.config.model_type}")
    file = _File(document, tensors, parts, folder)
    options, values = getattr(file, method)()
    given: list[SavedAdapter] = []
    if method == "adapter_fusion":
        given = _fused(model, document, sources, folder)
    elif sources:
        raise LoadError(f"{folder} is no AdapterFusion; sources are for it alone")
    file.check_all_used()
    head = _head(folder, parts)
    name = "sequential_adapter" if method == "pfeiffer" else method
    made = attach(model, name, sources=given, train_head=bool(head), keep_original=keep_original, **options)
    try:
        trained = made.trainable()
        values = {**values, **head}
        if "rules" in values:  # Compacter's shared matrices, whose place is the method's own
            values[next(n for n in trained if n.endswith("rules.A"))] = values.pop("rules")
        if lost := sorted(trained.keys() - values.keys()):
            raise LoadError(f"{folder} has nothing for {lost[0]}" + f" and {len(lost) - 1} more" * (len(lost) > 1))
        with torch.no_grad():
            for target, value in values.items():
                copy(trained[target], value, target)
    except BaseException:
        made.detach()
        raise
    return made


def read(folder: Path) -> tuple[Config, Tensors]:
    """The settings and tensors of a folder, older names in today's form. Raises LoadError for what cannot be read."""
    fusion = (folder / FUSION).is_file() and not (folder / CONFIG).is_file()
    document = read_json(folder / (FUSION if fusion else CONFIG))
    if not isinstance(document.get("config"), dict) or not isinstance(document.get("name"), str):
        raise LoadError(
            f"{folder / (FUSION if fusion else CONFIG)} has no config and name of an adapter; is it what adapters' "
            "save_adapter() wrote? An older one that names its config alone is written anew by loading and saving it"
        )
    files = (FUSION_WEIGHTS, PICKLED[1]) if fusion else (WEIGHTS, PICKLED[0])
    tensors = read_tensors(folder, *files)
    old = r"(attention|layer)_text_(task|lang)_adapters"
    return document, {re.sub(old, "adapters", name): tensor for name, tensor in tensors.items()}


def method_of(document: Config, folder: object) -> str:
    """Our name of a folder's method; "pfeiffer" is the variant of sequential_adapter. Raises UnsupportedError."""
    config = document["config"]
    kind = config.get("architecture")
    if kind == "lora":
        return "lora"
    if kind == "union":
        kinds = [part.get("architecture") or "bottleneck" for part in config.get("configs", ())]
        gated = [bool(part.get("use_gating")) for part in config.get("configs", ())]
        if sorted(kinds) == ["bottleneck", "prefix_tuning"] and not any(gated):
            return "mam_adapter"
        if sorted(kinds) == ["bottleneck", "lora", "prefix_tuning"] and all(gated):
            return "unipelt"
        raise UnsupportedError(f"{folder} unites {', '.join(kinds)}; peftlib reads MAM and UniPELT")
    if "query_before_ln" in config:
        return "adapter_fusion"
    if kind is None:
        place = tuple(
            bool(config.get(name))
            for name in ("mh_adapter", "output_adapter", "original_ln_before", "is_parallel", "phm_layer")
        )
        if place in PLACES:
            return PLACES[place]
        raise UnsupportedError(
            f"{folder} has bottlenecks with mh_adapter, output_adapter, original_ln_before, is_parallel, phm_layer = "
            f"{place}, a place where none of peftlib's stands"
        )
    raise UnsupportedError(f"{folder} is a {kind} of adapters, which peftlib does not read")


class _File:
    """A folder's settings and tensors on a backbone. A method's function gives its options and, by their names in the
    model, its values."""

    def __init__(self, document: Config, tensors: Tensors, parts: Anatomy, folder: Path):
        self.document, self.parts, self.folder, self.name = document, parts, folder, document["name"]
        base = parts.path(parts.base) + "." if parts.base is not parts.model else ""
        own = f"{parts.model.base_model_prefix}."
        self.tensors = {base + name.removeprefix(own): tensor for name, tensor in tensors.items()}
        self.used: set[str] = set()

    # Settings

    def settled(self, config: Config, known: Mapping[str, Any], must: Mapping[str, Any]) -> Config:
        """The settings with defaults; raises UnsupportedError for unknown ones, and where one that ``must`` have a
        value has another."""
        if unknown := sorted(config.keys() - known.keys() - {*STARTS}):
            raise UnsupportedError(
                f"{self.folder} has {unknown[0]}={config[unknown[0]]!r}, which peftlib does not know; where it changes "
                "nothing in what is computed, take it out of adapter_config.json"
            )
        settled = {**known, **config}
        wrong = (n for n, value in must.items() if (settled[n] != value if value else settled[n]))
        differing = [f"{name}={settled[name]!r}" for name in wrong]
        if differing:
            raise UnsupportedError(f"{self.folder} has {', '.join(differing)}, which peftlib's method does not have")
        return settled

    def bottleneck_config(self, config: Config, **must: Any) -> Config:
        same = {
            "original_ln_after": True,
            "ln_before": False,
            "ln_after": False,
            "inv_adapter": None,
            "adapter_residual_before_ln": False,
            "cross_adapter": False,
            "leave_out": [],
            "dropout": 0.0,
            "stochastic_depth": 0.0,
            "use_gating": False,
            "residual_before_ln": True,
            **must,
        }
        settled = self.settled(config, BOTTLENECK, same)
        if not isinstance(settled["scaling"], int | float):
            raise UnsupportedError(f"{self.folder} has scaling={settled['scaling']!r}; peftlib's is a number")
        activation = str(settled["non_linearity"]).lower()
        if "version" not in self.document:
            activation = {"gelu": "gelu_new", "gelu_orig": "gelu"}.get(activation, activation)
        if activation not in ACT2FN:
            raise UnsupportedError(f"{self.folder} has non_linearity={activation!r}, which transformers does not have")
        return settled | {"non_linearity": activation}

    def lora_config(self, config: Config, **must: Any) -> Config:
        same = {"leave_out": [], "composition_mode": "add", "use_dora": False, "vera_d": None, "vera_b": None, **must}
        settled = self.settled(config, LORA, same)
        found = re.match(r"adapters\.(\d+)\.(\d+)", str(self.document.get("version")))
        if settled["alpha"] != settled["r"] and not (found and (int(found[1]), int(found[2])) >= (1, 1)):
            if self.document["config"].get("architecture") == "union":
                raise UnsupportedError(
                    f"{self.folder} has LoRA with alpha={settled['alpha']} and r={settled['r']} of adapters before "
                    "1.1.0, whose scale was another one"
                )
            settled["alpha"] = settled["r"]  # as adapters reads files from before 1.1.0, whose scale was 1
        return settled

    def union(self) -> dict[str, Config]:
        return {part.get("architecture") or "bottleneck": part for part in self.document["config"]["configs"]}

    # Tensors

    def take(self, name: str) -> torch.Tensor:
        if name not in self.tensors:
            raise LoadError(
                f"{self.folder} has no {name}; it is of another backbone, or of one whose layers are not BERT's"
            )
        self.used.add(name)
        return self.tensors[name]

    def check_all_used(self) -> None:
        if left := sorted(self.tensors.keys() - self.used):
            raise UnsupportedError(f"{self.folder} holds {len(left)} tensors without a place in peftlib: {left[:3]}")

    def at(self, site: Site) -> str:
        """Where the bottleneck behind a map stands."""
        return f"{site.path.rpartition('.')[0]}.adapters.{self.name}"

    def linear(self, source: str, target: str) -> Tensors:
        return {f"{target}.{kind}": self.take(f"{source}.{kind}") for kind in ("weight", "bias")}

    def bottleneck(self, site: Site, target: str) -> Tensors:
        source = self.at(site)
        down = self.linear(f"{source}.adapter_down.0", f"{target}.down")
        return down | self.linear(f"{source}.adapter_up", f"{target}.up")

    def size(self, end: str = "weight") -> int:
        return len(self.take(f"{self.at(self.parts.layers[0].sites['ffn.down'])}.adapter_down.0.{end}"))

    def prefixes(self) -> tuple[int, Tensors]:
        """The length, and all layers' keys and values (heads, m, width), from the one network that gives them."""
        mark = f".prefix_tunings.{self.name}.self_prefix."
        found = {name.partition(mark)[2]: self.take(name) for name in self.tensors if mark in name}
        ends = ("wte.weight", *(f"control_trans.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")))
        if lost := sorted({*ends} - found.keys()):
            raise LoadError(f"{self.folder} has no prefix's {lost[0]}")
        E, W_1, b_1, W_2, b_2 = (found[end] for end in ends)
        P = torch.tanh(E @ W_1.T + b_1) @ W_2.T + b_2  # (m, d) -> (m, h) -> (m, 2 L d)
        parts, values = self.parts, {}
        pairs = P.view(len(E), parts.num_layers, 2, parts.heads, parts.head_dim).permute(1, 2, 3, 0, 4)
        for layer, pair in zip(parts.layers, pairs):  # (2, heads, m, width)
            for name, value in zip(("key", "value"), pair):
                values[f"{parts.path(layer.attention)}.prefix.{name}"] = value
        return len(E), values

    def loras(self, sites: Iterable[Site]) -> Tensors:
        values = {}
        for site in sites:
            if site.part is not None:
                raise UnsupportedError(f"{self.folder} adapts {site.path} whole, of which peftlib adapts parts")
            for factor in ("A", "B"):
                values[f"{site.path}.lora.{factor}"] = self.take(f"{site.path}.loras.{self.name}.lora_{factor}")
        return values

    # Methods

    def _layers(self) -> list[Layer]:
        return self.parts.layers

    def sequential_adapter(self) -> tuple[Config, Tensors]:
        c = self.bottleneck_config(self.document["config"], scaling=1.0)
        values: Tensors = {}
        for layer in self._layers():
            for name in ("attention.output", "ffn.down"):
                site = layer.sites[name]
                values |= self.bottleneck(site, f"{site.path}.sequential_adapter")
        return {"bottleneck": self.size(), "activation": c["non_linearity"], "train_norms": False}, values

    def pfeiffer(self) -> tuple[Config, Tensors]:
        c = self.bottleneck_config(self.document["config"], scaling=1.0)
        options = {"bottleneck": self.size(), "activation": c["non_linearity"], "train_norms": False}
        return options | {"variant": "pfeiffer"}, self.behind_ffn()

    def behind_ffn(self) -> Tensors:
        values: Tensors = {}
        for layer in self._layers():
            values |= self.bottleneck(layer.sites["ffn.down"], f"{layer.path}.sequential_adapter")
        return values

    def parallel_adapter(self) -> tuple[Config, Tensors]:
        c = self.bottleneck_config(self.document["config"])
        options = {"bottleneck": self.size(), "activation": c["non_linearity"], "scale": float(c["scaling"])}
        return options | {"dropout": 0.0}, self.beside_ffn()

    def beside_ffn(self) -> Tensors:
        values: Tensors = {}
        for site in (layer.sites["ffn.down"] for layer in self._layers()):
            values |= self.bottleneck(site, f"{site.path}.parallel_adapter")
        return values

    def compacter(self) -> tuple[Config, Tensors]:
        must = {
            "shared_phm_rule": True,
            "factorized_phm_rule": False,
            "factorized_phm_W": True,
            "shared_W_phm": False,
            "learn_phm": True,
            "phm_bias": True,
            "scaling": 1.0,
        }
        c = self.bottleneck_config(self.document["config"], **must)
        base = self.parts.path(self.parts.base) + "." if self.parts.base is not self.parts.model else ""
        # Theirs multiplies from the right, so that each of its factors is the transpose of ours.
        values = {"rules": self.take(f"{base}shared_parameters.{self.name}.phm_rule").transpose(1, 2)}
        for site in (layer.sites[name] for layer in self._layers() for name in ("attention.output", "ffn.down")):
            for mine, name in (("down", "adapter_down.0"), ("up", "adapter_up")):
                source, target = f"{self.at(site)}.{name}", f"{site.path}.compacter.{mine}"
                values[f"{target}.s"] = self.take(f"{source}.W_right").transpose(1, 2)
                values[f"{target}.t"] = self.take(f"{source}.W_left")
                values[f"{target}.bias"] = self.take(f"{source}.b")
        sizes = {"bottleneck": self.size("b"), "divisions": c["phm_dim"], "rank": c["phm_rank"]}
        return sizes | {"activation": c["non_linearity"], "train_norms": False}, values

    def mam_adapter(self) -> tuple[Config, Tensors]:
        configs = self.union()
        self.settled(configs["prefix_tuning"], PREFIX, SAME_PREFIX | {"use_gating": False})
        must = {"mh_adapter": False, "output_adapter": True, "is_parallel": True, "phm_layer": False}
        c = self.bottleneck_config(configs["bottleneck"], non_linearity="relu", **must)
        length, values = self.prefixes()
        options = {"length": length, "reparametrize": False, "bottleneck": self.size(), "scale": float(c["scaling"])}
        return options, values | self.beside_ffn()

    def unipelt(self) -> tuple[Config, Tensors]:
        configs, parts = self.union(), self.parts
        self.settled(configs["prefix_tuning"], PREFIX, SAME_PREFIX | {"use_gating": True})
        must = {"mh_adapter": False, "output_adapter": True, "original_ln_before": True, "is_parallel": False}
        c = self.bottleneck_config(configs["bottleneck"], use_gating=True, phm_layer=False, scaling=1.0, **must)
        same = {"selfattn_lora": True, "intermediate_lora": False, "output_lora": False, "dropout": 0.0}
        lora = self.lora_config(configs["lora"], use_gating=True, attn_matrices=["q", "v"], **same)
        warnings.warn(
            f"the gates of {self.folder} average over padding in adapters, and over the text alone here: its answers "
            "are the same where there is no padding",
            stacklevel=3,
        )
        length, values = self.prefixes()
        sites = [layer.sites[name] for layer in self._layers() for name in ("attention.query", "attention.value")]
        values |= self.behind_ffn() | self.loras(sites)
        for site in sites:
            values |= self.linear(f"{site.path}.loras.{self.name}.gate", f"{site.path}.lora_gate.linear")
        for layer in self._layers():
            attention = parts.path(layer.attention)
            source = f"{attention}.prefix_tuning.prefix_gates.{self.name}"
            values |= self.linear(source, f"{attention}.prefix_gate.linear")
            source = f"{self.at(layer.sites['ffn.down'])}.gate"
            values |= self.linear(source, f"{layer.path}.sequential_adapter_gate.linear")
        sizes = {"length": length, "reparametrize": False, "bottleneck": self.size(), "rank": lora["r"]}
        return sizes | {"alpha": float(lora["alpha"]), "activation": c["non_linearity"]}, values

    def lora(self) -> tuple[Config, Tensors]:
        c = self.lora_config(self.document["config"], use_gating=False)
        letters = {"q": "attention.query", "k": "attention.key", "v": "attention.value"}
        chosen = c["attn_matrices"] if c["selfattn_lora"] else []
        if not letters.keys() >= {*chosen} or (chosen and len(self.parts.stacks) > 1):
            raise UnsupportedError(
                f"{self.folder} has LoRA at attn_matrices={c['attn_matrices']!r}; peftlib reads q, k and v of one stack"
            )
        names = [letters[letter] for letter in chosen]
        names += ["ffn.up"] * bool(c["intermediate_lora"]) + ["ffn.down"] * bool(c["output_lora"])
        options = {"rank": c["r"], "alpha": float(c["alpha"]), "targets": tuple(names), "dropout": c["dropout"]}
        return options, self.loras(self.parts.sites(tuple(names)))

    def adapter_fusion(self) -> tuple[Config, Tensors]:
        config = self.document["config"]
        must = {name: value for name, value in DYNAMIC_FUSION.items() if name not in ("regularization", "dropout_prob")}
        c, values = self.settled(config, DYNAMIC_FUSION, must), {}
        for layer in self._layers():
            parent = layer.sites["ffn.down"].path.rpartition(".")[0]
            for name in ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight"):
                source = f"{parent}.adapter_fusion_layer.{self.name}.{name}"
                values[f"{layer.path}.sequential_adapter.{name}"] = self.take(source)
        weight = {} if c["regularization"] else {"regularization": 0.0}
        return weight | {"dropout": c["dropout_prob"]}, values


def _fused(
    model: nn.Module, document: Config, sources: Sequence[str | os.PathLike[str]], folder: object
) -> list[SavedAdapter]:
    """The adapters that a fusion is of, in its order."""
    names = document["name"].split(",")
    if len(sources) != len(names):
        raise LoadError(
            f"{folder} fuses {', '.join(names)}: from_adapters(model, folder, sources=[...]) needs their folders, in "
            f"this order, and {len(sources)} were given"
        )
    found = []
    for name, source in zip(names, sources):
        adapted = from_adapters(model, source)
        found.append(replace(adapted.snapshot(), name=name))
        adapted.detach()
        if (there := read(Path(source))[0]["name"]) != name:
            raise LoadError(f"{source} holds the adapter {there!r}, where {folder} has {name!r}")
    return found


def _head(folder: Path, parts: Anatomy) -> Tensors:
    """The task head in a folder. Raises UnsupportedError for one of a kind that only adapters has."""
    if not (folder / HEAD).is_file():
        return {}
    tensors = read_tensors(folder, HEAD_WEIGHTS, PICKLED[2])
    if strange := sorted(tensors.keys() - parts.head.keys()):
        raise UnsupportedError(
            f"{folder} holds a head that this {type(parts.model).__name__} does not have ({strange[0]}); take "
            f"{HEAD} out of the folder to read the adapter alone"
        )
    return tensors
