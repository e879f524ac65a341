"""The seam at the input: trained vectors among the embeddings of the text.

:func:`attach` hooks the module of the first stack that takes ``inputs_embeds``: the base model of encoders and
decoders, the encoder of encoder-decoder models. The prompt's positions are part of every layer and of the cache, and
are taken out of the last hidden state, so that a head's logits and labels stand where they stood without a prompt.
Encoders whose task head pools the first position are the exception: there the head pools the first prompt vector, as in
HF peft.

Shapes: b rows, t tokens, m prompt vectors, e the width of the embedding, d the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from peftlib.anatomy import Anatomy
from peftlib.errors import UnsupportedError
from peftlib.mechanisms import template
from peftlib.mechanisms.call import Handed
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.outputs import Args, Kwargs, cut_keys, cut_states, state_of
from peftlib.mechanisms.positions import by_name, check_length, count_from_text, names, past_length, refuse_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Position = Literal["front", "after_first"]

_POOLING_HEADS = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")


@dataclass(frozen=True)
class Seam:
    """``length`` m, the index ``at`` of the first prompt vector, the stack's parameter names in order, its first
    position id and the longest input it has positions for."""

    length: int
    at: int
    names: tuple[str, ...]
    first_position: int
    max_length: int | None


def embedding(host: Host) -> nn.Embedding:
    """The word embedding of the stack that takes the prompt; prompt vectors stand beside its output."""
    return cast("nn.Embedding", _input_module(host.anatomy).get_input_embeddings())


@torch.no_grad()
def sample(embedding: nn.Embedding, length: int, common: int) -> torch.Tensor:
    """Embeddings (m, e) of ``length`` tokens drawn from the first ``common``, in float32; none comes twice while there
    are others."""
    ids = torch.randperm(min(common, embedding.weight.shape[0]))  # (common)
    ids = ids.repeat(-(-length // len(ids)))[:length]  # (m)
    return embedding(ids).float().clone()  # (m, e)


def attach(host: Host, child: nn.Module, length: int, position: Position = "front") -> nn.Module:
    """Put the ``length`` vectors that ``child(x) -> (b, m, e)`` gives for the embedded input x (b, t, e) into it. A
    child with ``reads_mask`` is called with the input's mask too, (b, t) or None.

    ``position``: ``"front"`` of the input, or ``"after_first"`` token (encoders only), which leaves [CLS] in front,
    where pooling heads look. A decoder with a sliding window has the vectors behind a row's padding, which else would
    move them out of the text's window.

    Hidden states and attentions that a model is asked for have the text's positions alone.

    Raises UnsupportedError for ``"after_first"`` on other than an encoder, and, when the model is called, for an input
    that leaves too few positions, a mask that is not (b, t), several texts in a row, or a cache that ``generate()`` is
    to go on with.
    """
    parts = host.anatomy
    encoder_only = parts.stacks == ("encoder",)
    if position == "after_first" and not encoder_only:
        raise UnsupportedError(
            f'position="after_first" keeps the token that an encoder pools in front; {type(host.model).__name__} is no '
            'encoder. Use position="front".'
        )
    if parts.stacks == ("decoder",) and parts.sliding_window:
        return template.attach(host, child, template.Template(length, 0, 0))
    module = _input_module(parts)
    seam = Seam(
        length=length,
        at=1 if position == "after_first" else 0,
        names=names(module),
        first_position=parts.first_position,
        max_length=parts.max_length,
    )
    inserted = Handed()
    count_from_text(host)
    host.add(module, "prompt", child)
    host.hook(module, _insert, seam, inserted, before=True)
    pools = encoder_only and seam.at == 0 and type(host.model).__name__.endswith(_POOLING_HEADS)
    host.hook(module, _take_out, seam, inserted, pools or len(parts.stacks) > 1)
    if len(parts.stacks) > 1:
        decoder = parts.stack_inputs("decoder")
        host.hook(decoder, _extend_cross_mask, length, names(decoder), before=True)
        host.hook(decoder, _cut_cross, seam)
    elif parts.generates:
        host.around_generate(refuse_filled)
    return child


def _input_module(parts: Anatomy) -> PreTrainedModel:
    return parts.stack_inputs(parts.stacks[0])


def _put(x: torch.Tensor, piece: torch.Tensor, at: int) -> torch.Tensor:
    """(b, t, ...) and (b, m, ...) -> (b, t + m, ...), the piece from index ``at`` on."""
    return torch.cat([x[:, :at], piece.to(x.dtype), x[:, at:]], dim=1)


def _cut(seam: Seam, x: torch.Tensor, dim: int) -> torch.Tensor:
    """x without the prompt's positions along a dimension, (..., t + m, ...) -> (..., t, ...)."""
    behind = seam.at + seam.length
    return torch.cat([x.narrow(dim, 0, seam.at), x.narrow(dim, behind, x.shape[dim] - behind)], dim=dim)


