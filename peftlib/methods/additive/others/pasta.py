r"""PASTA: trained vectors are added to the hidden states of the special tokens at every layer's input.

.. math:: h_{\ell, t} \leftarrow h_{\ell, t} + e(v_{\ell, p(t)}) \quad \text{where } t \text{ is special}

Shapes: h (B, n, d), v (tokens, d) a layer; p(t) counts a text's special tokens in their order, so that the vectors are
those of [CLS], the first [SEP] and the second [SEP]; e is dropout. All other hidden states go on bit for bit. The
vectors start at N(0, 0.02), as the reference code's do, so the start is near the backbone; ``std=0`` starts at it.
Trained: tokens d a layer. The addition depends on where the tokens stand: no merge.

Source: Yang et al. 2023, arXiv:2210.04382, and its code, on BERT and RoBERTa: L d 3 for pairs of texts, L d 2 for
single ones. Here ``tokens`` is 3 for both, and on single texts the third vector is idle; RoBERTa's pairs have four
special tokens, and whatever comes after the ``tokens``-th gets nothing (the reference code demands as many vectors as
the first row of a batch has special tokens). There the ids are BERT's own, here ``token_ids``, by default the [CLS] and
[SEP] of the model's config. Encoder-decoder backbones, which the paper does not have, get vectors in the encoder. The
paper's rate is 2.5e-4 for up to 150 epochs.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftlib.errors import TargetError, UnsupportedError
from peftlib.mechanisms import special_tokens
from peftlib.mechanisms.host import Host
from peftlib.methods.base import ConfigError, Method, MethodConfig, at_least


@dataclass(frozen=True)
class PastaConfig(MethodConfig):
    """``tokens``: special tokens of a text that get a vector; ``token_ids``: which ids are special, in any order
    (empty: [CLS] and [SEP] of the model's config); ``std`` of the start; ``dropout`` on what is added."""

    tokens: int = 3
    token_ids: tuple[int, ...] = ()
    std: float = 0.02
    dropout: float = 0.1

    def __post_init__(self):
        at_least("tokens", self.tokens, 1)
        at_least("std", self.std, 0)
        at_least("dropout", self.dropout, 0)
        if self.dropout >= 1:
            raise ConfigError(f"dropout={self.dropout!r} leaves nothing of the vectors; it must be below 1")


class Pasta(Method):
    Config = PastaConfig
    learning_rate = 1e-2
    exceptions = {  # noqa: RUF012
        "overfits on bart": "Only the encoder's special tokens move, and of that the cross-attention of a random "
        "decoder passes on too little to part the last of the eight texts."
    }

    def attach(self, host: Host) -> None:
        c = self.config
        special_tokens.attach(host, self.name, self._ids(host), c.tokens, c.std, c.dropout)

    def _ids(self, host: Host) -> tuple[int, ...]:
        ids, parts = self.config.token_ids, host.anatomy
        if not ids:
            found = [parts.token_id(role) for role in ("cls", "sep")]
            if None in found:
                raise UnsupportedError(
                    f"pasta acts on [CLS] and [SEP], and the config of this {type(host.model).__name__} names none. "
                    "Where its tokenizer has them, set model.config.cls_token_id and sep_token_id (peftlib.backbones "
                    "does); where its texts have other special tokens, name their ids: token_ids=(...)"
                )
            ids = tuple(found)
        if not 0 <= min(ids) <= max(ids) < parts.vocabulary:
            raise TargetError(
                f"token_ids={tuple(ids)} are not all in the backbone's vocabulary, 0 to {parts.vocabulary - 1}; take "
                "them from its own tokenizer"
            )
        return ids
