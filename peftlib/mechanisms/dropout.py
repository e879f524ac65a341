"""Dropout of a frozen backbone, switched off while something beside it trains."""

from __future__ import annotations

from functools import partial

from torch import nn

from peftlib.mechanisms.host import Host


def switch_off(host: Host, root: nn.Module) -> None:
    """Set every dropout rate below ``root`` to 0 until the method leaves, except in what methods have hung there.
    Modules stay in training mode, which gradient checkpointing asks for."""
    hung = {id(module) for part in host.root._parts() for _, _, child in part.children for module in child.modules()}
    for module in (module for module in root.modules() if id(module) not in hung):
        for name, rate in list(vars(module).items()):
            is_rate = name == "p" if isinstance(module, nn.Dropout) else "dropout" in name
            if is_rate and isinstance(rate, float) and rate > 0:
                setattr(module, name, 0.0)
                host.on_remove(partial(setattr, module, name, rate))
