"""An optimizer step whose loss comes from several forwards: each counts by its share of the step's labels.

A forward's loss is the mean over its labels. Loops that accumulate gradients say how many labels the whole step has,
``num_items_in_batch``, and add up what the forwards give. Not all of transformers' losses follow that (regression, many
classification heads, T5), so the number is taken out of a forward, whose mean is then multiplied by its share. What a
method adds to the loss thus counts once a step, however many forwards there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from peftlib.mechanisms.host import Host
from peftlib.mechanisms.outputs import Args, Kwargs

ITEMS = "num_items_in_batch"
"""The number of labels in an optimizer step, as transformers' Trainer calls it."""


def look_after(host: Host) -> None:
    """Count the labels of the host's model until the method leaves; :func:`give_share` comes after a penalty."""
    model: Any = host.model
    if getattr(model, "loss_type", "") is None and type(model).__name__.endswith("LMHeadModel"):
        # GPT-2's. With the name, Trainer counts the labels as the loss does, without a row's first.
        host.set(model, "loss_type", "ForCausalLM")
    host.hook(model, take_share, before=True)


def items(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """Over how many labels the loss of these inputs is the mean; None where there are no labels."""
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = inputs.get("labels")
        if labels is not None and _predicts_the_next(model):
            labels = labels[..., 1:]
    return None if labels is None else (labels != -100).sum()  # ()


def _predicts_the_next(model: nn.Module) -> bool:
    """Whether label t + 1 belongs to output t."""
    loss: Any = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "")
    return loss is ForCausalLMLoss and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def take_share(model: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
    """A forward hook: lets a training forward's loss be the mean over its own labels, which carry their share."""
    total = kwargs.get(ITEMS)
    if total is None or not (model.training and torch.is_grad_enabled()):
        return None
    if (count := items(model, kwargs)) is None:
        return None
    own: Any = count.clamp(min=1)
    own.share = count / total
    return args, kwargs | {ITEMS: own}


def give_share(model: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """A forward hook: multiplies the loss by the share that :func:`take_share` found."""
    share = getattr(kwargs.get(ITEMS), "share", None)
    if share is None:
        return None
    if isinstance(output, tuple):
        return (output[0] * share, *output[1:])
    if getattr(output, "loss", None) is not None:
        output.loss = output.loss * share
    return output