def _insert(seam: Seam, inserted: Handed, module: Any, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    call, child = by_name(seam.names, args, kwargs), module.prompt
    refuse_packed(call, "a prompt stands before one text a row")
    mask, positions, types = (call.get(k) for k in ("attention_mask", "position_ids", "token_type_ids"))
    if mask is not None:
        if mask.dim() != 2:
            raise UnsupportedError(
                f"a prompt needs an attention mask of shape (batch, tokens), and got {tuple(mask.shape)}; "
                "static caches and ready-made masks do not go with prompts"
            )
        call["attention_mask"] = _put(mask, mask.new_ones(mask.shape[0], seam.length), seam.at)  # (b, t + m)
    past = past_length(call)
    inserted.value = not past > 0
    if past > 0:
        # The prompt is in the cache, and the caller's positions do not count it.
        if positions is not None:
            call["position_ids"] = positions + seam.length
        return (), call
    x = call.get("inputs_embeds")  # (b, t, e)
    if x is None:
        x = module.get_input_embeddings()(call["input_ids"])  # (b, t) -> (b, t, e)
    check_length(x.shape[1], seam.length, seam.max_length)
    P = child(x, mask) if getattr(child, "reads_mask", False) else child(x)  # (b, m, e)
    call["input_ids"] = None
    call["inputs_embeds"] = _put(x, P, seam.at)  # (b, t + m, e)
    if positions is not None:
        first = seam.first_position + seam.at
        new = torch.arange(first, first + seam.length, device=positions.device).expand(positions.shape[0], -1)  # (b, m)
        before, behind = positions[:, : seam.at], positions[:, seam.at :] + seam.length
        call["position_ids"] = torch.cat([before, new, behind], dim=1)  # (b, t + m)
    if types is not None:
        call["token_type_ids"] = _put(types, types.new_zeros(types.shape[0], seam.length), seam.at)  # (b, t + m)
    return (), call


def _take_out(
    seam: Seam, inserted: Handed, keeps_last: bool, module: nn.Module, args: Args, kwargs: Kwargs, output: Any
) -> Any:
    cut = partial(_cut, seam)
    if not inserted.take():
        return cut_keys(output, cut)  # a later step of generation: the prompt came with an earlier one
    return cut_states(output, cut, None if keeps_last else cut(state_of(output), 1))  # (b, t + m, d) -> (b, t, d)


def _cut_cross(seam: Seam, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    return cut_keys(output, partial(_cut, seam), "cross_attentions")


def refuse_filled(generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In the place of ``generate(...)`` where a cache holds more positions than its text has tokens. Raises
    UnsupportedError for a cache of an earlier turn, by whose length transformers would cut the text."""
    if past_length(kwargs) > 0:
        raise UnsupportedError(
            "a prompt's positions are in the cache, and generate() takes its length for that of the text; give the "
            "whole text without past_key_values"
        )
    return generate(*args, **kwargs)


def _extend_cross_mask(
    length: int, order: tuple[str, ...], module: nn.Module, args: Args, kwargs: Kwargs
) -> tuple[Args, Kwargs]:
    call = by_name(order, args, kwargs)
    states, mask = call.get("encoder_hidden_states"), call.get("encoder_attention_mask")
    if states is not None and mask is not None and states.shape[1] == mask.shape[1] + length:
        mask = torch.cat([mask.new_ones(mask.shape[0], length), mask], dim=1)  # (b, t) -> (b, m + t)
        call["encoder_attention_mask"] = mask
    return (), call
