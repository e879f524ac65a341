"""One [MASK] among trained vectors in the text, whose state alone is scored: a classifier on what the gap would hold.

The encoder gives on nothing but the mask's state. With a classification head, it is the input of the head's last linear
map, whose rows score the classes; what else the head has is passed by. With a masked language model's head, it goes
through the head's transform, and new rows stand in the place of the vocabulary's: the model then answers with the
classes' logits (B, C) and the loss on them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from peftlib.errors import UnsupportedError
from peftlib.mechanisms import template
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.positions import by_name, names
from peftlib.mechanisms.precision import cast


class Cloze(nn.Module):
    """Trained ``vectors`` (m, e), or none, with the frozen ``mask`` (e) as the ``at``-th among them: for an embedded
    input (B, n, e) it gives (B, m + 1, e). ``state`` is the mask's last state (B, d) on its way to the scores."""

    def __init__(self, vectors: torch.Tensor, mask: torch.Tensor, at: int):
        super().__init__()
        self.vectors = nn.Parameter(vectors) if len(vectors) else None
        self.register_buffer("mask", mask, persistent=False)
        self.at = at
        self.state: torch.Tensor | None = None

    def forward(self, embedded: torch.Tensor) -> torch.Tensor:
        rows = self.mask[None]
        if self.vectors is not None:
            rows = torch.cat([self.vectors[: self.at], rows.to(self.vectors.dtype), self.vectors[self.at :]])
        return rows.expand(embedded.shape[0], -1, -1)


class Verbalizer(nn.Linear):
    """``forward(x, y)``: the classes' scores of x in the place of the vocabulary's scores y. Frozen until the host
    trains it. ``labels`` are those of the present forward."""

    def __init__(self, d: int, classes: int):
        super().__init__(d, classes)
        self.requires_grad_(False)
        self.labels: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super().forward(cast(x, self.weight)).to(y.dtype)


def attach(host: Host, name: str, child: Cloze, places: template.Template, classes: int) -> nn.Linear:
    """Put ``child`` into every text, where ``places`` say, and give the linear map (d, classes) that scores the mask.

    Raises UnsupportedError for a model that has neither one answer a text nor a masked language model's head.
    """
    model, parts = host.model, host.anatomy
    kind = type(model).__name__
    masked_lm = kind.endswith("ForMaskedLM")
    if parts.stacks != ("encoder",) or not (masked_lm or kind.endswith("ForSequenceClassification")):
        raise UnsupportedError(
            f"{name} scores the state at a [MASK], which takes an encoder with a classification head or a masked "
            f"language model's; {kind} is neither. Load an encoder with head='masked_lm' or 'classification', or use "
            "prompt_tuning or p_tuning."
        )
    template.attach(host, child, places, only=child.at)
    if not masked_lm:
        scorer = parts.scorer
        host.hook(parts.stack_inputs("encoder"), _keep, child)
        host.hook(scorer, _hand_over, child, before=True)
        return scorer
    decoder = model.get_output_embeddings()
    verbalizer = Verbalizer(decoder.in_features, classes)
    host.after(decoder, name, verbalizer)
    host.hook(model, _withhold_labels, verbalizer, names(model), before=True)
    host.hook(model, _answer, verbalizer)
    return verbalizer


def _keep(child: Cloze, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
    child.state = output[0][:, 0]


def _hand_over(child: Cloze, module: nn.Module, args: tuple, kwargs: dict):
    state, child.state = child.state, None
    return (state,), {}


def _withhold_labels(verbalizer: Verbalizer, order: tuple[str, ...], module: nn.Module, args: tuple, kwargs: dict):
    call = by_name(order, args, kwargs)
    verbalizer.labels = call.pop("labels", None)
    return (), call


def _answer(verbalizer: Verbalizer, module: nn.Module, args: tuple, kwargs: dict, output):
    labels, verbalizer.labels = verbalizer.labels, None
    as_tuple = isinstance(output, tuple)
    logits = (output[0] if as_tuple else output.logits)[:, 0]
    loss = None
    if labels is not None and logits.shape[-1] == 1:
        loss = F.mse_loss(logits[:, 0], labels.view(-1).to(logits.dtype))
    elif labels is not None:
        loss = F.cross_entropy(logits, labels.view(-1))
    if as_tuple:
        return (logits, *output[1:]) if loss is None else (loss, logits, *output[1:])
    return SequenceClassifierOutput(loss, logits, output.hidden_states, output.attentions)
