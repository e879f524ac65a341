"""Adapters of Hugging Face peft: its files into ours and ours into its, with equal logits on the same backbone.

LoRA, (IA)³, prompt tuning and prefix tuning, as ``PeftModel.save_pretrained`` writes them: ``adapter_config.json`` and
``adapter_model.safetensors``. peft itself is not needed, and nothing is unpickled. What one of the two libraries has
and the other has not is refused with its name, never dropped.

What differs by nature: a prompt is part of HF peft's causal loss (its last position predicts the first token) and not
of ours. Beside a prompt, HF peft's classifiers on decoders read the last position, be it padding, ours the last token.

HF peft's prefixes for encoder-decoder backbones reach the decoder's self-attention alone: it drops what it makes for
cross-attention and has none for the encoder. On T5 that is ``prefix_tuning`` with ``attentions=("decoder",)`` and
``relative_bias=True``, and goes both ways. It takes keys and values of layer i from the places 4i and 4i + 1 of a row
that holds 2 for a layer, twice; with an even number of layers half of the row is thus used twice and half of it never.
What is written therefore says twice the number of layers, so that each layer has places of its own. BART's decoder
counts a prefix among its absolute positions, where ours leaves the text's alone: refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from peftlib import anatomy
from peftlib.adapted import Adapted, attach
from peftlib.anatomy import Anatomy, Layer, Site
from peftlib.errors import LoadError, StateError, UnsupportedError
from peftlib.mechanisms.low_rank import LowRank
from peftlib.mechanisms.prefix import Prefix
from peftlib.mechanisms.prompt import Prompt
from peftlib.mechanisms.scaling import ScaleInput, ScaleOutput
from peftlib.methods import config as method_config
from peftlib.methods.base import MethodConfig

if TYPE_CHECKING:
    from peftlib.methods.additive.others.ia3 import IA3Config
    from peftlib.methods.additive.soft_prompts.prefix_tuning import PrefixTuningConfig
    from peftlib.methods.additive.soft_prompts.prompt_tuning import PromptTuningConfig
    from peftlib.methods.reparameterized.low_rank.lora import LoRAConfig

T = TypeVar("T")

Folder = str | os.PathLike[str]
Settings = dict[str, Any]
Tensors = dict[str, torch.Tensor]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
METHODS = {"LORA": "lora", "IA3": "ia3", "PROMPT_TUNING": "prompt_tuning", "PREFIX_TUNING": "prefix_tuning"}

_VARIANTS = (
    *("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "lora_bias", "layer_replication"),
    *("target_parameters", "trainable_token_indices", "arrow_config", "monteclora_config", "velora_config"),
    *("kasa_config", "alpha_pattern"),
)
"""Settings of HF peft's LoRA, under which a file computes something that our LoRA does not."""

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForCausalLM": "CAUSAL_LM",
    "GPT2LMHeadModel": "CAUSAL_LM",
}
"""End of a model's class name -> HF peft's name of the task, on which its prompts and prefixes depend."""


def from_hf_peft(model: nn.Module, folder: Folder, *, keep_original: bool = True) -> Adapted:
    """Attach an adapter that HF peft saved to the backbone it was made for; it then trains, saves and merges as ours.

    Where the file holds parts of the task head, the head trains on from them; parts that it lacks stay as they are in
    ``model``. Raises LoadError for files that are missing, damaged or of another backbone, UnsupportedError for what
    peftlib's method cannot compute.
    """
    settings, tensors = _read(Path(folder))
    kind = settings.get("peft_type")
    if kind not in METHODS:
        raise UnsupportedError(
            f"{folder} holds a {kind} adapter; peftlib takes {', '.join(METHODS)} from HF peft, which itself loads the "
            "others"
        )
    parts = anatomy.of(model)
    tensors = {_inside(name, kind): tensor for name, tensor in tensors.items()}
    head = {name: tensors.pop(name) for name in list(tensors) if name in parts.head}
    config, fill = {"LORA": _lora, "IA3": _ia3, "PROMPT_TUNING": _prompt, "PREFIX_TUNING": _prefix}[kind](
        settings, tensors, parts, folder
    )
    adapted = attach(model, config, train_head=bool(head), keep_original=keep_original)
    try:
        with torch.no_grad():
            fill(adapted)
            trained = adapted.trainable()
            for name, tensor in head.items():
                _copy(trained[name], tensor, name)
    except BaseException:
        adapted.detach()
        raise
    return adapted


