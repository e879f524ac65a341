"""The seam inside a text: vectors at places that depend on where a row's texts end. For encoders.

A row ``[CLS] a [SEP]`` or ``[CLS] a [SEP] b [SEP]`` gets vectors in three groups: behind [CLS], behind the first text
and behind the last one. The groups stand before the [SEP] that ends the text, and with a single text the second comes
before the third.
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
        """For every vector the index of the token before which it goes, (B, m), from ids and mask (B, n). A row without
        a [SEP] counts as ended by its last token."""
        place = torch.arange(ids.shape[1], device=ids.device)
        real = mask.bool()
        end = (place * real).amax(dim=1) + 1
        is_end = (ids == self.sep) & real
        start = torch.where(real, place, ids.shape[1]).amin(dim=1) + 1
        first = torch.minimum(torch.where(is_end, place, ids.shape[1]).amin(dim=1), end)
        last = torch.where(is_end.any(dim=1), (place * is_end).amax(dim=1), end)
        groups = ((start, self.before), (first, self.between), (last, self.after))
        columns = [torch.maximum(spot, start)[:, None].expand(-1, count) for spot, count in groups]
        return torch.cat(columns, dim=1)


class Layout:
    """Where n tokens and m vectors stand in rows of n + m: ``text`` (B, n) and ``vectors`` (B, m)."""

    def __init__(self, spots: torch.Tensor, tokens: int):
        place = torch.arange(tokens, device=spots.device)
        self.spots = spots
        self.text = place + (spots[:, :, None] <= place).sum(dim=1)
        self.vectors = spots + torch.arange(spots.shape[1], device=spots.device)

    def merge(self, text: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """(B, n + m, ...) of (B, n, ...) and (B, m, ...)."""
        both = torch.cat([text, vectors.to(text.dtype)], dim=1)
        index = torch.cat([self.text, self.vectors], dim=1)
        return torch.zeros_like(both).scatter(1, _like(index, both), both)

    def at(self, index: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
        """What stands at these places (B, k) of (B, n + m, ...)."""
        return merged.gather(1, _like(index, merged))


def _like(index: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return index.reshape(*index.shape, *(1,) * (tensor.dim() - 2)).expand(-1, -1, *tensor.shape[2:])


def attach(host: Host, child: nn.Module, template: Template, only: int | None = None) -> nn.Module:
    """Put the vectors that ``child(embedded (B, n, e)) -> (B, m, e)`` gives into every input of an encoder. What leaves
    the encoder is the text's hidden states (B, n, d), or, with ``only``, that of this one of the vectors (B, 1, d).

    Raises UnsupportedError on other than an encoder, and, when the model is called, for an input without ids, one that
    leaves too few positions, or a mask that is not (B, n).
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
    embedded = module.get_input_embeddings()(ids)
    call["input_ids"] = None
    call["inputs_embeds"] = layout.merge(embedded, child(embedded))
    call["attention_mask"] = layout.merge(mask, mask.new_ones(layout.vectors.shape))
    # A vector has the segment and the place of the token before which it goes.
    at = layout.spots.clamp(max=ids.shape[1] - 1)
    if types is not None:
        call["token_type_ids"] = layout.merge(types, types.gather(1, at))
    if positions is not None:
        positions = positions.expand(ids.shape[0], -1)
        steps = layout.vectors - layout.spots
        shift = layout.text - torch.arange(ids.shape[1], device=ids.device)
        call["position_ids"] = layout.merge(positions + shift, positions.gather(1, at) + steps)
    return (), call


def _take_out(child: Any, only: int | None, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    layout, child.layout = child.layout, None
    index = layout.text if only is None else layout.vectors[:, only : only + 1]
    return with_state(output, layout.at(index, output[0]))
