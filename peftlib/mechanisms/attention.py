"""The seam at keys and values: one attention function for every family.

transformers looks its attention up by name. :func:`use` registers ours, which asks the children hung on the attention
module to change the inputs and then calls transformers' own sdpa function. Without children it is that function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from peftlib.errors import UnsupportedError
from peftlib.mechanisms.host import Host

NAME, WEIGHED = "peftlib", "peftlib_weighed"
"""The function, and the one that gives attention weights as well, in the place of transformers' eager attention."""
GIVEN = "peftlib_given"


@dataclass(frozen=True)
class Inputs:
    """What an attention function gets: query (B, H, q, p), key and value (B, H_kv, k, p), mask (B or 1, 1 or H, q, k)
    boolean (True attends) or additive, or None, position_bias (1 or B, H, q, k) or None; ``causal`` tells whether a
    mask of None means a causal one. ``finish`` is what is done to the output (B, q, H, p), if anything; ``added``
    tells how many keys in front are not the text's. ``given`` is
    what a hook handed to the layer under the keyword ``GIVEN``, which comes here also when gradient checkpointing runs
    the layer again without its hooks."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    position_bias: torch.Tensor | None
    causal: bool
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None
    given: Any = None
    added: int = 0

    def with_mask(self) -> Inputs:
        """The same with the causal mask that a mask of None stands for."""
        q = self.query.shape[2]
        if self.mask is not None or not self.causal or q == 1:
            return self
        # transformers leaves the mask out where queries and keys begin together; a static cache has empty keys behind.
        bias = None if self.position_bias is None else self.position_bias[..., :q]
        mask = torch.ones(q, q, dtype=torch.bool, device=self.key.device).tril()[None, None]  # (1, 1, q, q)
        return replace(self, key=self.key[:, :, :q], value=self.value[:, :, :q], mask=mask, position_bias=bias)

    def weights(self, scaling: float, dropout: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """The output (B, q, H, p), and the attention weights (B, H, q, k) that sdpa does not give."""
        text = self.with_mask()
        groups = text.query.shape[1] // text.key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (text.key, text.value))  # (B, H, k, p)
        scores = text.query @ key.mT * scaling  # (B, H, q, p) @ (B, H, p, k) -> (B, H, q, k)
        if text.position_bias is not None:
            scores = scores + text.position_bias  # (B, H, q, k)
        if text.mask is not None and text.mask.dtype == torch.bool:
            scores = scores.masked_fill(~text.mask, torch.finfo(scores.dtype).min)  # (B, H, q, k)
        elif text.mask is not None:
            scores = scores + text.mask  # (B, H, q, k)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)  # (B, H, q, k)
        return (F.dropout(weights, dropout) @ value).transpose(1, 2), weights  # (B, H, q, p) -> (B, q, H, p)

    def prepend(self, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None = None) -> Inputs:
        """The inputs with m more keys and values (B, H_kv, m, p) in front, which every query sees; where there is a
        position bias, with ``bias`` (1 or B, H, q, m) as theirs, or none."""
        m, text = key.shape[2], self.with_mask()
        mask, whole = text.mask, text.position_bias
        if mask is not None:
            seen = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
            mask = torch.cat([seen(*mask.shape[:-1], m), mask], dim=-1)
        if whole is not None:
            whole = torch.cat([whole.new_zeros(*whole.shape[:-1], m) if bias is None else bias, whole], dim=-1)
        return replace(
            self,
            key=torch.cat([key.to(self.key.dtype), text.key], dim=2),
            value=torch.cat([value.to(self.value.dtype), text.value], dim=2),
            mask=mask,
            position_bias=whole,
            added=self.added + m,
        )


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    weighed: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The registered function: children first, then transformers' sdpa attention. Attention weights, where the model is
    asked for them, are those of the text's keys (B, H, q, k): what a row lacks to one stands on keys of the children.

    Raises UnsupportedError for weights of a layer that gets some of the tokens alone."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    inputs = Inputs(query, key, value, attention_mask, position_bias, causal, given=kwargs.pop(GIVEN, None))
    for name in getattr(module, "peftlib_attention", ()):
        inputs = getattr(module, name)(inputs)
    if inputs.position_bias is not None:
        kwargs["position_bias"] = inputs.position_bias
    if inputs.query.shape[-1] != query.shape[-1] and kwargs.get("scaling") is None:
        kwargs["scaling"] = query.shape[-1] ** -0.5
    asked = kwargs.get("output_attentions", getattr(getattr(module, "config", None), "output_attentions", False))
    if asked and inputs.given is not None:
        raise UnsupportedError(
            "a layer gets some of the tokens alone, so there are no attention weights of all; call the model without "
            "output_attentions"
        )
    if asked or (weighed and inputs.given is None):
        scaling = kwargs.get("scaling")
        output, weights = inputs.weights(
            inputs.query.shape[-1] ** -0.5 if scaling is None else scaling, kwargs.get("dropout", 0.0)
        )
        weights = weights[..., inputs.added :]  # (B, H, q, added + k) -> (B, H, q, k)
        return output if inputs.finish is None else inputs.finish(output), weights
    output, _ = sdpa_attention_forward(
        module, inputs.query, inputs.key, inputs.value, inputs.mask, is_causal=is_causal, **kwargs
    )
    return output if inputs.finish is None else inputs.finish(output), None


AttentionInterface.register(NAME, attention)
AttentionInterface.register(WEIGHED, partial(attention, weighed=True))
for name in (NAME, WEIGHED):
    AttentionMaskInterface.register(name, sdpa_mask)


def use(host: Host, merged: bool = False) -> None:
    """Make the host's model call our attention function until the method leaves; ``merged``: also after a merge."""
    model = cast(PreTrainedModel, host.model)
    before = model.config._attn_implementation
    if before in (NAME, WEIGHED):
        return
    model.set_attn_implementation(WEIGHED if before == "eager" else NAME)
    host.on_remove(partial(model.set_attn_implementation, before), restores=merged)


