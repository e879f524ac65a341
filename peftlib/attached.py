"""transformers' own calls on a model while a method is attached: what they would write or change silently wrong is
refused with the call that is right, or done right."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from peftlib.errors import StateError

if TYPE_CHECKING:
    from peftlib.mechanisms.host import Host


class Attached(Protocol):
    """What is asked of a model with a method; :class:`peftlib.Adapted` is one."""

    model: Any
    host: Host

    @property
    def name(self) -> str: ...

    @property
    def calibrated(self) -> bool: ...

    @property
    def is_disabled(self) -> bool: ...

    def trainable(self) -> dict[str, nn.Parameter]: ...

    def resized(self, more: int) -> None: ...


_CHECKPOINT = re.compile(r"checkpoint-\d+")  # the Trainer's folders


def answer(adapted: Attached) -> None:
    """Stand in for the calls of the adapted model until the method leaves."""
    if not isinstance(adapted.model, PreTrainedModel):
        return
    host = adapted.host
    host.around("save_pretrained", _save_pretrained, adapted, stays=True)
    host.around("push_to_hub", _push_to_hub, adapted, stays=True)
    host.around("resize_token_embeddings", _resize_token_embeddings, adapted, stays=True)


def _save_pretrained(
    adapted: Attached, save: Callable[..., None], save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> None:
    """A model in which only parameters of its own train is written as it is. Of the others the weights alone, without
    what computes with them, are written into the Trainer's checkpoints, from which it resumes, with a config that
    ``from_pretrained`` refuses."""
    plain = adapted.host.plain and not adapted.is_disabled
    if not plain and not _CHECKPOINT.fullmatch(Path(save_directory).name):
        raise _refused(adapted, "save_pretrained() writes")
    save(save_directory, *args, **kwargs)
    config = Path(save_directory) / CONFIG_NAME
    if not plain and config.is_file():
        note = f"a checkpoint for the Trainer, of a model to which {adapted.name} was attached by peftlib; no model"
        size = adapted.model.config.attribute_map.get("hidden_size", "hidden_size")
        # No model can be made with this as a size, and the Trainer looks at the config's version alone.
        config.write_text(json.dumps(json.loads(config.read_text()) | {size: note}, indent=2) + "\n")


def _push_to_hub(adapted: Attached, push: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not adapted.host.plain or adapted.is_disabled:
        raise _refused(adapted, "push_to_hub() uploads")
    return push(*args, **kwargs)


def _refused(adapted: Attached, call: str) -> StateError:
    return StateError(
        f"{adapted.name} is attached, and {call} the model's weights without what computes with them, which "
        "from_pretrained() would load as another model. Use adapted.save(folder), which peftlib.load(model, folder) "
        "reads (adapted is model.peftlib_adapted), or, for a plain model, adapted.merge() first."
    )


def _resize_token_embeddings(
    adapted: Attached, resize: Callable[..., nn.Embedding], *args: Any, **kwargs: Any
) -> nn.Embedding:
    model = adapted.model
    if not (args or kwargs):  # asks for the embeddings alone
        return resize()
    if adapted.is_disabled:
        raise StateError(f"{adapted.name} is disabled; leave `with adapted.disabled()` before resizing the vocabulary")
    if not adapted.calibrated:
        raise StateError(
            f"{adapted.name} has yet to choose what to train, the token embeddings among it; resize the vocabulary "
            "before attach()"
        )
    touched = {id(p) for p in adapted.trainable().values()}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None and (
            parametrize.is_parametrized(module)
            or module._forward_hooks
            or module._forward_pre_hooks
            or any(id(p) in touched for p in module.parameters())
        ):
            raise StateError(
                f"{adapted.name} acts on the token embeddings, which resize_token_embeddings() would replace by others "
                "without it; detach() it, resize, and attach or load it again"
            )
    before = _size(model)
    with adapted.host.all_or_nothing(adapted):
        embeddings = resize(*args, **kwargs)
        adapted.resized(more=_size(model) - before)
    return embeddings


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
