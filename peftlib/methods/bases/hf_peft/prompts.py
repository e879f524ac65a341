"""HF peft's files of prompts and prefixes: one tensor of embeddings, or of keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from peftlib.anatomy import Anatomy, Layer
from peftlib.errors import LoadError, UnsupportedError
from peftlib.mechanisms import prefix
from peftlib.methods.bases.hf_peft.format import TASKS, Fill, Format, Settings, Tensors, all_used, copy, task_of

EVERY_PROMPT = ("token_dim", "num_attention_heads", "num_layers")
"""Settings of a prompt that its tensor says too."""


class Prompt(Format):
    """Embeddings in front of the input. What differs between methods with such a prompt: :meth:`options`,
    :meth:`tensors` and :meth:`more_settings`."""

    kind = "PROMPT_TUNING"
    outer = "base_model."
    used: Mapping[str, Any] = {"num_virtual_tokens": None, "num_transformer_submodules": None}
    unused: tuple[str, ...] = (
        *EVERY_PROMPT,
        *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    )
    encoder_alone = True
    """Whether HF peft, which has rows for the decoder too by default, puts the first rows before the encoder and the
    others nowhere."""
    others: tuple[str, ...] = ()
    """Names of tensors beside the embeddings."""

    def options(self, found: Tensors) -> Settings:
        """The method's options beside the length."""
        return {"init": "random"}

    def parameters(self, method: Any) -> Tensors:
        """The method's parameters by their names in the file."""
        (child,) = method.host.paths().values()
        return {"prompt_embeddings": child.vectors}

    def start(self, method: Any) -> None:
        """What comes before the values of a file are copied into an attached method."""

    def more_settings(self, method: Any) -> Settings:
        return {"prompt_tuning_init": "RANDOM"}

    def read(self, settings: Settings, tensors: Tensors, parts: Anatomy, folder: object) -> tuple[Settings, Fill]:
        settings = self.settled(settings, folder)
        found = {name: tensors.pop(name) for name in self.others if name in tensors}
        if len(found) < len(self.others):
            raise LoadError(f"{folder} lacks one of {', '.join(self.others)}")
        stacks = _submodules(settings)
        embeddings = _embeddings(settings, tensors, folder, stacks)
        if stacks > 1 and not self.encoder_alone:
            raise UnsupportedError(
                f"{folder} has a prompt for the decoder too (num_transformer_submodules={stacks}); peftlib's stands "
                "before the encoder alone, as in its paper"
            )
        found["prompt_embeddings"] = embeddings[: len(embeddings) // stacks]

        def fill(method: Any) -> None:
            self.start(method)
            for name, parameter in self.parameters(method).items():
                copy(parameter, found[name], name)

        return {"length": len(found["prompt_embeddings"]), **self.options(found)}, fill

    def check(self, method: Any) -> None:
        """Raise UnsupportedError for a prompt that stands elsewhere than HF peft's."""
        if method.config.position != "front":
            raise UnsupportedError(
                f"HF peft's prompts stand in front of the input, not at position={method.config.position!r}"
            )

    def write(self, method: Any) -> tuple[Settings, Tensors]:
        self.check(method)
        tensors = self.parameters(method)
        width = tensors["prompt_embeddings"].shape[1]
        return _virtual_tokens(method) | {"token_dim": width, **self.more_settings(method)}, tensors


class Prefix(Format):
    kind = "PREFIX_TUNING"
    outer = "base_model."
    used: Mapping[str, Any] = {
        "num_virtual_tokens": None,
        "num_transformer_submodules": None,
        "num_attention_heads": None,
    }
    unused = ("token_dim", "num_layers", "init_weights", "encoder_hidden_size", "prefix_projection")

    def read(self, settings: Settings, tensors: Tensors, parts: Anatomy, folder: object) -> tuple[Settings, Fill]:
        settings = self.settled(settings, folder)
        embeddings = _embeddings(settings, tensors, folder)
        if settings["num_attention_heads"] not in (None, parts.kv_heads):
            raise LoadError(
                f"{folder} has prefixes of {settings['num_attention_heads']} heads; this backbone has {parts.kv_heads} "
                "key heads"
            )
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
        if _submodules(settings) != 2:
            raise UnsupportedError(
                f"{folder} has prefixes with num_transformer_submodules={settings['num_transformer_submodules']}, "
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


def _embeddings(settings: Settings, tensors: Tensors, folder: object, stacks: int = 1) -> torch.Tensor:
    if "prompt_embeddings" not in tensors:
        raise LoadError(f"{folder} has no prompt_embeddings")
    found = tensors.pop("prompt_embeddings")
    all_used(tensors, [found], folder)
    said = settings["num_virtual_tokens"]
    if said is not None and said * stacks != len(found):
        raise LoadError(f"{folder} says num_virtual_tokens={said} and holds {len(found)} rows of prompt_embeddings")
    return found


def _submodules(settings: Settings) -> int:
    """How many stacks have a prompt; HF peft's default is both of an encoder-decoder backbone."""
    return settings["num_transformer_submodules"] or (2 if settings.get("task_type") == "SEQ_2_SEQ_LM" else 1)


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


def _virtual_tokens(method: Any) -> Settings:
    if task_of(method.host.model) is None:
        raise UnsupportedError(
            f"HF peft has no prompts or prefixes for {type(method.host.model).__name__}; it knows the tasks "
            + ", ".join(dict.fromkeys(TASKS.values()))
        )
    parts = method.host.anatomy
    return {
        "num_virtual_tokens": method.config.length,
        "num_transformer_submodules": 1,
        "num_layers": parts.num_layers,
        "num_attention_heads": parts.kv_heads,
        "token_dim": parts.kv_heads * parts.head_dim,
    }
