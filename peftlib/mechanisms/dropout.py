"""Training without a backbone's dropout."""

from __future__ import annotations

from functools import partial

from torch import nn

from peftlib.mechanisms.host import Host


def switch_off(host: Host) -> None:
    """Set every dropout rate of the model to 0 until the method leaves. Modules stay in training mode, so that gradient
    checkpointing, which asks for it, goes on."""
    for module in host.model.modules():
        for name, rate in list(vars(module).items()):
            is_rate = name == "p" if isinstance(module, nn.Dropout) else "dropout" in name
            if is_rate and isinstance(rate, float) and rate > 0:
                setattr(module, name, 0.0)
                host.on_remove(partial(setattr, module, name, rate))
