r"""AdapterDrop: adapters are absent from the first k layers, which makes training and inference faster.

.. math:: h_\ell \leftarrow h_\ell + [\,\ell > k\,]\, \bigl(W_{up}\, \sigma(W_{down} h_\ell + b_{down}) + b_{up}\bigr)

Shapes, with b rows of t tokens: h (b, t, d); W_down (r, d), W_up (d, r). The adapter is that of Pfeiffer et al. 2021:
one a layer, behind the feed-forward block; it reads the block's output behind the residual sum and, where it stands
there, the norm, and adds to the sum. Both matrices start from N(0, 0.02^2) and the biases at zero, so the start is near
the identity; with ``zero_up`` it is the identity. Trained: 2dr + r + d for each layer that has an adapter. No merge,
because of sigma.

========================  ==============================  =========================================================
form                      k in training                   k at inference
========================  ==============================  =========================================================
robust (default)          uniform in 0 .. ``max_dropped``  free: ``adapted.method.drop(k)``, 0 or ``dropped`` before
                          anew at each step
``robust=False``          ``dropped``; those layers       ``dropped`` or more
(specialized)             have no adapter at all
========================  ==============================  =========================================================

A dropped adapter is not computed, and in training no gradient passes below the first layer that has one, because the
embeddings are frozen. Layers of encoder-decoder models are counted through both stacks, the encoder first.

Source: Rücklé et al. 2021, arXiv:2010.11918, with adapters and start of their library (AdapterHub), whose r = d / 16.
The draw depends on attach()'s seed and the step alone, so that a resumed run and every process draw the same. DDP must
be told of unused parameters (``find_unused_parameters=True``). The paper's pruning of AdapterFusion is not here.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import nn

from peftlib.errors import TargetError
from peftlib.mechanisms.bottleneck import Bottleneck, behind_ffn, check_activation
from peftlib.mechanisms.host import Host
from peftlib.methods.base import ConfigError, Method, MethodConfig, TrainingState, at_least


@dataclass(frozen=True)
class AdapterDropConfig(MethodConfig):
    """``dropped`` k, the first layers without adapter (in the robust form at inference only); ``robust``: draw k in
    training, up to ``max_dropped`` (None: all layers but one; never more); ``bottleneck`` r, ``activation`` (a name of
    transformers), ``init_std``, ``zero_up`` to start at the identity, ``dropout`` on the inner activation."""

    dropped: int = 0
    robust: bool = True
    max_dropped: int | None = None
    bottleneck: int = 48
    activation: str = "relu"
    init_std: float = 0.02
    zero_up: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        at_least("dropped", self.dropped, 0)
        at_least("bottleneck", self.bottleneck, 1)
        at_least("init_std", self.init_std, 0)
        check_activation(self.activation)
        if self.max_dropped is not None:
            at_least("max_dropped", self.max_dropped, 0)
            if not self.robust:
                raise ConfigError(f"max_dropped={self.max_dropped!r} is for the robust form; set dropped instead")


class Droppable(Bottleneck):
    """``[l > k] delta(h)``: a bottleneck that is computed only where its layer keeps it, in training and at
    inference."""

    kept_in_training = kept_at_inference = True

    def __init__(self, d: int, config: AdapterDropConfig):
        super().__init__(d, config.bottleneck, config.activation, dropout=config.dropout)
        nn.init.normal_(self.down.weight, std=config.init_std)
        if not config.zero_up:
            nn.init.normal_(self.up.weight, std=config.init_std)

    @property
    def active(self) -> bool:
        return self.kept_in_training if self.training else self.kept_at_inference


class AdapterDrop(Method):
    Config = AdapterDropConfig
    learning_rate = 2e-3

    def attach(self, host: Host) -> None:
        c, layers = self.config, host.anatomy.layers
        if c.dropped >= len(layers):
            raise TargetError(
                f"dropped={c.dropped} leaves none of the {len(layers)} layers of {type(host.model).__name__} an "
                f"adapter; set it to {len(layers) - 1} or less"
            )
        self._seed = int(torch.randint(2**31, (), device="cpu"))
        self.adapters: dict[int, Droppable] = {}
        for index, layer in enumerate(layers):
            if index >= c.dropped or c.robust:
                adapter = Droppable(host.anatomy.d, c)
                self.adapters[index] = behind_ffn(host, layer, "adapter_drop", adapter)
        self.drop(c.dropped)

    def drop(self, k: int) -> None:
        """Leave out the adapters of the first k layers at inference: any k in the robust form, ``dropped`` or more in
        the specialized one, whose first layers have none. Not stored: a loaded adapter starts from its config."""
        layers, least = len(self.host.anatomy.layers), min(self.adapters)
        if isinstance(k, bool) or not isinstance(k, int) or not least <= k <= layers:
            raise ConfigError(f"k={k!r} cannot be dropped here; give a whole number from {least} to {layers}")
        for index, adapter in self.adapters.items():
            adapter.kept_at_inference = index >= k

    def hooks(self) -> tuple[str, ...]:
        return super().hooks() if self.config.robust else ()

    def on_step_start(self, training: TrainingState) -> None:
        if not self.config.robust:
            return
        k = self.drawn(training.step)
        for index, adapter in self.adapters.items():
            adapter.kept_in_training = index >= k

    def drawn(self, step: int) -> int:
        """The k of a training step (robust form)."""
        most = max(self.adapters)
        if self.config.max_dropped is not None:
            most = min(most, self.config.max_dropped)
        return random.Random(f"{self._seed}, {step}").randint(0, most)