def attach(host: Host, module: nn.Module, name: str, child: nn.Module) -> nn.Module:
    """Hang ``child(Inputs) -> Inputs`` on an attention module."""
    use(host)
    host.add(module, name, child)
    _ask(module, name)
    host.on_remove(partial(_forget, module, name))
    return child


def keep_heads_of_bias(host: Host, module: nn.Module, name: str, heads: torch.Tensor) -> None:
    """Let an attention module that has lost heads see the rows of its position bias that belong to those left, and
    hand the whole bias on. A merge leaves this in place: the module does not compute without it."""
    use(host, merged=True)
    module.add_module(name, _HeadsOfBias(heads))
    _ask(module, name)
    host.on_remove(partial(_take_out, module, name), restores=True)


class _HeadsOfBias(nn.Module):
    heads: torch.Tensor

    def __init__(self, heads: torch.Tensor):
        super().__init__()
        # Not in the state dict, so that a merged model's has the names of a plain one's.
        self.register_buffer("heads", heads, persistent=False)

    def forward(self, inputs: Inputs) -> Inputs:
        assert inputs.position_bias is not None
        return replace(inputs, position_bias=inputs.position_bias.index_select(1, self.heads))


def _take_out(module: nn.Module, name: str) -> None:
    _forget(module, name)
    delattr(module, name)


def _ask(module: Any, name: str) -> None:
    """Let the attention function ask this child of the module, after those that it asks already."""
    module.peftlib_attention = (*getattr(module, "peftlib_attention", ()), name)


def _forget(module: Any, name: str) -> None:
    left = tuple(n for n in module.peftlib_attention if n != name)
    if left:
        module.peftlib_attention = left
    else:
        del module.peftlib_attention


class Recorder(nn.Module):
    """Keeps the inputs of an attention function and changes nothing."""

    seen: Inputs

    def forward(self, inputs: Inputs) -> Inputs:
        self.seen = inputs
        return inputs


@torch.no_grad()
def observe(host: Host, modules: Sequence[nn.Module], **batch: torch.Tensor) -> list[Inputs]:
    """What these attention modules get in one forward of ``batch`` without dropout."""
    use(host)
    modes = [(module, module.training) for module in host.model.modules()]
    recorders = [Recorder() for _ in modules]
    for module, recorder in zip(modules, recorders):
        module.recorder = recorder
        _ask(module, "recorder")
    host.model.eval()
    try:
        host.model(**batch)
        return [recorder.seen for recorder in recorders]
    finally:
        for module in modules:
            del module.recorder
            _forget(module, "recorder")
        for module, mode in modes:
            module.training = mode
