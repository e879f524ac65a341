r"""P-tuning: prompt embeddings that come from a bidirectional LSTM with an MLP, among the embeddings of the text.

.. math:: [P_1; \dots; P_m] = \mathrm{MLP}\bigl(\mathrm{BiLSTM}(E_1, \dots, E_m)\bigr)

Shapes: E, P (m, e) with e the width of the embedding (d, but ELECTRA's may be smaller), the same P for each of b rows;
the LSTM has two layers of h units each way, the MLP 2h units and a ReLU. The whole encoder trains, and m e numbers are
stored: when training ends the prompt becomes plain embeddings and the encoder is dropped. A loaded prompt trains on as
embeddings. The start changes the output, and a prompt is input: no merge. The place of a prompt, its part in heads and
in the cache are those of prompt tuning.

Source: Liu et al. 2021, arXiv:2103.10385, and its code, where h is d / 2; HF peft's encoder of type LSTM is the same
network. The code's templates have prompts in front of, between and behind words and, on BERT, a [MASK] that the
language-model head fills in; here the text's head answers, and ``between`` and ``after`` place prompts in an encoder's
texts. Of a decoder no head sees vectors behind the text: there all stand in front, as they do by default. The paper
tunes the backbone too in some of its experiments; here it is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from peftlib.errors import UnknownNameError, UnsupportedError
from peftlib.mechanisms import prompt, template
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.precision import without_autocast
from peftlib.methods.base import ConfigError, Method, MethodConfig, at_least

POSITIONS = ("front", "after_first")


@dataclass(frozen=True)
class PTuningConfig(MethodConfig):
    """``length`` m; ``hidden`` h (None: half the embedding's width); ``dropout`` between the LSTM's layers. Of the m
    vectors ``between`` stand behind the first text and ``after`` behind the last one (encoders); the others stand at
    ``position``: ``"front"``, or ``"after_first"`` token, which is where they go when some stand in the text."""

    length: int = 20
    hidden: int | None = None
    dropout: float = 0.0
    position: prompt.Position = "front"
    between: int = 0
    after: int = 0

    def __post_init__(self):
        at_least("length", self.length, 1)
        if self.hidden is not None:
            at_least("hidden", self.hidden, 1)
        if self.position not in POSITIONS:
            raise UnknownNameError("position", self.position, POSITIONS)
        at_least("between", self.between, 0)
        at_least("after", self.after, 0)
        if self.between + self.after > self.length:
            raise ConfigError(
                f"between={self.between} and after={self.after} are more than the length={self.length} vectors there "
                "are; choose a larger length"
            )


class BiLSTM(nn.Module):
    """A bidirectional LSTM of two layers, (1, m, e) -> (1, m, 2h), with torch's parameters under torch's names.

    It calls the function and not torch's module, which torch.compile does not take into a graph.
    """

    def __init__(self, e: int, h: int, dropout: float):
        super().__init__()
        self.hidden, self.dropout = h, dropout
        for name, parameter in nn.LSTM(e, h, 2, bidirectional=True).named_parameters():
            self.register_parameter(name, parameter)

    def forward(self, E: torch.Tensor) -> torch.Tensor:
        start = E.new_zeros(4, 1, self.hidden)  # (2 layers of 2 directions, 1, h)
        weights = list(self.parameters())
        return torch.lstm(E, (start, start), weights, True, 2, self.dropout, self.training, True, True)[0]  # (1, m, 2h)


class PromptEncoder(nn.Module):
    """``forward() = MLP(BiLSTM(E))``, the prompt P (m, e) from the trained embeddings E (m, e)."""

    def __init__(self, m: int, e: int, h: int, dropout: float):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(m, e))
        self.lstm = BiLSTM(e, h, dropout)
        self.mlp = nn.Sequential(nn.Linear(2 * h, 2 * h), nn.ReLU(), nn.Linear(2 * h, e))

    def forward(self) -> torch.Tensor:
        # In the parameters' own precision: that of the stored prompt, and not every CPU has a bfloat16 LSTM.
        with without_autocast(self.embedding):
            H = self.lstm(self.embedding[None])  # (1, m, e) -> (1, m, 2h)
            return self.mlp(H)[0]  # (1, m, 2h) -> (m, e)


class EncodedPrompt(nn.Module):
    """``forward(x) = P`` for each row of the embedded input x (b, t, e). P comes from the encoder ``maker`` until
    :meth:`keep` puts ``vectors`` (m, e) in its place."""

    def __init__(self, encoder: PromptEncoder):
        super().__init__()
        self.maker = encoder

    def current(self) -> torch.Tensor:
        """The prompt as it is now, (m, e)."""
        return self.vectors if self.maker is None else self.maker()

    def keep(self) -> None:
        """Drop the encoder and train the vectors that it gives now."""
        if self.maker is not None:
            with torch.no_grad():
                vectors = self.maker().clone(memory_format=torch.contiguous_format)
            self.maker = None
            self.vectors = nn.Parameter(vectors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        P = self.current()  # (m, e)
        return P.expand(x.shape[0], -1, -1)  # (m, e) -> (b, m, e)


class PTuning(Method):
    Config = PTuningConfig
    learning_rate = 1e-2

    def attach(self, host: Host) -> None:
        c = self.config
        e = prompt.embedding(host).weight.shape[1]
        self.prompt = EncodedPrompt(PromptEncoder(c.length, e, c.hidden or e // 2, c.dropout))
        if not (c.between or c.after):
            prompt.attach(host, self.prompt, c.length, c.position)
            return
        sep = host.anatomy.token_id("sep")
        if sep is None:
            raise UnsupportedError(
                f"between and after stand where a text's [SEP] is, and the config of this {type(host.model).__name__} "
                "names none: set model.config.sep_token_id (peftlib.backbones does), or put all vectors in front"
            )
        places = template.Template(c.length - c.between - c.after, c.between, c.after, sep)
        template.attach(host, self.prompt, places)

    def on_train_end(self) -> None:
        self.prompt.keep()

    @torch.no_grad()
    def state(self) -> dict[str, torch.Tensor]:
        (path,) = self.host.paths()
        others = {n: p for n, p in self.host.trained().items() if not n.startswith(f"{path}.")}
        return others | {f"{path}.vectors": self.prompt.current()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.prompt.keep()
        super().load_state(state)