def to_hf_peft(adapted: Adapted, folder: Folder) -> Path:
    """Write what HF peft's ``PeftModel.from_pretrained(model, folder)`` loads onto the same backbone.

    Raises UnsupportedError for a method or an option that HF peft does not have, StateError for a folder that holds
    something else.
    """
    write = {"lora": _write_lora, "ia3": _write_ia3, "prompt_tuning": _write_prompt, "prefix_tuning": _write_prefix}
    if adapted.name not in write:
        raise UnsupportedError(
            f"{adapted.name} has no counterpart that HF peft loads; it takes {', '.join(write)}. merge() gives a plain "
            "model, where the method can"
        )
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and all(p.name in (CONFIG, WEIGHTS) for p in folder.iterdir())):
        raise StateError(f"{folder} holds other files than an adapter; give a new folder")
    settings, tensors = write[adapted.name](adapted)
    outer = "base_model." if adapted.name in ("prompt_tuning", "prefix_tuning") else "base_model.model."
    trained = adapted.trainable()
    tensors |= {outer + name: trained[name] for name in adapted.head_names}
    heads = sorted({name.partition(".")[0] for name in adapted.head_names})
    settings = {
        "peft_type": next(kind for kind, name in METHODS.items() if name == adapted.name),
        "task_type": _task(adapted.model),
        "base_model_name_or_path": getattr(adapted.model.config, "_name_or_path", "") or None,
        "inference_mode": True,
        "modules_to_save": heads or None,
        **settings,
    }
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    return folder


# Reading

Fill = Callable[[Adapted], None]


def _read(folder: Path) -> tuple[Settings, Tensors]:
    if not (folder / CONFIG).is_file():
        raise LoadError(f"{folder} has no {CONFIG}; is it a folder that HF peft saved?")
    if not (folder / WEIGHTS).is_file():
        pickled = " It holds a pickled adapter_model.bin, which peftlib does not read: save it anew with HF peft."
        raise LoadError(f"{folder} has no {WEIGHTS}." + (pickled if (folder / "adapter_model.bin").exists() else ""))
    try:
        settings = json.loads((folder / CONFIG).read_text())
        return dict(settings), load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise LoadError(f"{folder / WEIGHTS} is not a readable safetensors file: {error}") from error
    except (ValueError, TypeError) as error:
        raise LoadError(f"{folder / CONFIG} is not a JSON object: {error}") from error


def _inside(name: str, kind: str) -> str:
    """A tensor's name inside the backbone."""
    return name.removeprefix("base_model.").removeprefix("model." if kind in ("LORA", "IA3") else "")


def _sites(parts: Anatomy, path: str, folder: Folder) -> list[Site]:
    found = [site for site in parts.sites() if site.path == path]
    if not found:
        known = dict(parts.model.named_modules())
        why = "which peftlib does not adapt" if path in known else f"which {type(parts.model).__name__} does not have"
        error = UnsupportedError if path in known else LoadError
        raise error(f"{folder} adapts {path}, {why}; peftlib adapts the linear maps of the layers (anatomy.of(model))")
    return found


def _patterns(parts: Anatomy, sites: list[Site]) -> tuple[str, ...]:
    """Site names where they say it all, else paths."""
    names = tuple(dict.fromkeys(site.name for site in sites))
    return names if len(parts.sites(names)) == len(sites) else tuple(dict.fromkeys(site.path for site in sites))


