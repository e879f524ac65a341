r"""Prefix tuning: trained keys and values stand before those of every attention (additive, soft prompt-based).

.. math:: \mathrm{Attn}(Q, [P_K; K], [P_V; V]), \qquad [P_K; P_V]_\ell = W_\ell \tanh(W E_P + b) + b_\ell

Shapes: P_K, P_V (m, d) a layer l, or (m, H_kv p) with grouped keys and values; E_P (m, d), W (h, d), W_l (2d, h). The
MLP trains in the place of P_K and P_V and is not stored: keys and values are saved, and train on after loading.
Trained: m d + (d + 1) h + 2 L d (h + 1), stored: 2 L m d; with ``reparametrize=False`` keys and values train
themselves. A prefix draws attention from the first step on, and its effect depends on the query: no merge.

Encoder-decoder backbones have prefixes in encoder, decoder and cross-attention, an MLP each, as in the paper. The text
of one-stack backbones stands at the positions after the prefix, as with the paper's GPT-2 and in HF peft. With two
stacks the text stays where it is, and T5's relative bias leaves prefixes out. HF peft counts them there, and gives
encoder-decoder backbones prefixes in the decoder's self-attention only: ``relative_bias=True`` with
``attentions=("decoder",)`` is its version on T5.

Source: Li & Liang 2021, arXiv:2101.00190, whose h is 512 (800 for summarization). Without the MLP their keys and
values start at N(0, 1) or, as with ``init_token_ids``, from those of a text; N(0, 0.02) is from He et al. 2022.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from peftlib.errors import TargetError, UnknownNameError
from peftlib.mechanisms import attention, positions
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.prefix import Prefix, PrefixEmbedding, PrefixEncoder
from peftlib.methods.base import ConfigError, Method, MethodConfig, at_least
from peftlib.methods.bases import hf_peft

ROLES = ("encoder", "decoder", "cross")


@dataclass(frozen=True)
class PrefixTuningConfig(MethodConfig):
    """``length`` m; ``reparametrize`` by an MLP of ``hidden`` units; ``attentions``: which of "encoder", "decoder" and
    "cross" have prefixes, where the backbone has them; ``shift_positions`` of the text by m (one-stack backbones);
    ``relative_bias``: T5's counts the prefix of a self-attention as the tokens before the text.
    Without the MLP, ``std`` of the start, or ``init_token_ids``: the tokens of a text, repeated or cut to m, whose keys
    and values are the start."""

    length: int = 20
    reparametrize: bool = True
    hidden: int = 512
    attentions: tuple[str, ...] = ROLES
    shift_positions: bool = True
    relative_bias: bool = False
    std: float = 0.02
    init_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        at_least("length", self.length, 1)
        at_least("hidden", self.hidden, 1)
        for role in self.attentions:
            if role not in ROLES:
                raise UnknownNameError("attention", role, ROLES)
        if self.init_token_ids and self.reparametrize:
            raise ConfigError(
                f"init_token_ids={self.init_token_ids!r} set keys and values, which come from the MLP; "
                "add reparametrize=False"
            )


class PrefixTuning(Method):
    Config = PrefixTuningConfig
    learning_rate = 5e-4
    hf_peft = hf_peft.Prefix()

    def attach(self, host: Host) -> None:
        c, parts = self.config, host.anatomy
        owners = self._owners(host)
        places = [
            (role, module, site.out_features // parts.head_size(module), parts.head_size(module))
            for layer in parts.layers
            for role, module, site in (
                (layer.stack, layer.attention, layer.sites["attention.key"]),
                ("cross", layer.cross_attention, layer.sites.get("cross_attention.key")),
            )
            if module is not None and role in c.attentions
        ]
        if not places:
            raise TargetError(
                f"attentions={c.attentions!r} are none of {type(host.model).__name__}; it has "
                + ", ".join((*parts.stacks, *(("cross",) if parts.layers[-1].cross_attention else ())))
            )
        seen = self._see_text(host, [module for _, module, _, _ in places]) if c.init_token_ids else None
        shared = (
            {role: PrefixEmbedding(c.length, parts.d, c.hidden) for role, _, _, _ in places} if c.reparametrize else {}
        )
        for i, (role, module, heads, size) in enumerate(places):
            encoder = PrefixEncoder(shared[role], heads * size) if c.reparametrize else None
            prefix = Prefix(heads, c.length, size, c.std, encoder, owners.get(role))
            if seen:
                with torch.no_grad():
                    prefix.key.copy_(seen[i].key[0])
                    prefix.value.copy_(seen[i].value[0])
            attention.attach(host, module, "prefix", prefix)
        if owners:
            host.refuse_replicas()  # the prefixes hold the modules that count them
        positions.count_from_text(host)
        if c.shift_positions:
            positions.shift(host, c.length)

    def _owners(self, host: Host) -> dict[str, nn.Module]:
        """Role -> the attention module whose relative bias counts the prefixes of that role."""
        if not self.config.relative_bias:
            return {}
        stacks = host.anatomy.family.stacks
        first = {layer.stack: layer.attention for layer in reversed(host.anatomy.layers)}
        owners = {stack: module for stack, module in first.items() if stacks[stack].shares_bias}
        if not owners.keys() & set(self.config.attentions):
            raise TargetError(
                f"relative_bias=True with attentions={self.config.attentions!r} finds no relative position bias in "
                f"{type(host.model).__name__}; only self-attentions of T5 have one"
            )
        return owners

    def _see_text(self, host: Host, modules: list[nn.Module]) -> list[attention.Inputs]:
        """What these attention modules get of the text ``init_token_ids``."""
        c = self.config
        ids = torch.tensor([[c.init_token_ids[i % len(c.init_token_ids)] for i in range(c.length)]])
        batch = {"input_ids": ids} | ({"decoder_input_ids": ids} if len(host.anatomy.stacks) > 1 else {})
        return attention.observe(host, modules, **batch)

    @torch.no_grad()
    def state(self) -> dict[str, torch.Tensor]:
        paths = self.host.paths()
        inside = tuple(f"{path}." for path in paths)
        others = {n: p for n, p in self.host.trained().items() if not n.startswith(inside)}
        pairs = {path: zip(("key", "value"), prefix.pair(), strict=True) for path, prefix in paths.items()}
        return others | {f"{path}.{name}": tensor for path, pair in pairs.items() for name, tensor in pair}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        for prefix in self.host.paths().values():
            prefix.keep()
        super().load_state(state)
