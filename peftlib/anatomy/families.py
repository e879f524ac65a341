"""Where each model family keeps its parts: one small table a family.

Paths are relative to a layer, except ``layers`` and ``norms`` of a stack, which are relative to the base model
(``model.base_model`` of transformers). ``path[i/n]`` is the i-th of n equal parts of a fused projection's output;
``a|b`` takes the first path that exists. To add a family, add one entry here: every method finds it by the names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Stack:
    """One tower of layers: the encoder or the decoder."""

    layers: str
    attention: str
    """The module that calls the attention function."""
    sites: dict[str, str]
    norms: dict[str, str]
    """``attention``, ``ffn`` (and ``cross_attention``): the layer norm that belongs to each block."""
    cross_attention: str = ""
    embeddings: str = ""
    """Owner of the input embedding, where it is not the base model's own (encoder-decoder stacks)."""
    pre_norm: bool = False
    """Whether norms stand before their block rather than after the residual sum."""
    norm_first: str = ""
    """The attribute of a layer that says the same, where models of the family differ."""
    projection: str = ""
    """The map behind the last layer to the width of the word embedding, where a model has one."""
    inputs: str = ""
    """The module whose forward takes ``inputs_embeds``; empty: the base model."""
    final_norm: str = ""
    positions: str = ""
    """The module that turns position ids into embeddings or rotations, relative to the base model; empty where there
    are no ids, or one for each stack."""
    sizes: tuple[str, ...] = ()
    """Attributes of an attention module that are in proportion to its number of heads."""
    shares_bias: bool = False
    """Whether the layers hand each other one position bias with a row for every head."""


@dataclass(frozen=True)
class Family:
    """``model_types``: the ``config.model_type`` values of transformers that this table describes."""

    name: str
    model_types: tuple[str, ...]
    stacks: dict[str, Stack] = field(default_factory=dict)
    heads: str = "num_attention_heads"
    inner: str = "intermediate_size"
    positions: Literal["absolute", "absolute after padding", "relative"] = "absolute"
    """A table of positions from 0, one whose first positions the padding id takes (RoBERTa), or none that ends."""
    special_tokens: dict[str, str] = field(default_factory=dict)
    """Role of a special token ("cls", "sep") -> the role that the config has for it ("bos", "eos")."""


_DELIMITERS = {"cls": "bos", "sep": "eos"}


def _bert(name: str, *model_types: str, **options: Any) -> Family:
    return Family(
        name,
        model_types,
        {
            "encoder": Stack(
                layers="encoder.layer",
                attention="attention.self",
                sites={
                    "attention.query": "attention.self.query",
                    "attention.key": "attention.self.key",
                    "attention.value": "attention.self.value",
                    "attention.output": "attention.output.dense",
                    "ffn.up": "intermediate.dense",
                    "ffn.down": "output.dense",
                },
                norms={"attention": "attention.output.LayerNorm", "ffn": "output.LayerNorm"},
                positions="embeddings.position_embeddings",
                sizes=("num_attention_heads", "all_head_size"),
            )
        },
        **options,
    )


_PROJECTIONS = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
}
_FC = {"attention.output": "self_attn.out_proj", "ffn.up": "fc1", "ffn.down": "fc2"}


def _t5_stack(name: str, ffn: int, cross: dict[str, str]) -> Stack:
    dense = f"layer.{ffn}.DenseReluDense"
    return Stack(
        layers=f"{name}.block",
        attention="layer.0.SelfAttention",
        cross_attention="layer.1.EncDecAttention" if cross else "",
        sites={
            "attention.query": "layer.0.SelfAttention.q",
            "attention.key": "layer.0.SelfAttention.k",
            "attention.value": "layer.0.SelfAttention.v",
            "attention.output": "layer.0.SelfAttention.o",
            **cross,
            "ffn.up": f"{dense}.wi|{dense}.wi_1",
            "ffn.gate": f"{dense}.wi_0",
            "ffn.down": f"{dense}.wo",
        },
        norms={
            "attention": "layer.0.layer_norm",
            **({"cross_attention": "layer.1.layer_norm"} if cross else {}),
            "ffn": f"layer.{ffn}.layer_norm",
        },
        embeddings=f"{name}.embed_tokens",
        inputs=name,
        pre_norm=True,
        final_norm=f"{name}.final_layer_norm",
        shares_bias=True,
    )


