r"""WARP: trained embeddings around the text and a [MASK], and a trained vector a class that scores the mask's state.

.. math:: p(c \mid x) = \frac{\exp(v_c^\top f(T_P(x))_{\mathrm{mask}})}
                             {\sum_{c'} \exp(v_{c'}^\top f(T_P(x))_{\mathrm{mask}})}

Shapes: P (m, e) with e the width of the embedding, f (b, t, d) for b rows of t tokens, v_c (d). T_P(x) is
[CLS] P_1 x_1 P_2 [MASK] P_3 [SEP] x_2 P_4 [SEP], with a single text [CLS] P_1 x P_2 [MASK] P_3 P_4 [SEP]. Trained: m e,
and the class vectors with a bias, which are the task head. All positions are new, so the start is another output, and a
prompt is input: no merge. The backbone runs without dropout in training too.

On a masked language model f ends with the head's own transform (dense map, nonlinearity, norm), and the class vectors
stand in the place of the vocabulary's, as in the paper. The model's ``config.num_labels`` says how many there are, its
logits are those of the classes, and ``peftlib.fit`` takes it for a classification task. A classification model lacks
the transform's weights: there the head's last linear map scores the mask's state itself, and other parts of the head
neither act nor train. A masked language model loaded from files that lack its head has a random transform, which stays
frozen: there a classification model is the better host.

Source: Hambardzumyan et al. 2021, arXiv:2101.00121, and its code: 20 vectors in groups of 5 that start as the [MASK]'s
embedding; rate 1e-3. A template of zeros is WARP_0. ``init="normal"`` has the embedding matrix's mean and deviation,
another start of that code. In its few-shot runs vectors start from [PAD], ``init="tokens"``, and class vectors from
words, ``verbalizer_token_ids``, here with a bias of zero. That code puts both texts into one segment; here the
tokenizer's [SEP] between them stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from peftlib.errors import TargetError, UnknownNameError, UnsupportedError
from peftlib.mechanisms import cloze, dropout, prompt, template
from peftlib.mechanisms.call import Handed
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.precision import cast
from peftlib.methods.base import ConfigError, Method, MethodConfig, at_least

INITS = ("mask", "normal", "tokens")


@dataclass(frozen=True)
class WarpConfig(MethodConfig):
    """``template``: how many vectors stand before the first text, behind it before the [MASK], behind the [MASK], and
    behind the second text. ``init`` of the vectors: the embedding of the [MASK], ``"normal"``, or the embeddings of
    ``init_token_ids``, repeated or cut to m. ``verbalizer_token_ids``: a word for each class whose embedding starts its
    vector (empty: random)."""

    template: tuple[int, ...] = (5, 5, 5, 5)
    init: Literal["mask", "normal", "tokens"] = "mask"
    init_token_ids: tuple[int, ...] = ()
    verbalizer_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if len(self.template) != 4:
            raise ConfigError(
                f"template={self.template!r} needs four numbers: before the first text, before the [MASK], behind it, "
                "behind the second text"
            )
        for count in self.template:
            at_least("template", count, 0)
        if self.init not in INITS:
            raise UnknownNameError("init", self.init, INITS)
        if (self.init == "tokens") != bool(self.init_token_ids):
            raise ConfigError(
                f'init={self.init!r} with init_token_ids={self.init_token_ids!r}: init="tokens" needs token ids, and '
                "the others take none"
            )


class Cloze(nn.Module):
    """``forward(x)`` = P with the [MASK] as the ``at``-th among its vectors, (b, m + 1, e) for the embedded input x.

    ``vectors`` P (m, e), trained, or None for m = 0; ``mask`` (e), frozen. ``state`` hands the mask's last state
    (b, d) from the encoder to the scores.
    """

    def __init__(self, vectors: torch.Tensor, mask: torch.Tensor, at: int):
        super().__init__()
        self.vectors = nn.Parameter(vectors) if len(vectors) else None
        self.register_buffer("mask", mask, persistent=False)
        self.at = at
        self.state = Handed()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        P = self.mask[None]  # (1, e)
        if self.vectors is not None:
            P = cloze.with_mask(self.vectors, self.mask, self.at)  # (m, e) -> (m + 1, e)
        return P.expand(x.shape[0], -1, -1)  # (m + 1, e) -> (b, m + 1, e)


class Verbalizer(nn.Linear):
    """``forward(x, y)``: the scores of the classes, ``weight`` v (classes, d), in the place of the vocabulary's y.

    It stays frozen until the host trains it.
    """

    def __init__(self, d: int, classes: int):
        super().__init__(d, classes)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super().forward(cast(x, self.weight)).to(y.dtype)  # (b, 1, d) -> (b, 1, classes)


class Warp(Method):
    Config = WarpConfig
    learning_rate = 2e-3

    def attach(self, host: Host) -> None:
        c, parts = self.config, host.anatomy
        mask, sep = (parts.token_id(role) for role in ("mask", "sep"))
        if parts.stacks == ("encoder",) and (mask is None or sep is None):
            raise UnsupportedError(
                f"warp needs the ids of [MASK] and [SEP], and the config of this {type(host.model).__name__} does not "
                "name both: set model.config.mask_token_id and sep_token_id to the tokenizer's (peftlib.backbones does)"
            )
        before, left, right, after = c.template
        places = template.Template(before, left + 1 + right, after, sep)
        table = prompt.embedding(host).weight.detach()
        vector = _rows(table, (mask or 0,))[0]
        child = Cloze(self._start(table, vector), vector.to(table.dtype), before + left)
        self.scorer = self._score_mask(host, child, places)
        if c.verbalizer_token_ids:
            self._name_classes(host, table)
        dropout.switch_off(host, host.model)

    @property
    def classifies(self) -> bool:
        return True

    def head(self, head: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        mine = {id(p) for p in self.scorer.parameters()}
        return {n: p for n, p in self.host.model.named_parameters() if id(p) in mine}

    def _score_mask(self, host: Host, child: Cloze, places: template.Template) -> nn.Linear:
        """Put ``child`` into every text and let the mask's state alone be scored; gives the linear map that scores it.

        Raises UnsupportedError for a model that has neither one answer a text nor a masked language model's head.
        """
        model, parts = host.model, host.anatomy
        kind = type(model).__name__
        masked_lm = kind.endswith("ForMaskedLM")
        if parts.stacks != ("encoder",) or not (masked_lm or kind.endswith("ForSequenceClassification")):
            raise UnsupportedError(
                f"{self.name} scores the state at a [MASK], which takes an encoder with a classification head or a "
                f"masked language model's; {kind} is neither. Load an encoder with head='masked_lm' or "
                "'classification', or use prompt_tuning or p_tuning."
            )
        template.attach(host, child, places, only=child.at)
        if not masked_lm:
            host.hook(parts.stack_inputs("encoder"), _keep_state, child.state)
            host.hook(parts.scorer, _score_state, child.state, before=True)
            return parts.scorer
        decoder = model.get_output_embeddings()
        verbalizer = Verbalizer(decoder.in_features, parts.config.num_labels)
        host.after(decoder, self.name, verbalizer)
        cloze.answer_with_classes(host)
        return verbalizer

    def _start(self, table: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """P at the start, (m, e) in float32."""
        c, m = self.config, sum(self.config.template)
        if c.init == "mask":
            return mask.repeat(m, 1)
        if c.init == "normal":
            return torch.randn(m, table.shape[1]) * table.float().std() + table.float().mean()
        return _rows(table, tuple(c.init_token_ids[i % len(c.init_token_ids)] for i in range(m)))

    @torch.no_grad()
    def _name_classes(self, host: Host, table: torch.Tensor) -> None:
        """Start the class vectors as the words' embeddings, the output ones where the model has them."""
        ids, scorer = self.config.verbalizer_token_ids, self.scorer
        output = host.model.get_output_embeddings()
        rows = _rows(table if output is None else output.weight.detach(), ids)
        if rows.shape != scorer.weight.shape:
            raise TargetError(
                f"verbalizer_token_ids={ids!r} give {len(ids)} vectors of width {rows.shape[1]}; the model has "
                f"{scorer.out_features} classes of width {scorer.in_features}"
            )
        for parameter, value in ((scorer.weight, rows), (scorer.bias, torch.zeros_like(scorer.bias))):
            host.restore_on_undo(parameter)
            parameter.copy_(value)


def _rows(table: torch.Tensor, ids: tuple[int, ...]) -> torch.Tensor:
    """The embeddings of these tokens in float32, (k, e)."""
    if ids and not 0 <= min(ids) <= max(ids) < len(table):
        raise TargetError(f"token ids {ids!r} are not all in the vocabulary, 0 to {len(table) - 1}; use its tokenizer")
    return table[list(ids)].float().clone()


def _keep_state(state: Handed, encoder: nn.Module, args: tuple, kwargs: dict, output) -> None:
    state.value = output[0][:, 0]  # (b, 1, d) -> (b, d)


def _score_state(state: Handed, scorer: nn.Module, args: tuple, kwargs: dict):
    return (state.take(),), {}  # (b, d)
