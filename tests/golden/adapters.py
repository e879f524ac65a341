"""Makes ``adapters.safetensors``: what the library ``adapters`` computes on a small BERT, with its own weights.

It needs an environment of its own, because ``adapters`` requires an older transformers than this library. (``-P``: the
file has the name of what it imports.)

    python3.11 -m venv /tmp/adapters-env
    /tmp/adapters-env/bin/pip install torch==2.13.0 'transformers==4.57.*' 'adapters==1.3.*'
    /tmp/adapters-env/bin/python -P tests/golden/adapters.py
"""

import json
from pathlib import Path

import adapters
import torch
import transformers
from adapters import (
    CompacterConfig,
    DoubleSeqBnConfig,
    LoRAConfig,
    MAMConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
    UniPELTConfig,
)
from adapters.composition import Fuse
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

CONFIG = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}

BOTTLENECK = SeqBnConfig(reduction_factor=4, non_linearity="gelu")
PREFIX = {"prefix_length": 5, "bottleneck_size": 16}
CASES = {
    "sequential": DoubleSeqBnConfig(reduction_factor=4, non_linearity="gelu"),
    "pfeiffer": BOTTLENECK,
    "parallel": ParBnConfig(reduction_factor=4),
    "compacter": CompacterConfig(reduction_factor=4, phm_dim=4, phm_rank=2),
    "mam": MAMConfig(PrefixTuningConfig(**PREFIX), ParBnConfig(reduction_factor=4)),
    "unipelt": UniPELTConfig(
        prefix_tuning=PrefixTuningConfig(**PREFIX, use_gating=True),
        adapter=SeqBnConfig(reduction_factor=4, use_gating=True),
        lora=LoRAConfig(r=4, alpha=4, use_gating=True),
    ),
    "fusion": BOTTLENECK,
}


def backbone() -> BertModel:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**CONFIG, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def tuned(case: str) -> BertModel:
    """A backbone with the case's adapters, moved away from their start."""
    model = backbone()
    adapters.init(model)
    names = ("one", "two") if case == "fusion" else ("one",)
    for name in names:
        model.add_adapter(name, config=CASES[case])
    if case == "fusion":
        model.add_adapter_fusion(Fuse(*names), "dynamic")
    model.set_active_adapters(Fuse(*names) if case == "fusion" else "one")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in own(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def own(model: BertModel) -> dict[str, torch.nn.Parameter]:
    """The parameters that the backbone does not have; one that modules share has one name."""
    plain = set(dict(backbone().named_parameters()))
    return {n: p for n, p in model.named_parameters() if n.replace(".base_layer", "") not in plain}


@torch.no_grad()
def main() -> None:
    plain = backbone()
    # Without padding, which is where the gates of UniPELT differ on purpose.
    ids = torch.randint(CONFIG["vocab_size"], (3, 9), generator=torch.Generator().manual_seed(2))
    tensors = {"input_ids": ids} | {f"model.{n}": p for n, p in plain.named_parameters()}
    tensors["plain.output"] = plain(ids).last_hidden_state
    for case in CASES:
        model = tuned(case)
        tensors |= {f"{case}.{n}": p for n, p in own(model).items()}
        tensors[f"{case}.output"] = model(ids).last_hidden_state
    versions = {module.__name__: module.__version__ for module in (adapters, transformers, torch)}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        Path(__file__).with_suffix(".safetensors"),
        metadata={"config": json.dumps(CONFIG), "versions": json.dumps(versions)},
    )


if __name__ == "__main__":
    main()
