"""A bottleneck network at a site: down to r, a nonlinearity, up again. Adapters are bottlenecks at different places."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from transformers.activations import ACT2FN

from peftlib.anatomy import Layer
from peftlib.errors import UnknownNameError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.outputs import Args, Kwargs, state_of, with_state
from peftlib.mechanisms.precision import cast

Init = Literal["lora", "normal", "truncated"]


def check_activation(name: str) -> None:
    """Raise UnknownNameError for an activation that transformers does not have."""
    if name not in ACT2FN:
        raise UnknownNameError("activation", name, ACT2FN)


class Bottleneck(nn.Module):
    """``delta(z) = scale * (W_up act(W_down z + b_down) + b_up)`` for z (b, t, d), b rows of t tokens; W_down (r, d),
    W_up (d, r). A subclass may put a ``norm`` on z.

    Args:
        init: "lora": W_down Kaiming-uniform with a = sqrt(5) and W_up zero, so that delta starts at zero; "normal":
            both N(0, std^2); "truncated": that, cut off at two standard deviations.
        zero_up: start W_up at zero whatever ``init`` says.
        linear: ``linear(in, out)`` gives other maps, with a ``bias`` and a start of their own, in the place of both.

    Biases start at zero.
    """

    active = True

    def __init__(
        self,
        d: int,
        bottleneck: int,
        activation: str = "relu",
        scale: float = 1.0,
        dropout: float = 0.0,
        init: Init = "lora",
        std: float = 1e-2,
        zero_up: bool = False,
        linear: Callable[[int, int], nn.Module] | None = None,
    ):
        super().__init__()
        make: Callable[[int, int], Any] = linear or nn.Linear
        self.norm: nn.Module = nn.Identity()
        self.down = make(d, bottleneck)
        self.activation = ACT2FN[activation]
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.up = make(bottleneck, d)
        self.scale = scale
        if linear is not None:
            return
        if init == "lora":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for weight in (self.down.weight, self.up.weight):
            if init == "normal":
                nn.init.normal_(weight, std=std)
            elif init == "truncated":
                nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        if init == "lora" or zero_up:
            nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def delta(self, z: torch.Tensor) -> torch.Tensor:
        """What the bottleneck computes from z, both (b, t, d)."""
        z = self.norm(cast(z, self.down.bias))  # (b, t, d)
        inner = self.dropout(self.activation(self.down(z)))  # (b, t, d) -> (b, t, r)
        return self.scale * self.up(inner)  # (b, t, r) -> (b, t, d)


class Sequential(Bottleneck):
    """Behind a map: ``forward(x, y) = y + delta(y)`` for the map's output y; for ``host.after``."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + self.delta(y).to(y.dtype)  # (b, t, d)


def behind_ffn(host: Host, layer: Layer, name: str, child: nn.Module) -> nn.Module:
    """Make ``child`` the one adapter of a layer, at the place of Pfeiffer et al. 2021. It reads what the feed-forward
    block would give without it and adds to the residual sum: ``z <- z + child.delta(norm(z))``, and
    ``h <- h + child.delta(h)`` behind a layer whose norms stand before its blocks. While ``child.active`` is False,
    nothing of it is computed."""
    child = host.add(layer.module, name, child)
    gate = host.gate(layer, layer.module, name)
    if layer.pre_norm:
        host.hook(layer.module, _behind_layer, child, gate)
    else:
        host.hook(layer.norms["ffn"], _before_norm, child, gate, before=True)
    return child


def _added(child: Any, gate: nn.Module | None, x: torch.Tensor, sum_: torch.Tensor) -> torch.Tensor:
    delta = child.delta(x)
    return sum_ + (delta if gate is None else gate(x) * delta).to(sum_.dtype)


def _before_norm(
    child: Any, gate: nn.Module | None, norm: nn.Module, args: Args, kwargs: Kwargs
) -> tuple[Args, Kwargs] | None:
    if not child.active:
        return None
    return (_added(child, gate, norm.forward(args[0]), args[0]), *args[1:]), kwargs


def _behind_layer(child: Any, gate: nn.Module | None, layer: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    if not child.active:
        return None
    h = state_of(output)
    return with_state(output, _added(child, gate, h, h))
