"""Tiny random models of every family, with a real tokenizer, built in code in milliseconds.

Two layers, width 32, four heads (two key-value heads in the LLaMA-like families), an inner size of 64 and 256
positions. The body is the same whatever the head and its seed, as it is with a pretrained model; biases and norm
weights are not at their usual 0 and 1, so that code which forgets one is seen.
"""

from __future__ import annotations

import json

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

MAX_LENGTH = 256

_WORDS = (
    "the a an this that it is was are were be has had not no and or but of in on at to for with from by as very so too "
    "i you he she we they his her its my our one two three four five some all every movie film story plot actor actors "
    "scene scenes script music camera ending director character cast dialogue picture show song joke dog cat house "
    "man woman child people time day night year life world city road river tree bird book red green blue black white "
    "big small old new long short good great fine superb lovely brilliant charming clever funny moving "
    "bad poor awful dull boring clumsy weak flat tedious dreadful like love hate see saw watch make made feel felt "
    "know think say said go went come came run ran walk sing sleep eat read write really never always"
)
WORDS = tuple(_WORDS.split())
"""Words that are one token each; everything else is spelled with letters."""

_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"

_BERT = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
_ROBERTA = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "cls_token": "<s>",
    "sep_token": "</s>",
}
_LLAMA = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_T5 = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
_GPT2 = {
    "unk_token": "<|endoftext|>",
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|pad|>",
}
_OPT = {"bos_token": "</s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}

_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.1,
}
_LLAMA_LIKE = _ENCODER | {"num_key_value_heads": 2, "max_position_embeddings": MAX_LENGTH}
_T5_LIKE = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}

# family -> (special tokens in order of their ids, template of one text, template of a pair, config).
# A template's "$A:0" is the first text with token type 0; None: the tokenizer adds no special tokens.
_CLS = ("[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1")
_CLS_UNTYPED = ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:0 [SEP]")
_S = ("<s> $A </s>", "<s> $A </s> </s> $B:0 </s>")
_END = ("$A </s>", "$A </s> $B:0 </s>")
_START = ("<s> $A", "<s> $A $B:0")
FAMILIES: dict[str, tuple[dict[str, str], tuple[str, str] | None, dict]] = {
    "bert": (_BERT, _CLS, _ENCODER | {"max_position_embeddings": MAX_LENGTH}),
    "roberta": (_ROBERTA, _S, _ENCODER | {"max_position_embeddings": MAX_LENGTH + 2, "type_vocab_size": 1}),
    "xlm-roberta": (_ROBERTA, _S, _ENCODER | {"max_position_embeddings": MAX_LENGTH + 2, "type_vocab_size": 1}),
    "electra": (_BERT, _CLS, _ENCODER | {"embedding_size": 32, "max_position_embeddings": MAX_LENGTH}),
    "distilbert": (
        _BERT,
        _CLS_UNTYPED,
        {
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 64,
            "max_position_embeddings": MAX_LENGTH,
            "initializer_range": 0.1,
        },
    ),
    "gpt2": (
        _GPT2,
        None,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "n_positions": MAX_LENGTH, "initializer_range": 0.1},
    ),
    "opt": (
        _OPT,
        ("</s> $A", "</s> $A </s> $B:0"),
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "max_position_embeddings": MAX_LENGTH,
            "init_std": 0.1,
        },
    ),
    "llama": (_LLAMA, _START, _LLAMA_LIKE),
    "mistral": (_LLAMA, _START, _LLAMA_LIKE | {"sliding_window": None}),
    "qwen2": (_LLAMA, None, _LLAMA_LIKE),
    "t5": (_T5, _END, _T5_LIKE | {"feed_forward_proj": "relu", "tie_word_embeddings": True}),
    "mt5": (_T5, _END, _T5_LIKE | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": (
        _ROBERTA,
        _S,
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": MAX_LENGTH,
            "init_std": 0.1,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": 2,
        },
    ),
}


def _vocabulary(special: dict[str, str]) -> dict[str, int]:
    """Special tokens first, then words, letters, and the letters that continue a word."""
    letters = list(_CHARACTERS + _PUNCTUATION)
    continued = ["##" + c for c in _CHARACTERS]
    return {token: i for i, token in enumerate(dict.fromkeys([*special.values(), *WORDS, *letters, *continued]))}


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer with the family's special tokens and templates."""
    special, template, _ = FAMILIES[family]
    vocabulary = _vocabulary(special)
    core = Tokenizer(models.WordPiece(vocabulary, unk_token=special["unk_token"], max_input_chars_per_word=64))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##")
    if template:
        core.post_processor = processors.TemplateProcessing(
            single=template[0],
            pair=template[1],
            special_tokens=[(token, vocabulary[token]) for token in dict.fromkeys(special.values())],
        )
    types = ["token_type_ids"] if template == _CLS else []
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", *types, "attention_mask"],
        clean_up_tokenization_spaces=False,
        **special,
    )


def config(family: str, **changes) -> PretrainedConfig:
    """The family's config with the ids of its tokenizer."""
    special, _, shape = FAMILIES[family]
    vocabulary = _vocabulary(special)
    ids = {f"{role}_id": vocabulary[token] for role, token in special.items() if role[:3] in ("pad", "bos", "eos")}
    return AutoConfig.for_model(family, vocab_size=len(vocabulary), **(ids | shape | changes))


def identity(family: str) -> bytes:
    """What a tiny body is made from: equal bytes, equal weights (of one torch version)."""
    return json.dumps(["tiny", 1, config(family).to_diff_dict()], sort_keys=True, default=str).encode()


def fill_body(model: PreTrainedModel) -> None:
    """Gives the model's body the family's own random weights, which no seed changes. Uses torch's generator."""
    torch.default_generator.manual_seed(0)
    body = AutoModel.from_config(model.config)
    with torch.no_grad():
        for parameter in body.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.base_model.load_state_dict(body.state_dict(), strict=False)
