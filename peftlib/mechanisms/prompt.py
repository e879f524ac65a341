"""The seam at the input: trained vectors among the embeddings of the text.

:func:`attach` hooks the module of the first stack that takes ``inputs_embeds``: the base model of encoders and
decoders, the encoder of encoder-decoder models. The prompt's positions are part of everything inside the stack and of
its cache, and are taken out of its last hidden state, so that a head's logits and labels stand where they stood
without a prompt. Encoders whose task head pools the first position are the exception: there a prompt in front of the
input is what the head sees, as in HF peft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from peftlib.anatomy import Anatomy
from peftlib.errors import UnsupportedError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.outputs import Args, Kwargs, with_state
from peftlib.mechanisms.positions import by_name, check_length, names, past_length
from peftlib.mechanisms.precision import without_autocast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Position = Literal["front", "after_first"]

_POOLING_HEADS = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")


@dataclass(frozen=True)
class Seam:
    """``length`` m, the index ``at`` where the prompt goes in, the stack's parameter names in order, its first
    position id and the longest input it has positions for."""

    length: int
    at: int
    names: tuple[str, ...]
    first_position: int
    max_length: int | None


class Prompt(nn.Module):
    """m trained vectors: ``vectors`` (m, e). Called with the embedded input (B, n, e) it gives (B, m, e)."""

    def __init__(self, vectors: torch.Tensor):
        super().__init__()
        self.vectors = nn.Parameter(vectors)

    def forward(self, embedded: torch.Tensor) -> torch.Tensor:
        return self.vectors.expand(embedded.shape[0], -1, -1)


class MadePrompt(nn.Module):
    """A prompt that ``maker() -> (m, e)`` makes, until :meth:`keep` puts ``vectors`` in the maker's place."""

    vectors: nn.Parameter

    def __init__(self, maker: nn.Module):
        super().__init__()
        self.maker: nn.Module | None = maker

    def made(self) -> torch.Tensor:
        """The prompt as it is now, (m, e)."""
        return self.vectors if self.maker is None else self.maker()

    def keep(self) -> None:
        """Drop the maker and train the vectors that it makes now."""
        if self.maker is not None:
            with torch.no_grad():
                vectors = self.maker().clone(memory_format=torch.contiguous_format)
            self.maker = None
            self.vectors = nn.Parameter(vectors)

    def forward(self, embedded: torch.Tensor) -> torch.Tensor:
        return self.made().expand(embedded.shape[0], -1, -1)


