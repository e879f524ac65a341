r"""P-tuning: prompt embeddings that come from a bidirectional LSTM with an MLP, among the embeddings of the text.

.. math:: [P_1; \dots; P_m] = \mathrm{MLP}\bigl(\mathrm{BiLSTM}(E_1, \dots, E_m)\bigr)

Shapes: E, P (m, e) with e the width of the embedding (d, but ELECTRA's may be smaller), the same P for each of b rows;
the LSTM has two layers of h units each way, the MLP 2h units and a ReLU. The whole encoder trains, and m e numbers are
stored: when training ends the prompt becomes plain embeddings and the encoder is dropped. A loaded prompt trains on as
embeddings. The start changes the output, and a prompt is input: no merge. The place of a prompt, its part in heads and
in the cache are those of prompt tuning.

Templates, with x the text: the code's for BERT is [CLS] P3 [MASK] P3 x P3 [SEP], for GPT P3 x P3, whose last vector
gives the answer. So by default 3 vectors stand behind x and the others in front. On a decoder the last vector's state
takes the place of the state at x's last token, which is where a classification head looks and where the first token of
an answer is predicted (:mod:`peftlib.mechanisms.template`); a text that is trained on as a whole has no x. On an
encoder the classification head answers, or, with ``answer_token_ids``, the masked language model's: ``mask_at`` vectors
stand before the [MASK], and the scores of a word a class there are the logits (``num_labels`` of the config), so that
no head trains. Models of two stacks, which the paper does not have, get all vectors in front, and so by default do
encoders whose config does not name the [SEP] that ends x.

Source: Liu et al. 2021, arXiv:2103.10385, and its code (LAMA: ``cli.py``, ``p_tuning/``), where h is d / 2; HF peft's
encoder of type LSTM is the same network, and ``after=0`` its place. The code's patterns for SuperGLUE have words among
the vectors, and the backbone trains at 1e-5 beside the encoder; here it is frozen, as in the code for LAMA.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from peftlib.errors import LoadError, TargetError, UnknownNameError, UnsupportedError
from peftlib.mechanisms import cloze, prompt, template
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.precision import without_autocast
from peftlib.methods.base import ConfigError, Method, MethodConfig, at_least
from peftlib.methods.bases import hf_peft

POSITIONS = ("front", "after_first")


@dataclass(frozen=True)
class PTuningConfig(MethodConfig):
    """``length`` m; ``hidden`` h (None: half the embedding's width); ``dropout`` between the LSTM's layers. Of the m
    vectors ``between`` stand behind the first text (encoders) and ``after`` behind the last one (None: 3, or as many as
    there are, and 0 with two stacks); the others stand at ``position``: ``"front"``, or ``"after_first"`` token, which
    is where they go when some stand in an encoder's text. ``answer_token_ids``: a word for each class, whose score at a
    [MASK] behind the first ``mask_at`` vectors is the class's (masked language models)."""

    length: int = 9
    hidden: int | None = None
    dropout: float = 0.0
    position: prompt.Position = "front"
    between: int = 0
    after: int | None = None
    answer_token_ids: tuple[int, ...] = ()
    mask_at: int = 3

    def __post_init__(self):
        at_least("length", self.length, 1)
        if self.hidden is not None:
            at_least("hidden", self.hidden, 1)
        if self.position not in POSITIONS:
            raise UnknownNameError("position", self.position, POSITIONS)
        at_least("between", self.between, 0)
        at_least("after", self.behind, 0)
        if self.between + self.behind > self.length:
            raise ConfigError(
                f"between={self.between} and after={self.behind} are more than the length={self.length} vectors there "
                "are; choose a larger length"
            )
        at_least("mask_at", self.mask_at, 0)
        if self.answer_token_ids and self.mask_at > self.length - self.between - self.behind:
            raise ConfigError(
                f"mask_at={self.mask_at} vectors stand before the [MASK], and of length={self.length} only "
                f"{self.length - self.between - self.behind} stand in front; choose a larger length"
            )

    @property
    def behind(self) -> int:
        """How many vectors stand behind the last text."""
        return min(3, self.length - self.between) if self.after is None else self.after


class BiLSTM(nn.Module):
    """A bidirectional LSTM of two layers, (1, m, e) -> (1, m, 2h), with torch's parameters under torch's names.

    It calls the function and not torch's module, which torch.compile does not take into a graph.
    """

    def __init__(self, e: int, h: int, dropout: float):
        super().__init__()
        self.hidden, self.dropout = h, dropout
        weights = dict(nn.LSTM(e, h, 2, bidirectional=True).named_parameters())
        self.names = tuple(weights)
        for name, parameter in weights.items():
            self.register_parameter(name, parameter)

    def forward(self, E: torch.Tensor) -> torch.Tensor:
        start = E.new_zeros(4, 1, self.hidden)  # (2 layers of 2 directions, 1, h)
        weights = [getattr(self, name) for name in self.names]
        return torch.lstm(E, (start, start), weights, True, 2, self.dropout, self.training, True, True)[0]  # (1, m, 2h)


class PromptEncoder(nn.Module):
    """``forward() = MLP(BiLSTM(E))``, the prompt P (m, e) from the trained embeddings E (m, e)."""

    def __init__(self, m: int, e: int, h: int, dropout: float):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(m, e))
        self.lstm = BiLSTM(e, h, dropout)
        self.mlp = nn.Sequential(nn.Linear(2 * h, 2 * h), nn.ReLU(), nn.Linear(2 * h, e))

    def forward(self) -> torch.Tensor:
        # In the parameters' own precision: that of the stored prompt, and not every CPU has a bfloat16 LSTM.
        with without_autocast(self.embedding):
            H = self.lstm(self.embedding[None])  # (1, m, e) -> (1, m, 2h)
            return self.mlp(H)[0]  # (1, m, 2h) -> (m, e)


