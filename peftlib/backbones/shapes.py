"""The shapes of published models, for counting and planning without any weights.

Each row is (transformers' model type, the config values that differ from that type's defaults), as the model's
publishers give them.
"""

from __future__ import annotations


def _encoder(d: int, layers: int, heads: int, **more) -> dict:
    return {
        "hidden_size": d,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * d,
        **more,
    }


_BERT = {"vocab_size": 30522, "cls_token_id": 101, "sep_token_id": 102, "mask_token_id": 103}
_ROBERTA = {
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "mask_token_id": 50264,
}
_LLAMA = {"vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_LLAMA2 = _LLAMA | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
_LLAMA_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}


def _t5(d: int, layers: int, heads: int, **more) -> dict:
    return {
        "vocab_size": 32128,
        "d_model": d,
        "d_ff": 4 * d,
        "d_kv": 64,
        "num_layers": layers,
        "num_decoder_layers": layers,
        "num_heads": heads,
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
        "decoder_start_token_id": 0,
        **more,
    }


TABLE: dict[str, tuple[str, dict]] = {
    "bert-base-uncased": ("bert", _encoder(768, 12, 12, **_BERT)),
    "bert-large-uncased": ("bert", _encoder(1024, 24, 16, **_BERT)),
    "minilm-l6": ("bert", _encoder(384, 6, 12, **_BERT)),
    "roberta-base": ("roberta", _encoder(768, 12, 12, **_ROBERTA)),
    "roberta-large": ("roberta", _encoder(1024, 24, 16, **_ROBERTA)),
    "xlm-roberta-base": (
        "xlm-roberta",
        _encoder(768, 12, 12, **_ROBERTA | {"vocab_size": 250002, "mask_token_id": 250001}),
    ),
    "electra-base": ("electra", _encoder(768, 12, 12, **_BERT, embedding_size=768)),
    "distilbert-base-uncased": ("distilbert", _BERT),
    "gpt2": ("gpt2", {"vocab_size": 50257}),
    "gpt2-medium": ("gpt2", {"vocab_size": 50257, "n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "opt-125m": (
        "opt",
        {
            "vocab_size": 50272,
            "hidden_size": 768,
            "word_embed_proj_dim": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "ffn_dim": 3072,
        },
    ),
    "llama-7b": ("llama", _LLAMA | _LLAMA_7B),
    "llama-13b": ("llama", _LLAMA | _LLAMA_13B),
    "llama-2-7b": ("llama", _LLAMA2 | _LLAMA_7B),
    "llama-2-13b": ("llama", _LLAMA2 | _LLAMA_13B),
    "smollm2-135m": (
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
    ),
    "mistral-7b": (
        "mistral",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": False,
        },
    ),
    "qwen2-0.5b": (
        "qwen2",
        {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "t5-small": ("t5", _t5(512, 6, 8)),
    "t5-base": ("t5", _t5(768, 12, 12)),
    "t5-large": ("t5", _t5(1024, 24, 16)),
    "mt5-base": (
        "mt5",
        _t5(768, 12, 12)
        | {"vocab_size": 250112, "d_ff": 2048, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart-base": (
        "bart",
        {
            "vocab_size": 50265,
            "d_model": 768,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "encoder_attention_heads": 12,
            "decoder_attention_heads": 12,
            "encoder_ffn_dim": 3072,
            "decoder_ffn_dim": 3072,
        },
    ),
    "bart-large": ("bart", {"vocab_size": 50265}),
    "falcon-180b": (
        "falcon",
        {
            "vocab_size": 65024,
            "hidden_size": 14848,
            "num_hidden_layers": 80,
            "num_attention_heads": 232,
            "num_kv_heads": 8,
            "new_decoder_architecture": True,
            "parallel_attn": True,
            "bias": False,
            "alibi": False,
        },
    ),
}
