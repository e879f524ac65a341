"""What the tests of single methods share."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import peft
import torch
from torch import nn

from peftlib import backbones, taxonomy
from peftlib.conformance.case import logits
from peftlib.methods import registry
from peftlib.methods.base import Method
from peftlib.methods.hybrid.automatic.s3delta import search
from peftlib.methods.registry import register


def backbone(family: str, head: str = "classification") -> nn.Module:
    """A tiny model without dropout, in evaluation mode."""
    return backbones.load(f"tiny-{family}", head=head, dropout=0.0).model


def inputs(family: str, count: int = 3) -> dict[str, torch.Tensor]:
    """A padded batch of short texts."""
    texts = ["the movie was great", "a boring film with a weak plot and some dreadful dialogue", "good cast"][:count]
    return dict(backbones.load(f"tiny-{family}").tokenizer(texts, padding=True, return_tensors="pt"))


def perturb(adapted, std: float = 0.3, seed: int = 1) -> None:
    """Move every trained parameter away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)


@contextmanager
def registered(cls: type[Method], name: str, **fields) -> Iterator[None]:
    """Inside ``with``, a method of this name, whose entry is LoRA's but for these fields."""
    entry = {"name": name, "category": "yours", "count": "0", "tiny": {}} | fields
    register(cls, entry=dataclasses.replace(taxonomy.entry("lora"), **entry))
    try:
        yield
    finally:
        registry._REGISTERED.pop(name)
        taxonomy._ENTRY_OF.pop(name)


def interrupt(monkeypatch, owner, name: str, at: int) -> list[None]:
    """Let the call of number ``at`` of ``owner.name`` end as Ctrl-C would. Gives a list with an item a call."""
    function, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == at:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def slow_clock(monkeypatch, seconds: float = 60) -> None:
    """Let so much time pass, by the clock of S3Delta's search, whenever it is read."""
    ticks = itertools.count(0, seconds)
    monkeypatch.setattr(search, "time", SimpleNamespace(monotonic=lambda: next(ticks)))


class Spy:
    """Records the input and output of modules during forwards: ``spy[module] = (input, output)``."""

    def __init__(self, *modules: nn.Module):
        self.seen: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        for module in modules:
            module.register_forward_hook(self._see)

    def _see(self, module, args, output):
        self.seen[module] = (args[0].detach(), output.detach())

    def __getitem__(self, module):
        return self.seen[module]


def linear(site, x: torch.Tensor) -> torch.Tensor:
    """A site's own map of x, without what is attached to it."""
    y = x @ site.weight.T
    return y if site.bias is None else y + site.bias


# Beside HF peft: a family's head in our words and HF peft's name of its task; encoders classify.
HEADS = {"t5": ("seq2seq", "SEQ_2_SEQ_LM"), "llama": ("causal_lm", "CAUSAL_LM"), "gpt2": ("causal_lm", "CAUSAL_LM")}


def head(family: str) -> str:
    return HEADS.get(family, ("classification", ""))[0]


def task(family: str) -> str:
    return HEADS.get(family, ("", "SEQ_CLS"))[1]


def data(family: str) -> dict[str, torch.Tensor]:
    """A batch for the family's head; an encoder-decoder makes its decoder's inputs from labels."""
    found = inputs(family)
    return found | {"labels": found["input_ids"]} if family == "t5" else found


def model(family: str) -> nn.Module:
    """A tiny model with the family's head, which HF peft takes too."""
    made = backbone(family, head(family))
    # HF peft asks for a method of the model that transformers 5 no longer has, for its own generate().
    made._prepare_encoder_decoder_kwargs_for_generation = None
    return made


def theirs(family: str, config: peft.PeftConfig, folder: Path) -> torch.Tensor:
    """Save an adapter of HF peft's with all trained parameters moved; gives its logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model(family), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    made.save_pretrained(folder)
    return logits(made, **data(family))


def reload(family: str, folder: Path) -> nn.Module:
    """What HF peft loads from a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model(family), folder).eval()