def _lora(settings: Settings, tensors: Tensors, parts: Anatomy, folder: Folder) -> tuple[MethodConfig, Fill]:
    variant = [name for name in _VARIANTS if settings.get(name)]
    if settings.get("bias", "none") != "none":
        variant.append(f"bias={settings['bias']!r}")
    if variant:
        raise UnsupportedError(f"{folder} is a LoRA with {', '.join(variant)}, which peftlib's lora does not have")
    starts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for path in sorted({n.removesuffix(".lora_A.weight") for n in tensors if n.endswith(".lora_A.weight")}):
        A, B = tensors.pop(f"{path}.lora_A.weight"), tensors.pop(f"{path}.lora_B.weight", None)
        if B is None:
            raise LoadError(f"{folder} has no {path}.lora_B.weight")
        row = 0
        for site in _sites(parts, path, folder):
            starts[str(site)] = A, B[row : row + site.out_features]
            row += site.out_features
    _all_used(tensors, starts, folder)
    ranks = {len(A) for A, _ in starts.values()}
    if len(ranks) > 1:
        raise UnsupportedError(f"{folder} has LoRA factors of ranks {sorted(ranks)}; peftlib's lora has one rank")
    config = method_config(
        "lora",
        rank=ranks.pop(),
        alpha=float(settings.get("lora_alpha", 8)),
        targets=_patterns(parts, [site for site in parts.sites() if str(site) in starts]),
        dropout=float(settings.get("lora_dropout", 0.0)),
        rank_stabilized=bool(settings.get("use_rslora", False)),
    )

    def fill(adapted: Adapted) -> None:
        for site, update in _updates(adapted).items():
            for name, value in zip("AB", starts[str(site)]):
                _copy(getattr(update, name), value, f"{site}.lora_{name}")

    return config, fill


def _ia3(settings: Settings, tensors: Tensors, parts: Anatomy, folder: Folder) -> tuple[MethodConfig, Fill]:
    scales: dict[str, torch.Tensor] = {}
    outputs, inputs = [], []
    for name in sorted(n for n in tensors if n.endswith(".ia3_l")):
        path, scale = name.removesuffix(".ia3_l"), tensors.pop(name)
        sites = _sites(parts, path, folder)
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
    _all_used(tensors, scales, folder)
    config = method_config("ia3", outputs=_patterns(parts, outputs), inputs=_patterns(parts, inputs))

    def fill(adapted: Adapted) -> None:
        for site, child in _scales(adapted).items():
            _copy(child.scale, scales[str(site)], f"{site}.ia3_l")

    return config, fill


def _prompt(settings: Settings, tensors: Tensors, parts: Anatomy, folder: Folder) -> tuple[MethodConfig, Fill]:
    vectors = _embeddings(tensors, folder)
    if (settings.get("num_transformer_submodules") or 1) > 1:
        raise UnsupportedError(
            f"{folder} has a prompt for the decoder too (num_transformer_submodules=2); peftlib's prompt_tuning has "
            "one before the encoder, as in its paper"
        )

    def fill(adapted: Adapted) -> None:
        _copy(_prompt_child(adapted).vectors, vectors, "prompt_embeddings")

    return method_config("prompt_tuning", length=len(vectors), init="random"), fill


def _prefix(settings: Settings, tensors: Tensors, parts: Anatomy, folder: Folder) -> tuple[MethodConfig, Fill]:
    embeddings = _embeddings(tensors, folder)
    if len(parts.stacks) > 1:
        return _decoder_prefix(settings, embeddings, parts, folder)
    shape = (len(embeddings), parts.num_layers, 2, parts.kv_heads, parts.head_dim)
    if embeddings.numel() != torch.Size(shape).numel():
        raise LoadError(
            f"{folder} has prefixes of shape {tuple(embeddings.shape)}; this backbone has {parts.num_layers} layers of "
            f"{parts.kv_heads} key heads of size {parts.head_dim}"
        )
    pairs = embeddings.view(shape).permute(1, 2, 3, 0, 4)

    def fill(adapted: Adapted) -> None:
        for layer, (key, value) in zip(adapted.host.anatomy.layers, pairs):
            _copy(_prefix_child(layer).key, key, "prompt_embeddings")
            _copy(_prefix_child(layer).value, value, "prompt_embeddings")

    return method_config("prefix_tuning", length=len(embeddings), reparametrize=False), fill


