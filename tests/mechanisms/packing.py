"""Tiny backbones whose maps bitsandbytes keeps packed, as transformers loads them, and the plain ones that they stand
for."""

from __future__ import annotations

import copy

from bitsandbytes import nn as bnb
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftlib import anatomy
from peftlib.anatomy import weights


def packed(model: nn.Module, kind: str) -> nn.Module:
    """The model, with the maps of its layers in "4bit" or "8bit". As in transformers, T5's ``wo`` stays as it is."""
    for path in dict.fromkeys(site.path for site in anatomy.of(model).sites() if not site.path.endswith(".wo")):
        old = model.get_submodule(path)
        weight = (old.weight.T if isinstance(old, Conv1D) else old.weight).detach().clone().contiguous()
        sizes = (weight.shape[1], weight.shape[0], old.bias is not None)
        if kind == "4bit":
            new = bnb.Linear4bit(*sizes, compute_dtype=weight.dtype, quant_type="nf4")
            new.weight = bnb.Params4bit(weight, requires_grad=False, quant_type="nf4", module=new)
        else:
            new = bnb.Linear8bitLt(*sizes, has_fp16_weights=False)
            new.weight = bnb.Int8Params(weight, has_fp16_weights=False, requires_grad=False)
        new.bias, new.source_cls = old.bias, type(old)
        model.set_submodule(path, new.to("cpu").train(old.training))
    return model


def plain(model: nn.Module) -> nn.Module:
    """A copy whose packed maps are plain, of the numbers that the codes stand for."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if weights.packed(module):
            weights.unpack(module)
    return twin
