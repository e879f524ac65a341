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
from typing import Any

import torch
from torch import nn

from peftlib.errors import UnsupportedError
from peftlib.mechanisms.call import Handed, Local
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.outputs import Args, Kwargs, cut_keys, cut_states, state_of
from peftlib.mechanisms.positions import by_name, check_length, names, past_length, refuse_packed


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

    def of_text(self, merged: torch.Tensor, dim: int) -> torch.Tensor:
        """What is the text's along a dimension that begins with these t + m places, (b, ..., k, ...)."""
        whole = self.text.shape[1] + self.vectors.shape[1]  # t + m
        front, behind = merged.transpose(1, dim).split([whole, merged.shape[dim] - whole], dim=1)
        return torch.cat([self.at(self.text, front), behind], dim=1).transpose(1, dim)


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
    module, laid = parts.stack_inputs(stack), Handed()
    host.add(module, "prompt", child)
    if stack == "encoder":
        host.hook(module, _insert, laid, template, names(module), parts.max_length, before=True)
        host.hook(module, _take_out, laid, only)
        return child
    text = Text()
    host.hook(host.model, _see_labels, text, names(host.model), before=True)
    host.hook(module, _insert_around, laid, template, text, names(module), parts.max_length, before=True)
    host.hook(module, _take_out_around, laid, names(module))
    if parts.generates:
        host.around_generate(_generate, text)
    return child


class Text(Local):
    """Where the text of a decoder's rows ends: ``ends`` (b), from the labels of the present forward; ``given``: how
    many tokens ``generate()`` was given."""

    def __init__(self) -> None:
        self.ends: torch.Tensor | None = None
        self.given: int | None = None

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
    if past_length(kwargs) > 0:
        raise UnsupportedError(
            "the vectors' positions are in the cache, among those of the text of an earlier turn; give the whole text "
            "without past_key_values"
        )
    named = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    given = next((x for x in (*args[:1], *named) if x is not None), None)
    text.given = None if given is None else given.shape[1]
    try:
        return generate(*args, **kwargs)
    finally:
        text.given = None


def _insert_around(
    laid: Handed,
    template: Template,
    text: Text,
    order: tuple[str, ...],
    limit: int | None,
    module: Any,
    args: Args,
    kwargs: Kwargs,
) -> tuple[Args, Kwargs]:
    call = by_name(order, args, kwargs)
    refuse_packed(call, "the vectors stand around one text a row")
    past, mask, positions = past_length(call), call.get("attention_mask"), call.get("position_ids")
    if past > 0:
        if mask is not None:
            layout = _in_cache(call["past_key_values"], len(mask))
            t = layout.text.shape[1]
            whole = layout.merge(mask[:, :t], mask.new_ones(layout.vectors.shape))  # (b, t + m)
            call["attention_mask"] = torch.cat([whole, mask[:, t:]], dim=1)
        if positions is not None:
            call["position_ids"] = positions + template.length
        laid.value = None
        return (), call
    tokens = (call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]).shape[1]
    if text.given is not None and tokens < text.given and text.ends is None:
        raise UnsupportedError(
            f"vectors stand behind a text of {text.given} tokens, and the model got its first {tokens} alone; generate "
            "without prefill_chunk_size"
        )
    layout = _laid_out(laid, call, module, template, limit, lambda ids, mask: template.around(mask, text.end(mask)))
    if (cache := call.get("past_key_values")) is not None:
        cache.peftlib_layout = layout
    if positions is not None:
        # A vector goes on from the token before it; those in front, and all where there is no text, begin with the row.
        behind = (layout.spots > layout.spots[:, :1]).long()  # (b, m)
        call["position_ids"] = _positions(layout, positions, behind)
    return (), call


def _in_cache(cache: Any, rows: int) -> Layout:
    """The layout whose keys and values a cache holds, for as many rows as it has now."""
    layout = getattr(cache, "peftlib_layout", None)
    if layout is None or rows % len(layout.spots):
        raise UnsupportedError(
            "the cache was filled without the vectors, or has other rows than it had; begin with an empty one"
        )
    if rows == len(layout.spots):
        return layout
    return Layout(layout.spots.repeat_interleave(rows // len(layout.spots), dim=0), layout.text.shape[1])


def _take_out_around(
    laid: Handed, order: tuple[str, ...], module: nn.Module, args: Args, kwargs: Kwargs, output: Any
) -> Any:
    layout = laid.take()
    if layout is None:  # a later step of generation
        cache = by_name(order, args, kwargs)["past_key_values"]
        rows = len(state_of(output))
        return cut_keys(output, lambda x, dim: _in_cache(cache, rows).of_text(x, dim))
    if (cache := getattr(output, "past_key_values", None)) is not None:
        cache.peftlib_layout = layout  # the stack has made it itself
    h = layout.of_text(output[0], 1)  # (b, t + m, d) -> (b, t, d)
    answer = layout.at(layout.vectors[:, -1:], output[0])  # (b, 1, d)
    last = layout.spots[:, -1:] - 1  # (b, 1), the text's last token
    place = torch.arange(h.shape[1], device=h.device)  # (t)
    has_text = layout.spots[:, -1:] > layout.spots[:, :1]  # (b, 1)
    h = torch.where(((place == last) & has_text)[..., None], answer, h)  # (b, t, d)
    return cut_states(output, layout.of_text, h)


def _insert(
    laid: Handed,
    template: Template,
    order: tuple[str, ...],
    limit: int | None,
    module: Any,
    args: Args,
    kwargs: Kwargs,
) -> tuple[Args, Kwargs]:
    call = by_name(order, args, kwargs)
    positions, types = call.get("position_ids"), call.get("token_type_ids")
    layout = _laid_out(laid, call, module, template, limit, template.spots)
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
    laid: Handed,
    call: Kwargs,
    module: Any,
    template: Template,
    limit: int | None,
    spots: Callable[[Any, torch.Tensor], torch.Tensor],
) -> Layout:
    """The layout of a call, whose ids and mask become embeddings and a mask with the vectors among them; ``spots``
    gives the vectors' places from ids and mask."""
    child, ids, x, given = module.prompt, call.get("input_ids"), call.get("inputs_embeds"), call.get("attention_mask")
    if ids is None and template.sep is not None:
        raise UnsupportedError(
            "where the texts end is seen from the tokens' ids, and the model was given embeddings without ids; call it "
            "with input_ids"
        )
    if x is None:
        x = module.get_input_embeddings()(ids)  # (b, t) -> (b, t, e)
    mask = torch.ones(x.shape[:2], dtype=torch.long, device=x.device) if given is None else given  # (b, t)
    if mask.shape != x.shape[:2]:
        raise UnsupportedError(
            f"vectors inside the text need an attention mask of shape (batch, tokens), and got {tuple(mask.shape)}; "
            "static caches and ready-made masks do not go with them"
        )
    check_length(x.shape[1], template.length, limit)
    layout = laid.value = Layout(spots(ids, mask), x.shape[1])
    P = child(x, given) if getattr(child, "reads_mask", False) else child(x)  # (b, m, e)
    call["input_ids"] = None
    call["inputs_embeds"] = layout.merge(x, P)  # (b, t + m, e)
    call["attention_mask"] = layout.merge(mask, mask.new_ones(layout.vectors.shape))  # (b, t + m)
    return layout


def _take_out(laid: Handed, only: int | None, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    layout = laid.take()
    index = layout.text if only is None else layout.vectors[:, only : only + 1]
    # (b, t + m, d) -> (b, t, d) or (b, 1, d)
    return cut_states(output, layout.of_text, layout.at(index, output[0]))
