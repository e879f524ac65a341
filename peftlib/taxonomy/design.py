"""The design space of the methods, after the dimensions of He et al. 2022, arXiv:2110.04366.

Their table places adapters, prefix tuning, LoRA and their own variants by the form of the change, the representation
that it modifies, its insertion (sequential or parallel) and its composition (added, scaled, gated). The words for
methods that their table does not have, and the places of these methods, are ours. What is modified follows from
:attr:`Entry.sites`; a method with several forms has its default one here.
"""

from __future__ import annotations

from dataclasses import dataclass

FORMS = {
    "bottleneck": "down, nonlinearity, up",
    "low-rank": "product of thin matrices",
    "attention": "softmax over trained keys or layers",
    "vector": "a trained vector",
    "network": "a network beside the backbone",
    "entries": "chosen entries of the weights",
    "tensors": "whole tensors",
    "projection": "image of a small vector",
}
INSERTIONS = {
    "sequential": "reads what it changes",
    "parallel": "reads the input of what it changes",
    "input": "stands among the inputs",
    "in place": "is the network's own weights",
    "beside": "reads the network, which does not read it",
}
COMPOSITIONS = {
    "added": "h + delta",
    "scaled": "h + s delta, s fixed",
    "gated": "h + g delta or (1 - g) h + g delta, g trained or computed",
    "multiplied": "scale o h, mask o W",
    "joined": "among the tokens, or the weights of a softmax",
    "replaced": "new values for old ones",
}
REPRESENTATIONS = {
    "input": ("embeddings",),
    "attention": ("attention.query", "attention.key", "attention.value", "attention.heads", "attention.output"),
    "feed-forward": ("ffn.up", "ffn.gate", "ffn.down"),
    "hidden state": ("layers",),
    "norms": ("norms",),
    "all weights": ("weights", "biases"),
    "output": ("head",),
}
"""What is modified: a kind of representation, and the sites that are of it."""


@dataclass(frozen=True)
class Design:
    """Where a method stands in the design space; several words where it has several modules or both kinds."""

    form: tuple[str, ...]
    insertion: tuple[str, ...]
    composition: tuple[str, ...]


def _row(form: str, insertion: str, composition: str) -> Design:
    return Design(*(tuple(words.split(" + ")) for words in (form, insertion, composition)))


_PROMPT = _row("vector", "input", "joined")
_LORA = _row("low-rank", "parallel", "scaled")
_ENTRIES = _row("entries", "in place", "replaced")

DESIGNS: dict[str, Design] = {
    "sequential_adapter": _row("bottleneck + tensors", "sequential + in place", "added + replaced"),
    "residual_adapter": _row("bottleneck", "sequential", "added"),
    "coda": _row("bottleneck + tensors", "parallel + in place", "added + gated + replaced"),
    "parallel_adapter": _row("bottleneck", "parallel", "scaled"),
    "adapter_drop": _row("bottleneck", "sequential", "added"),
    "tiny_attention_adapter": _row("attention", "sequential", "added"),
    "adapter_fusion": _row("bottleneck + attention", "sequential", "gated"),
    "mera": _row("bottleneck", "sequential", "added"),
    "hyperformer_pp": _row("bottleneck + tensors", "sequential + in place", "added + replaced"),
    "adapter_soup": _row("bottleneck", "sequential", "added"),
    "warp": _PROMPT,
    "prompt_tuning": _PROMPT,
    "prefix_tuning": _row("attention", "parallel", "gated"),
    "p_tuning": _PROMPT,
    "spot": _PROMPT,
    "attempt": _row("vector + attention", "input", "joined + gated"),
    "mpt": _PROMPT,
    "ladder_side_tuning": _row("network", "beside", "gated"),
    "ia3": _row("vector", "sequential", "multiplied"),
    "pasta": _row("vector", "sequential", "added"),
    "attention_fusion": _row("attention", "beside", "joined"),
    "hadamard_adapter": _row("vector + tensors", "sequential + in place", "multiplied + added + replaced"),
    "bitfit": _row("tensors", "in place", "replaced"),
    "u_bitfit": _ENTRIES,
    "s_bitfit": _row("tensors", "in place", "replaced"),
    "threshold_mask": _row("entries", "in place", "multiplied"),
    "fish_mask": _ENTRIES,
    "lt_sft": _ENTRIES,
    "child_tuning_f": _ENTRIES,
    "child_tuning_d": _ENTRIES,
    "diff_pruning": _ENTRIES,
    "sam": _ENTRIES,
    "intrinsic_said": _row("projection", "in place", "gated"),
    "lora": _LORA,
    "krona": _LORA,
    "dylora": _LORA,
    "adalora": _LORA,
    "increlora": _LORA,
    "delta_lora": _row("low-rank + tensors", "parallel + in place", "scaled + replaced"),
    "lora_prune": _row("low-rank + entries", "parallel + in place", "scaled + multiplied"),
    "qlora": _LORA,
    "qa_lora": _LORA,
    "loftq": _LORA,
    "kernel_mix": _row("low-rank", "parallel", "added"),
    "laplace_lora": _LORA,
    "lora_fa": _LORA,
    "lorahub": _row("low-rank", "parallel", "gated"),
    "moelora": _row("low-rank", "parallel", "scaled + gated"),
    "l_lora": _LORA,
    "mam_adapter": _row("attention + bottleneck", "parallel", "gated + scaled"),
    "u_mam": _row("attention + bottleneck", "parallel", "gated + scaled"),
    "compacter": _row("bottleneck + tensors", "sequential + in place", "added + replaced"),
    "unipelt": _row("low-rank + attention + bottleneck", "parallel + sequential", "scaled + gated"),
    "autopeft": _row("attention + bottleneck", "parallel + sequential", "gated + added"),
    "s3delta": _row("low-rank + bottleneck + vector", "parallel + sequential", "scaled + added + multiplied"),
    "s4": _row(
        "low-rank + attention + bottleneck + tensors",
        "parallel + sequential + in place",
        "gated + scaled + added + replaced",
    ),
    "adamix": _row("bottleneck", "sequential", "added"),
    "sparse_adapter": _row("bottleneck", "sequential", "added"),
    "propetl": _row("bottleneck", "sequential", "added + multiplied"),
    "full": _row("tensors", "in place", "replaced"),
    "head": _row("tensors", "in place", "replaced"),
}


def modified(sites: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds of representation that sites are of."""
    return tuple(kind for kind, words in REPRESENTATIONS.items() if any(site in words for site in sites))