class EncodedPrompt(nn.Module):
    """``forward(x) = P`` for each row of the embedded input x (b, t, e). P comes from the encoder ``maker`` until
    :meth:`keep` puts ``vectors`` (m, e) in its place. Where there is a ``mask`` (e), it stands in P behind ``mask_at``
    vectors."""

    def __init__(self, encoder: PromptEncoder, mask: torch.Tensor | None = None, mask_at: int = 0):
        super().__init__()
        self.maker = encoder
        self.register_buffer("mask", mask, persistent=False)
        self.mask_at = mask_at

    def current(self) -> torch.Tensor:
        """The prompt as it is now, (m, e)."""
        return self.vectors if self.maker is None else self.maker()

    def keep(self) -> None:
        """Drop the encoder and train the vectors that it gives now."""
        if self.maker is not None:
            with torch.no_grad():
                vectors = self.maker().clone(memory_format=torch.contiguous_format)
            self.maker = None
            self.vectors = nn.Parameter(vectors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        P = self.current()  # (m, e)
        if self.mask is not None:
            P = cloze.with_mask(P, self.mask, self.mask_at)  # (m, e) -> (m + 1, e)
        return P.expand(x.shape[0], -1, -1)  # (m or m + 1, e) -> (b, m or m + 1, e)


class Words(nn.Module):
    """``forward(x, y)``: of the vocabulary's scores y (b, 1, V) those of the words, one a class, (b, 1, classes)."""

    def __init__(self, ids: tuple[int, ...]):
        super().__init__()
        self.register_buffer("ids", torch.tensor(ids), persistent=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y[..., self.ids]  # (b, 1, V) -> (b, 1, classes)


class _Files(hf_peft.Prompt):
    """The prompt that the encoder gives, in front; whoever loads it has embeddings and no encoder."""

    kind = "P_TUNING"
    unused = (
        *hf_peft.EVERY_PROMPT,
        *("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"),
    )

    def options(self, found: dict[str, torch.Tensor]) -> dict:
        return {"after": 0}

    def start(self, method: Method) -> None:
        method.prompt.keep()

    def parameters(self, method: Method) -> dict[str, torch.Tensor]:
        return {"prompt_embeddings": method.prompt.current()}

    def check(self, method: Method) -> None:
        super().check(method)
        c = method.config
        if c.answer_token_ids or c.between or method.behind:
            raise UnsupportedError(
                f"HF peft's P-tuning has all vectors in front; here {c.between} stand between the texts and "
                f"{method.behind} behind, with answer_token_ids={c.answer_token_ids!r}. Attach p_tuning with after=0"
            )

    def more_settings(self, method: Method) -> dict:
        return {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": method.config.hidden}


class PTuning(Method):
    Config = PTuningConfig
    learning_rate = 1e-2
    hf_peft = _Files()
    moved_to_front = False
    """Whether the default has become another one, for a backbone that names no [SEP]."""

    @property
    def classifies(self) -> bool:
        return bool(self.config.answer_token_ids)

    @property
    def behind(self) -> int:
        """How many vectors stand behind the last text; models of two stacks have all in front unless told otherwise."""
        c = self.config
        return 0 if c.after is None and len(self.host.anatomy.stacks) > 1 else c.behind

    def attach(self, host: Host) -> None:
        c, stacks = self.config, host.anatomy.stacks
        table = prompt.embedding(host)
        e = table.weight.shape[1]
        encoder = PromptEncoder(c.length, e, c.hidden or e // 2, c.dropout)
        if c.answer_token_ids:
            mask, _ = self._special(host, "mask"), self._check_words(host)
            self.prompt = EncodedPrompt(encoder, table.weight.detach()[mask].clone(), c.mask_at)
            front = c.length - c.between - c.behind + 1
            places = template.Template(front, c.between, c.behind, self._special(host, "sep"))
            template.attach(host, self.prompt, places, only=c.mask_at)
            host.after(host.model.get_output_embeddings(), self.name, Words(c.answer_token_ids))
            cloze.answer_with_classes(host)
            return
        self.prompt = EncodedPrompt(encoder)
        if c.after is None and not c.between and stacks == ("encoder",) and host.anatomy.token_id("sep") is None:
            warnings.warn(
                f"the config of this {type(host.model).__name__} names no [SEP], so all {c.length} vectors of p_tuning "
                f"stand in front (after=0); with model.config.sep_token_id set, {c.behind} stand behind the text",
                stacklevel=2,
            )
            self.config, self.moved_to_front = dataclasses.replace(c, after=0), True
            c = self.config
        behind = self.behind
        if not (c.between or behind):
            prompt.attach(host, self.prompt, c.length, c.position)
            return
        if stacks == ("decoder",) and c.between:
            raise UnsupportedError(
                f"between={c.between} vectors stand before the [SEP] of a first text, and {type(host.model).__name__} "
                "is a decoder, whose rows are one text; put them behind it with after"
            )
        sep = self._special(host, "sep") if stacks == ("encoder",) else None
        template.attach(host, self.prompt, template.Template(c.length - c.between - behind, c.between, behind, sep))

    def _special(self, host: Host, role: Literal["mask", "sep"]) -> int:
        """The id of [SEP] or [MASK]."""
        found = host.anatomy.token_id(role)
        if found is None:
            raise UnsupportedError(
                f"vectors in the text and at a mask need the ids of [SEP] and [MASK], and the config of this "
                f"{type(host.model).__name__} names no {role}: set model.config.{role}_token_id (peftlib.backbones "
                "does), or put all vectors in front with after=0"
            )
        return found

    def _check_words(self, host: Host) -> None:
        """Raise where the words cannot answer."""
        ids, parts, kind = self.config.answer_token_ids, host.anatomy, type(host.model).__name__
        if parts.stacks != ("encoder",) or not kind.endswith("ForMaskedLM"):
            raise UnsupportedError(
                f"answer_token_ids are scored by a masked language model's head; {kind} has none. Load an encoder with "
                "head='masked_lm', or leave them out"
            )
        if len(ids) != parts.config.num_labels or not 0 <= min(ids) <= max(ids) < parts.vocabulary:
            raise TargetError(
                f"answer_token_ids={tuple(ids)!r} must be one id below {parts.vocabulary} for each of the model's "
                f"{parts.config.num_labels} labels; load the backbone with num_labels={len(ids)}, and take ids of its "
                "tokenizer"
            )

    def on_train_end(self) -> None:
        self.prompt.keep()

    @torch.no_grad()
    def state(self) -> dict[str, torch.Tensor]:
        (path,) = self.host.paths()
        others = {n: p for n, p in self.host.trained().items() if not n.startswith(f"{path}.")}
        return others | {f"{path}.vectors": self.prompt.current()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        if self.moved_to_front:
            raise LoadError(
                "this prompt was trained with vectors before [SEP]: set model.config.sep_token_id, then load"
            )
        self.prompt.keep()
        super().load_state(state)
