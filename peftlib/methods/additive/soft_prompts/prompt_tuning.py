r"""Prompt tuning: a few trained embeddings stand before the input (additive, soft prompt-based).

.. math:: \hat{y} = f\bigl([\,P; E(x)\,]\bigr)

Shapes: P (m, e) with e the width of the embedding (d, but ELECTRA's is smaller), E(x) (b, t, e) for b rows of t tokens.
Trained: m e. The prompt acts on the output from the first step on. It takes part in attention with every input, so
nothing of it folds into weights: no merge. Encoder-decoder backbones get it before the encoder's input; with a cache it
enters once.

Source: Lester et al. 2021, arXiv:2104.08691. There m is 100 on T5 and the rate is 0.3 under Adafactor; beyond 20
vectors they found little more (section 3.2). ``"vocabulary"`` is the paper's sampled-vocabulary start, ``"text"`` its
class-label start with the given tokens repeated up to m (the paper fills up with sampled ones), ``"random"`` its
uniform one. Encoders whose head pools the first position see the first prompt vector there, as in HF peft;
``position="after_first"`` leaves them [CLS]. Everywhere else logits are those of the text alone, so a causal loss does
not count the prediction of the first token from the prompt, which HF peft's does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from peftlib.errors import TargetError
from peftlib.mechanisms import prompt
from peftlib.mechanisms.host import Host
from peftlib.methods.base import ConfigError, Method, MethodConfig, at_least, one_of
from peftlib.methods.bases import hf_peft


@dataclass(frozen=True)
class PromptTuningConfig(MethodConfig):
    """``length`` m; ``init``: ``"vocabulary"`` samples embeddings of the first ``common`` tokens (vocabularies are
    sorted by frequency, or nearly so), ``"text"`` takes those of ``init_token_ids``, repeated or cut to m, ``"random"``
    draws from U(-``init_range``, ``init_range``); ``position``: ``"front"``, or ``"after_first"`` token (encoders)."""

    length: int = 100
    init: Literal["vocabulary", "text", "random"] = "vocabulary"
    common: int = 5000
    init_token_ids: tuple[int, ...] = ()
    init_range: float = 0.5
    position: prompt.Position = "front"

    def __post_init__(self):
        at_least("length", self.length, 1)
        at_least("common", self.common, 1)
        one_of("init", self.init, ("vocabulary", "text", "random"))
        one_of("position", self.position, ("front", "after_first"))
        if (self.init == "text") != bool(self.init_token_ids):
            raise ConfigError(
                f'init={self.init!r} with init_token_ids={self.init_token_ids!r}: init="text" needs the token ids of '
                "a text, tokenizer(text)['input_ids'], and the others take none"
            )


class Prompt(nn.Module):
    """``forward(x) = P`` for each row of the embedded input x (b, t, e): m trained ``vectors`` (m, e)."""

    def __init__(self, vectors: torch.Tensor):
        super().__init__()
        self.vectors = nn.Parameter(vectors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.vectors.expand(x.shape[0], -1, -1)  # (m, e) -> (b, m, e)


class PromptTuning(Method):
    Config = PromptTuningConfig
    learning_rate = 0.2
    hf_peft = hf_peft.Prompt()

    def attach(self, host: Host) -> None:
        c = self.config
        prompt.attach(host, Prompt(self._start(prompt.embedding(host))), c.length, c.position)

    @torch.no_grad()
    def _start(self, embedding: nn.Embedding) -> torch.Tensor:
        """P at the start, (m, e) in float32."""
        c, (vocabulary, e) = self.config, embedding.weight.shape
        if c.init == "random":
            return torch.empty(c.length, e).uniform_(-c.init_range, c.init_range)
        if c.init == "vocabulary":
            return prompt.sample(embedding, c.length, c.common)
        if not 0 <= min(c.init_token_ids) <= max(c.init_token_ids) < vocabulary:
            raise TargetError(
                f"init_token_ids go from {min(c.init_token_ids)} to {max(c.init_token_ids)}; the backbone's "
                f"vocabulary has ids 0 to {vocabulary - 1}. Use its own tokenizer."
            )
        ids = torch.tensor([c.init_token_ids[i % len(c.init_token_ids)] for i in range(c.length)])
        return embedding(ids).float().clone()