def _decoder_prefix(
    settings: Settings, embeddings: torch.Tensor, parts: Anatomy, folder: Folder
) -> tuple[MethodConfig, Fill]:
    """Of an encoder-decoder backbone, where ``num_transformer_submodules`` of 2 repeat the row of keys and values."""
    _counts_by_bias(parts)
    if settings.get("num_transformer_submodules") != 2:
        raise UnsupportedError(
            f"{folder} has prefixes with num_transformer_submodules={settings.get('num_transformer_submodules')}, with "
            f"which HF peft itself does not run {type(parts.model).__name__}; 2 is its own choice for SEQ_2_SEQ_LM"
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

    def fill(adapted: Adapted) -> None:
        for i, layer in enumerate(_decoder(adapted.host.anatomy)):
            _copy(_prefix_child(layer).key, row[4 * i], "prompt_embeddings")
            _copy(_prefix_child(layer).value, row[4 * i + 1], "prompt_embeddings")

    options: Settings = {"attentions": ("decoder",), "relative_bias": True}
    return method_config("prefix_tuning", length=length, reparametrize=False, **options), fill


def _embeddings(tensors: Tensors, folder: Folder) -> torch.Tensor:
    if "prompt_embeddings" not in tensors:
        raise LoadError(f"{folder} has no prompt_embeddings")
    found = tensors.pop("prompt_embeddings")
    _all_used(tensors, [found], folder)
    return found


def _all_used(left: Tensors, used: Sized, folder: Folder) -> None:
    if left:
        raise UnsupportedError(f"{folder} holds {len(left)} tensors that peftlib has no place for: {sorted(left)[:3]}")
    if not len(used):
        raise LoadError(f"{folder} holds no adapter's tensors")


def _updates(adapted: Adapted) -> dict[Site, LowRank]:
    """The update at each site of a lora."""
    method: Any = adapted.method
    return method.updates


def _scales(adapted: Adapted) -> dict[Site, ScaleInput | ScaleOutput]:
    """The scale at each site of an ia3."""
    method: Any = adapted.method
    return method.scales


def _prompt_child(adapted: Adapted) -> Prompt:
    (child,) = adapted.host.paths().values()
    return cast(Prompt, child)


def _prefix_child(layer: Layer) -> Prefix:
    return cast(Prefix, layer.attention.prefix)


def _copy(parameter: nn.Parameter, value: torch.Tensor, name: str) -> None:
    if parameter.shape != value.shape:
        raise LoadError(f"{name} has shape {tuple(value.shape)} in the file, {tuple(parameter.shape)} here")
    parameter.copy_(value)


# Writing


def _task(model: nn.Module) -> str | None:
    return next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), None)


def _counts_by_bias(parts: Anatomy) -> None:
    """Raise UnsupportedError for an encoder-decoder backbone on which HF peft's prefixes do what ours cannot."""
    name = type(parts.model).__name__
    if not parts.family.stacks["decoder"].shares_bias:
        raise UnsupportedError(
            f"HF peft's prefixes shift the positions of {name}'s decoder, whose text keeps its own beside peftlib's; "
            "those of T5, whose positions are relative, go both ways"
        )
    if _task(parts.model) != "SEQ_2_SEQ_LM":
        raise UnsupportedError(
            f"HF peft hands prefixes to a model as its cache, and {name} takes none; it can with a model for "
            "conditional generation"
        )


def _decoder(parts: Anatomy) -> list[Layer]:
    return [layer for layer in parts.layers if layer.stack == "decoder"]


def _targets(model: nn.Module, paths: list[str]) -> list[str]:
    """Last names of the modules where they say it all, as HF peft's users write them, else paths."""
    short = sorted({path.rpartition(".")[2] for path in paths})
    hits = {n for n, _ in model.named_modules() for end in short if n == end or n.endswith(f".{end}")}
    return short if hits == set(paths) else sorted(paths)


def _by_module(children: dict[Site, T]) -> dict[str, dict[Site, T]]:
    found: dict[str, dict[Site, T]] = {}
    for site, child in children.items():
        found.setdefault(site.path, {})[site] = child
    return found


def _write_lora(adapted: Adapted) -> tuple[Settings, Tensors]:
    c, tensors, ranks = cast("LoRAConfig", adapted.config), {}, {}
    modules = _by_module(_updates(adapted))
    for path, updates in modules.items():
        # The parts of a fused map have factors of their own: theirs are these side by side, of the sum of the ranks.
        A = torch.cat([update.A for update in updates.values()])
        rows = next(iter(updates)).out_features * (next(iter(updates)).part or (0, 1))[1]
        B = A.new_zeros(rows, len(A))
        for i, (site, update) in enumerate(updates.items()):
            B[site.rows, i * c.rank : (i + 1) * c.rank] = update.B
        tensors[f"base_model.model.{path}.lora_A.weight"] = A
        tensors[f"base_model.model.{path}.lora_B.weight"] = B
        ranks[path] = len(A)
    rank = max(ranks.values())
    root = 0.5 if c.rank_stabilized else 1.0
    settings = {
        "r": rank,
        "lora_alpha": c.scale * rank**root,
        "use_rslora": c.rank_stabilized,
        "lora_dropout": c.dropout,
        "bias": "none",
        "target_modules": _targets(adapted.model, list(modules)),
        "fan_in_fan_out": any(site.transposed for site in _updates(adapted)),
        "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {path: c.scale * r**root for path, r in ranks.items() if r != rank},
    }
    return settings, tensors