def _bart_stack(name: str, cross: bool) -> Stack:
    return Stack(
        layers=f"{name}.layers",
        attention="self_attn",
        cross_attention="encoder_attn" if cross else "",
        sites={
            **_PROJECTIONS,
            "attention.output": _FC["attention.output"],
            **(
                {
                    f"cross_attention.{k}": f"encoder_attn.{v}"
                    for k, v in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "out_proj"))
                }
                if cross
                else {}
            ),
            "ffn.up": "fc1",
            "ffn.down": "fc2",
        },
        norms={
            "attention": "self_attn_layer_norm",
            **({"cross_attention": "encoder_attn_layer_norm"} if cross else {}),
            "ffn": "final_layer_norm",
        },
        embeddings=f"{name}.embed_tokens",
        inputs=name,
        sizes=("num_heads",),
    )


FAMILIES: tuple[Family, ...] = (
    _bert("bert", "bert"),
    _bert("roberta", "roberta", "xlm-roberta", positions="absolute after padding", special_tokens=_DELIMITERS),
    _bert("electra", "electra"),
    Family(
        "distilbert",
        ("distilbert",),
        {
            "encoder": Stack(
                layers="transformer.layer",
                attention="attention",
                sites={
                    "attention.query": "attention.q_lin",
                    "attention.key": "attention.k_lin",
                    "attention.value": "attention.v_lin",
                    "attention.output": "attention.out_lin",
                    "ffn.up": "ffn.lin1",
                    "ffn.down": "ffn.lin2",
                },
                norms={"attention": "sa_layer_norm", "ffn": "output_layer_norm"},
                positions="embeddings.position_embeddings",
                sizes=("n_heads",),
            )
        },
        inner="hidden_dim",
    ),
    Family(
        "gpt2",
        ("gpt2",),
        {
            "decoder": Stack(
                layers="h",
                attention="attn",
                sites={
                    "attention.query": "attn.c_attn[0/3]",
                    "attention.key": "attn.c_attn[1/3]",
                    "attention.value": "attn.c_attn[2/3]",
                    "attention.output": "attn.c_proj",
                    "ffn.up": "mlp.c_fc",
                    "ffn.down": "mlp.c_proj",
                },
                norms={"attention": "ln_1", "ffn": "ln_2"},
                pre_norm=True,
                final_norm="ln_f",
                positions="wpe",
                sizes=("num_heads", "split_size"),
            )
        },
        inner="n_inner",
    ),
    Family(
        "opt",
        ("opt",),
        {
            "decoder": Stack(
                layers="decoder.layers",
                attention="self_attn",
                sites={**_PROJECTIONS, **_FC},
                norms={"attention": "self_attn_layer_norm", "ffn": "final_layer_norm"},
                inputs="decoder",
                pre_norm=True,
                final_norm="decoder.final_layer_norm",
                positions="decoder.embed_positions",
                norm_first="do_layer_norm_before",
                projection="decoder.project_out",
                sizes=("num_heads",),
            )
        },
        inner="ffn_dim",
    ),
    Family(
        "llama",
        ("llama", "mistral", "qwen2"),
        {
            "decoder": Stack(
                layers="layers",
                attention="self_attn",
                sites={
                    **_PROJECTIONS,
                    "attention.output": "self_attn.o_proj",
                    "ffn.gate": "mlp.gate_proj",
                    "ffn.up": "mlp.up_proj",
                    "ffn.down": "mlp.down_proj",
                },
                norms={"attention": "input_layernorm", "ffn": "post_attention_layernorm"},
                pre_norm=True,
                final_norm="norm",
                positions="rotary_emb",
            )
        },
        positions="relative",
    ),
    Family(
        "t5",
        ("t5", "mt5"),
        {
            "encoder": _t5_stack("encoder", 1, {}),
            "decoder": _t5_stack(
                "decoder",
                2,
                {
                    f"cross_attention.{k}": f"layer.1.EncDecAttention.{v}"
                    for k, v in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o"))
                },
            ),
        },
        inner="d_ff",
        positions="relative",
    ),
    Family(
        "bart",
        ("bart",),
        {"encoder": _bart_stack("encoder", cross=False), "decoder": _bart_stack("decoder", cross=True)},
        inner="encoder_ffn_dim",
        special_tokens=_DELIMITERS,
    ),
)
