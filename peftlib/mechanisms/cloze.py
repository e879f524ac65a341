"""An answer at a [MASK]: the mask among trained vectors, and a masked language model that answers with classes.

Shapes: b rows, m vectors, e the width of the embedding, d the hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from peftlib.errors import DataError
from peftlib.mechanisms.call import Handed
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.outputs import Args, Kwargs
from peftlib.mechanisms.positions import by_name, names


def with_mask(vectors: torch.Tensor, mask: torch.Tensor, at: int) -> torch.Tensor:
    """The vectors (m, e) with the mask's embedding (e) as the one of index ``at``, (m + 1, e)."""
    return torch.cat([vectors[:at], mask[None].to(vectors.dtype), vectors[at:]])


def answer_with_classes(host: Host) -> None:
    """Let a masked language model whose head gives the classes' scores at one position (b, 1, classes) take a label a
    row (b) and answer like a classification model: logits (b, classes), and the loss on them."""
    labels = Handed()
    host.hook(host.model, _withhold, labels, names(host.model), before=True)
    host.hook(host.model, _answer, labels)


def _withhold(labels: Handed, order: tuple[str, ...], model: nn.Module, args: Args, kwargs: Kwargs) -> Any:
    call = by_name(order, args, kwargs)
    labels.value = call.pop("labels", None)
    return (), call


def _answer(kept: Handed, model: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    labels = kept.take()  # (b)
    as_tuple = isinstance(output, tuple)
    logits = (output[0] if as_tuple else output.logits)[:, 0]  # (b, 1, classes) -> (b, classes)
    loss = None
    if labels is not None and labels.numel() != len(logits):
        raise DataError(
            f"labels of shape {tuple(labels.shape)} for {len(logits)} texts: with this method a masked language model "
            "answers with one class a text, so give each text the number of its class, not the words"
        )
    if labels is not None and logits.shape[-1] == 1:
        loss = F.mse_loss(logits[:, 0], labels.view(-1).to(logits.dtype))
    elif labels is not None:
        loss = F.cross_entropy(logits, labels.view(-1))
    if as_tuple:
        return (logits, *output[1:]) if loss is None else (loss, logits, *output[1:])
    return SequenceClassifierOutput(loss, logits, output.hidden_states, output.attentions)