def _write_ia3(adapted: Adapted) -> tuple[Settings, Tensors]:
    c, tensors, rows = cast("IA3Config", adapted.config), {}, []
    modules = _by_module(_scales(adapted))
    inputs = {site.path for site in adapted.host.anatomy.sites(c.inputs)}
    outputs = {site.path for site in adapted.host.anatomy.sites(c.outputs)}
    if both := inputs & outputs:
        raise UnsupportedError(f"HF peft's (IA)3 scales the input or the output of a map; here {min(both)} has both")
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
        "fan_in_fan_out": any(site.transposed for site in _scales(adapted)),
    }
    return settings, tensors


def _virtual_tokens(adapted: Adapted) -> Settings:
    if _task(adapted.model) is None:
        raise UnsupportedError(
            f"HF peft has no prompts or prefixes for {type(adapted.model).__name__}; it knows the tasks "
            + ", ".join(dict.fromkeys(_TASKS.values()))
        )
    parts = adapted.host.anatomy
    return {
        "num_virtual_tokens": cast("PromptTuningConfig | PrefixTuningConfig", adapted.config).length,
        "num_transformer_submodules": 1,
        "num_layers": parts.num_layers,
        "num_attention_heads": parts.kv_heads,
        "token_dim": parts.kv_heads * parts.head_dim,
    }


def _write_prompt(adapted: Adapted) -> tuple[Settings, Tensors]:
    c, vectors = cast("PromptTuningConfig", adapted.config), _prompt_child(adapted).vectors
    if c.position != "front":
        raise UnsupportedError(f"HF peft's prompts stand in front of the input, not at position={c.position!r}")
    settings = _virtual_tokens(adapted) | {"token_dim": vectors.shape[1], "prompt_tuning_init": "RANDOM"}
    return settings, {"prompt_embeddings": vectors}


def _write_prefix(adapted: Adapted) -> tuple[Settings, Tensors]:
    parts = adapted.host.anatomy
    if len(parts.stacks) > 1:
        return _write_decoder_prefix(adapted)
    if not cast("PrefixTuningConfig", adapted.config).shift_positions:
        raise UnsupportedError("HF peft's prefixes shift the text's positions; shift_positions=False cannot be written")
    with torch.no_grad():
        pairs = torch.stack([torch.stack(_prefix_child(layer).pair()) for layer in parts.layers])
    settings = _virtual_tokens(adapted) | {"prefix_projection": False}
    return settings, {"prompt_embeddings": pairs.permute(3, 0, 1, 2, 4).flatten(1)}


def _write_decoder_prefix(adapted: Adapted) -> tuple[Settings, Tensors]:
    c, parts = cast("PrefixTuningConfig", adapted.config), adapted.host.anatomy
    _counts_by_bias(parts)
    if set(c.attentions) != {"decoder"} or not c.relative_bias:
        raise UnsupportedError(
            f"HF peft's prefixes for {type(parts.model).__name__} stand in the decoder's self-attention alone and its "
            f"relative bias counts them; attentions={c.attentions!r} with relative_bias={c.relative_bias} cannot be "
            "written. Attach prefix_tuning with attentions=('decoder',) and relative_bias=True"
        )
    layers = _decoder(parts)
    places = 2 * len(layers)  # pairs a row: as many layers as HF peft is told of
    with torch.no_grad():
        pairs = [_prefix_child(layer).pair() for layer in layers]
        row = pairs[0][0].new_zeros(2 * places, *pairs[0][0].shape)
        for i, pair in enumerate(pairs):
            row[4 * i], row[4 * i + 1] = pair
    settings = _virtual_tokens(adapted) | {
        "num_layers": places,
        "num_transformer_submodules": 2,
        "prefix_projection": False,
    }
    return settings, {"prompt_embeddings": row.permute(2, 0, 1, 3).flatten(1)}