class BiLSTM(nn.Module):
    """A bidirectional LSTM of two layers, (1, m, e) to (1, m, 2 hidden): the parameters of torch's, under its names,
    and the function below it, since torch.compile takes the function into a graph and the module not."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.hidden, self.dropout = hidden, dropout
        for name, parameter in nn.LSTM(width, hidden, 2, bidirectional=True).named_parameters():
            self.register_parameter(name, parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = x.new_zeros(4, 1, self.hidden)
        weights: list[torch.Tensor] = list(self.parameters())
        return torch.lstm(x, (start, start), weights, True, 2, self.dropout, self.training, True, True)[0]


class RecurrentEncoder(nn.Module):
    """Makes m vectors (m, e): an MLP of the states of a bidirectional LSTM of two layers with ``hidden`` units each
    way, which reads m trained embeddings (m, e)."""

    def __init__(self, length: int, width: int, hidden: int, dropout: float):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(length, width))
        self.lstm = BiLSTM(width, hidden, dropout)
        self.mlp = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))

    def forward(self) -> torch.Tensor:
        # In the parameters' own precision: it is what gets stored, and not every CPU has a bfloat16 LSTM.
        with without_autocast(self.embedding):
            return self.mlp(self.lstm(self.embedding[None]))[0]


def embedding(host: Host) -> nn.Module:
    """The word embedding of the stack that takes the prompt; its output is what a prompt stands beside."""
    return _input_module(host.anatomy).get_input_embeddings()


def attach(host: Host, child: nn.Module, length: int, position: Position = "front") -> nn.Module:
    """Put the ``length`` vectors that ``child(embedded) -> (B, m, e)`` gives into every input. A child with
    ``reads_mask`` is called with the input's mask too, (B, n) or None.

    ``position``: ``"front"`` of the input, or ``"after_first"`` token (encoders only), which leaves [CLS] in front,
    where pooling heads look.

    Raises UnsupportedError for ``"after_first"`` on other than an encoder, and, when the model is called, for an input
    that leaves too few positions or a mask that is not (B, n).
    """
    parts = host.anatomy
    encoder_only = parts.stacks == ("encoder",)
    if position == "after_first" and not encoder_only:
        raise UnsupportedError(
            f'position="after_first" keeps the token that an encoder pools in front; {type(host.model).__name__} is no '
            'encoder. Use position="front".'
        )
    module = _input_module(parts)
    seam = Seam(
        length=length,
        at=1 if position == "after_first" else 0,
        names=names(module),
        first_position=parts.first_position,
        max_length=parts.max_length,
    )
    host.add(module, "prompt", child)
    host.hook(module, _insert, child, seam, before=True)
    if len(parts.stacks) > 1:
        decoder = parts.stack_inputs("decoder")
        host.hook(decoder, _extend_cross_mask, length, names(decoder), before=True)
    elif not (encoder_only and seam.at == 0 and type(host.model).__name__.endswith(_POOLING_HEADS)):
        host.hook(module, _take_out, seam)
    return child


def _input_module(parts: Anatomy) -> PreTrainedModel:
    return parts.stack_inputs(parts.stacks[0])


def _put(x: torch.Tensor, piece: torch.Tensor, at: int) -> torch.Tensor:
    return torch.cat([x[:, :at], piece.to(x.dtype), x[:, at:]], dim=1)


def _insert(child: nn.Module, seam: Seam, module: PreTrainedModel, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    call = by_name(seam.names, args, kwargs)
    mask, positions, types = (call.get(k) for k in ("attention_mask", "position_ids", "token_type_ids"))
    if mask is not None:
        if mask.dim() != 2:
            raise UnsupportedError(
                f"a prompt needs an attention mask of shape (batch, tokens), and got {tuple(mask.shape)}; "
                "static caches and ready-made masks do not go with prompts"
            )
        call["attention_mask"] = _put(mask, mask.new_ones(mask.shape[0], seam.length), seam.at)
    past = past_length(call)
    if past > 0:
        # The prompt is in the cache, and the caller's positions do not count it.
        if positions is not None:
            call["position_ids"] = positions + seam.length
        return (), call
    embedded = call.get("inputs_embeds")
    if embedded is None:
        embedded = module.get_input_embeddings()(call["input_ids"])
    check_length(embedded.shape[1], seam.length, seam.max_length)
    vectors = child(embedded, mask) if getattr(child, "reads_mask", False) else child(embedded)
    call["input_ids"] = None
    call["inputs_embeds"] = _put(embedded, vectors, seam.at)
    if positions is not None:
        first = seam.first_position + seam.at
        new = torch.arange(first, first + seam.length, device=positions.device).expand(positions.shape[0], -1)
        call["position_ids"] = torch.cat([positions[:, : seam.at], new, positions[:, seam.at :] + seam.length], dim=1)
    if types is not None:
        call["token_type_ids"] = _put(types, types.new_zeros(types.shape[0], seam.length), seam.at)
    return (), call


def _take_out(seam: Seam, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    hidden = output[0]
    if past_length(by_name(seam.names, args, kwargs)) > hidden.shape[1]:
        # A later step of generation: the prompt came with an earlier one.
        return None
    return with_state(output, torch.cat([hidden[:, : seam.at], hidden[:, seam.at + seam.length :]], dim=1))


def _extend_cross_mask(
    length: int, order: tuple[str, ...], module: nn.Module, args: Args, kwargs: Kwargs
) -> tuple[Args, Kwargs]:
    call = by_name(order, args, kwargs)
    states, mask = call.get("encoder_hidden_states"), call.get("encoder_attention_mask")
    if states is not None and mask is not None and states.shape[1] == mask.shape[1] + length:
        call["encoder_attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], length), mask], dim=1)
    return (), call
