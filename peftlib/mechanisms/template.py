"""The seam inside a text: vectors at places that depend on where a row's texts end. For encoders.

A row ``[CLS] a [SEP]`` or ``[CLS] a [SEP] b [SEP]`` gets vectors in three groups: behind [CLS], behind the first text
and behind the last one. The second and the third group stand before the [SEP] that ends their text; with a single text
the second comes before the third.

Shapes: b rows, t tokens, m vectors, e the width of the embedding, d the hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftlib.errors import UnsupportedError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.outputs import Args, Kwargs, with_state
from peftlib.mechanisms.positions import by_name, check_length, names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Template:
    """How many vectors stand ``before`` the first text, ``between`` the first and the second, and ``after`` the last;
    ``sep`` is the id of the token that ends a text."""

    before: int
    between: int
    after: int
    sep: int

    @property
    def length(self) -> int:
        return self.before + self.between + self.after

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
    """Put the vectors that ``child(x) -> (b, m, e)`` gives for the embedded input x (b, t, e) of an encoder into it.
    The encoder then gives the text's hidden states (b, t, d) or, with ``only``, that of this one of the vectors,
    (b, 1, d).

    Raises UnsupportedError on other than an encoder, and, when the model is called, for an input without ids, one that
    leaves too few positions, or a mask that is not (b, t).
    """
    parts = host.anatomy
    if parts.stacks != ("encoder",):
        raise UnsupportedError(
            f"vectors inside the text need a backbone that reads in both directions; {type(host.model).__name__} is no "
            "encoder. Put all of them in front."
        )
    module = parts.stack_inputs("encoder")
    child.layout = None  # type: ignore[assignment]  # what one hook leaves for the other, no part of the model
    host.add(module, "prompt", child)
    host.hook(module, _insert, child, template, names(module), parts.max_length, before=True)
    host.hook(module, _take_out, child, only)
    return child


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
    ids, mask, positions, types = (
        call.get(k) for k in ("input_ids", "attention_mask", "position_ids", "token_type_ids")
    )
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
    layout = child.layout = Layout(template.spots(ids, mask), ids.shape[1])
    x = module.get_input_embeddings()(ids)  # (b, t) -> (b, t, e)
    call["input_ids"] = None
    call["inputs_embeds"] = layout.merge(x, child(x))  # (b, t + m, e)
    call["attention_mask"] = layout.merge(mask, mask.new_ones(layout.vectors.shape))  # (b, t + m)
    # A vector has the segment and the place of the token before which it goes.
    at = layout.spots.clamp(max=ids.shape[1] - 1)  # (b, m)
    if types is not None:
        call["token_type_ids"] = layout.merge(types, types.gather(1, at))  # (b, t + m)
    if positions is not None:
        positions = positions.expand(ids.shape[0], -1)  # (b, t)
        steps = layout.vectors - layout.spots  # (b, m)
        shift = layout.text - torch.arange(ids.shape[1], device=ids.device)  # (b, t)
        call["position_ids"] = layout.merge(positions + shift, positions.gather(1, at) + steps)  # (b, t + m)
    return (), call


def _take_out(child: Any, only: int | None, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    layout, child.layout = child.layout, None
    index = layout.text if only is None else layout.vectors[:, only : only + 1]
    return with_state(output, layout.at(index, output[0]))  # (b, t + m, d) -> (b, t, d) or (b, 1, d)
