"""Sentence embeddings, for methods that compare texts."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from peftlib.backbones.loading import load
from peftlib.errors import DataError


@torch.no_grad()
def embed(texts: Sequence[str], name: str | os.PathLike = "minilm-l6", *, batch_size: int = 32) -> torch.Tensor:
    """Embeddings (n, d) of ``texts`` by an encoder, of length one: the mean of its last states over each text's tokens.

    ``name`` is that of a backbone; the default is the embedded sentence encoder. Raises DataError without any text.
    """
    if not texts:
        raise DataError("embed() was given no text")
    backbone = load(name, head="base")
    found = []
    for start in range(0, len(texts), batch_size):
        batch = backbone.tokenizer(
            list(texts[start : start + batch_size]),
            padding=True,
            truncation=True,
            max_length=min(256, backbone.tokenizer.model_max_length),
            return_tensors="pt",
        )
        mask = batch["attention_mask"][..., None]
        states = backbone.model(**batch).last_hidden_state
        found.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(found)
