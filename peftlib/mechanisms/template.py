"""The seam inside a text: vectors at places that depend on where a row's texts end. For encoders and decoders.

A row ``[CLS] a [SEP]`` or ``[CLS] a [SEP] b [SEP]`` of an encoder gets vectors in three groups: behind [CLS], behind
the first text and behind the last one. The second and the third group stand before the [SEP] that ends their text; with
a single text the second comes before the third.

A decoder's row is a text and its answer. The first group stands before the text, the others behind it, and the last
vector's state answers in the place of the state at the text's last token, where heads and labels look for it. Where the
text ends is seen from the labels: the answer is what has some. A row without labels is text as a whole, and in
``generate()`` what it is given is; a row that has labels from its start on has all vectors in front.

Shapes: b rows, t tokens, m vectors, e the width of the embedding, d the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftlib.errors import UnsupportedError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.outputs import Args, Kwargs, with_state
from peftlib.mechanisms.positions import by_name, check_length, names, past_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Template:
    """How many vectors stand ``before`` the first text, ``between`` the first and the second, and ``after`` the last;
    ``sep`` is the id of the token that ends an encoder's text."""

    before: int
    between: int
    after: int
    sep: int | None = None

    @property
    def length(self) -> int:
        return self.before + self.between + self.after

    def around(self, mask: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """For every vector the index of the token before which it goes, (b, m), in rows that ``mask`` (b, t) says and
        whose text ends before the token ``ends`` (b)."""
        place = torch.arange(mask.shape[1], device=mask.device)  # (t)
        start = torch.where(mask.bool(), place, mask.shape[1]).amin(dim=1)  # (b)
        groups = ((start, self.before), (torch.maximum(ends, start), self.between + self.after))
        return torch.cat([spot[:, None].expand(-1, count) for spot, count in groups], dim=1)  # (b, m)

    def spots(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """For every vector the index of the token before which it goes, (b, m), from ids and mask (b, t). A row without
        a [SEP] ends with its last token."""
        place = torch.arange(ids.shape[1], device=ids.device)  # (t)
        real = mask.bool()  # (b, t)
        end = (place * real).amax(dim=1) + 1  # (b)
        is_end = (ids == self.sep) & real  # (b, t)
        start = torch.where(real, place, ids.shape[1]).amin(dim=1) + 1  # (b)
        first = torch.minimum(torch.where(is_end, place, ids.shape[1]).amin(dim=1), end)  # (b)
        last = torch.where(is_end.any(dim=1), (place * is_end).amax(dim=1), end)  # (b)
        groups = ((start, self.before), (first, self.between), (last, self.after))
        columns = [torch.maximum(spot, start)[:, None].expand(-1, count) for spot, count in groups]
        return torch.cat(columns, dim=1)  # (b, m)


class Layout:
    """The places of t tokens and m vectors in rows of t + m: ``text`` (b, t) and ``vectors`` (b, m)."""

    def __init__(self, spots: torch.Tensor, tokens: int):
        place = torch.arange(tokens, device=spots.device)
        self.spots = spots
        self.text = place + (spots[:, :, None] <= place).sum(dim=1)
        self.vectors = spots + torch.arange(spots.shape[1], device=spots.device)

    def merge(self, text: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """(b, t, ...) and (b, m, ...) -> (b, t + m, ...)."""
        both = torch.cat([text, vectors.to(text.dtype)], dim=1)  # (b, t + m, ...)
        index = torch.cat([self.text, self.vectors], dim=1)  # (b, t + m)
        return torch.zeros_like(both).scatter(1, _like(index, both), both)  # (b, t + m, ...)

    def at(self, index: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
        """The entries at these places (b, k) of (b, t + m, ...), (b, k, ...)."""
        return merged.gather(1, _like(index, merged))


def _like(index: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """An index (b, k) for gather and scatter on (b, n, ...): (b, k, ...)."""
    return index.reshape(*index.shape, *(1,) * (tensor.dim() - 2)).expand(-1, -1, *tensor.shape[2:])


def attach(host: Host, child: nn.Module, template: Template, only: int | None = None) -> nn.Module:
    """Put the vectors that ``child(x) -> (b, m, e)`` gives for the embedded input x (b, t, e) of an encoder or decoder
    into it. The stack then gives the text's hidden states (b, t, d) or, with ``only``, that of this one of an encoder's
    vectors, (b, 1, d).

    Raises UnsupportedError on a model of two stacks, and, when the model is called, for an input without ids, one that
    leaves too few positions, or a mask that is not (b, t).
    """
    parts = host.anatomy
    if len(parts.stacks) > 1:
        raise UnsupportedError(
            f"vectors inside the text need a backbone of one stack; {type(host.model).__name__} has an encoder and a "
            "decoder. Put all of them in front."
        )
    (stack,) = parts.stacks
    module = parts.stack_inputs(stack)
    child.layout = None  # type: ignore[assignment]  # what one hook leaves for the other, no part of the model
    host.add(module, "prompt", child)
    if stack == "encoder":
        host.hook(module, _insert, child, template, names(module), parts.max_length, before=True)
        host.hook(module, _take_out, child, only)
        return child
    text = Text()
    host.hook(host.model, _see_labels, text, names(host.model), before=True)
    host.hook(module, _insert_around, child, template, text, names(module), parts.max_length, before=True)
    host.hook(module, _take_out_around, child, text)
    if parts.generates:
        host.around_generate(_generate, text)
    return child


class Text:
    """Where the text of a decoder's rows ends: ``ends`` (b), from the labels of the present forward; ``given``: how
    many tokens ``generate()`` was given. ``prefilled``: the layout whose keys and values the cache holds."""

    ends: torch.Tensor | None = None
    given: int | None = None
    prefilled: Layout | None = None

    def end(self, mask: torch.Tensor) -> torch.Tensor:
        """The index of the first token behind the text of each row, (b)."""
        place = torch.arange(mask.shape[1], device=mask.device)  # (t)
        end = (place * mask.bool()).amax(dim=1) + 1  # (b)
        if self.ends is not None:
            return torch.minimum(end, self.ends)
        return end if self.given is None else end.clamp(max=self.given)


def _see_labels(text: Text, order: tuple[str, ...], model: nn.Module, args: Args, kwargs: Kwargs) -> None:
    labels = by_name(order, args, kwargs).get("labels")
    text.ends = None
    if labels is not None and labels.dim() == 2:
        place = torch.arange(labels.shape[1], device=labels.device)  # (t)
        text.ends = torch.where(labels != -100, place, labels.shape[1]).amin(dim=1)  # (b)


def _generate(text: Text, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In the place of ``generate(...)``."""
    given = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    text.given = None if given is None else given.shape[1]
    try:
        return generate(*args, **kwargs)
    finally:
        text.given = text.prefilled = None


def _insert_around(
    child: Any,
    template: Template,
    text: Text,
    order: tuple[str, ...],
    limit: int | None,
    module: PreTrainedModel,
    args: Args,
    kwargs: Kwargs,
) -> tuple[Args, Kwargs]:
    call = by_name(order, args, kwargs)
    past, mask, positions = past_length(call), call.get("attention_mask"), call.get("position_ids")
    if past > 0:
        layout = text.prefilled
        if layout is None:
            raise UnsupportedError("the cache was filled before the vectors were attached; begin with an empty one")
        t = layout.text.shape[1]
        if mask is not None:
            whole = layout.merge(mask[:, :t], mask.new_ones(layout.vectors.shape))  # (b, t + m)
            call["attention_mask"] = torch.cat([whole, mask[:, t:]], dim=1)
        if positions is not None:
            call["position_ids"] = positions + template.length
        return (), call
    layout = _laid_out(child, call, module, template, limit, lambda ids, mask: template.around(mask, text.end(mask)))
    text.prefilled = layout
    if positions is not None:
        # A vector goes on from the token before it; those in front, and all where there is no text, begin with the row.
        behind = (layout.spots > layout.spots[:, :1]).long()  # (b, m)
        call["position_ids"] = _positions(layout, positions, behind)
    return (), call


def _take_out_around(child: Any, text: Text, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    layout, child.layout = child.layout, None
    if layout is None:
        return None  # a later step of generation
    h = layout.at(layout.text, output[0])  # (b, t + m, d) -> (b, t, d)
    answer = layout.at(layout.vectors[:, -1:], output[0])  # (b, 1, d)
    last = layout.spots[:, -1:] - 1  # (b, 1), the text's last token
    place = torch.arange(h.shape[1], device=h.device)  # (t)
    has_text = layout.spots[:, -1:] > layout.spots[:, :1]  # (b, 1)
    return with_state(output, torch.where(((place == last) & has_text)[..., None], answer, h))  # (b, t, d)


def _insert(
    child: Any,
    template: Template,
    order: tuple[str, ...],
    limit: int | None,
    module: PreTrainedModel,
    args: Args,
    kwargs: Kwargs,
) -> tuple[Args, Kwargs]:
    call = by_name(order, args, kwargs)
    positions, types = call.get("position_ids"), call.get("token_type_ids")
    layout = _laid_out(child, call, module, template, limit, template.spots)
    # A vector has the segment and the place of the token before which it goes.
    if types is not None:
        at = layout.spots.clamp(max=layout.text.shape[1] - 1)  # (b, m)
        call["token_type_ids"] = layout.merge(types, types.gather(1, at))  # (b, t + m)
    if positions is not None:
        call["position_ids"] = _positions(layout, positions, torch.zeros_like(layout.spots))
    return (), call


def _positions(layout: Layout, positions: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
    """The positions (b, t + m) of tokens, at ``positions`` (b or 1, t) without vectors, and of vectors: each goes on
    from the token before it where ``behind`` (b, m) is 1, and where it is 0 takes the place of the one after it."""
    rows, tokens = layout.text.shape
    positions = positions.expand(rows, -1)  # (b, t)
    at = (layout.spots - behind).clamp(max=tokens - 1)  # (b, m)
    own = positions.gather(1, at) + behind + layout.vectors - layout.spots  # (b, m)
    shift = layout.text - torch.arange(tokens, device=at.device)  # (b, t)
    return layout.merge(positions + shift, own)


def _laid_out(
    child: Any,
    call: Kwargs,
    module: PreTrainedModel,
    template: Template,
    limit: int | None,
    spots: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Layout:
    """The layout of a call, whose ids and mask become embeddings and a mask with the vectors among them; ``spots``
    gives the vectors' places from ids and mask."""
    ids, mask = call.get("input_ids"), call.get("attention_mask")
    if ids is None:
        raise UnsupportedError(
            "where the texts end is seen from the tokens' ids, and the model was given embeddings without ids; call it "
            "with input_ids"
        )
    if mask is None:
        mask = torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise UnsupportedError(
            f"vectors inside the text need an attention mask of shape (batch, tokens), and got {tuple(mask.shape)}"
        )
    check_length(ids.shape[1], template.length, limit)
    layout = child.layout = Layout(spots(ids, mask), ids.shape[1])
    x = module.get_input_embeddings()(ids)  # (b, t) -> (b, t, e)
    call["input_ids"] = None
    call["inputs_embeds"] = layout.merge(x, child(x))  # (b, t + m, e)
    call["attention_mask"] = layout.merge(mask, mask.new_ones(layout.vectors.shape))  # (b, t + m)
    return layout


def _take_out(child: Any, only: int | None, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    layout, child.layout = child.layout, None
    index = layout.text if only is None else layout.vectors[:, only : only + 1]
    return with_state(output, layout.at(index, output[0]))  # (b, t + m, d) -> (b, t, d) or (b, 1, d)
