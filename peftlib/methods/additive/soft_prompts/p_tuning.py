r"""P-tuning: prompt embeddings that a bidirectional LSTM with an MLP makes, among the embeddings of the text.

.. math:: [P_1; \dots; P_m] = \mathrm{MLP}\bigl(\mathrm{BiLSTM}(E_1, \dots, E_m)\bigr)

Shapes: E, P (m, e) with e the width of the embedding (d, but ELECTRA's may be smaller); the LSTM has two layers of
h units each way, the MLP 2h units and a ReLU. Trained: all of it, of which m e numbers are stored: when training ends
the prompt becomes plain embeddings and the encoder is gone; a loaded prompt trains on as embeddings. The start changes
the output, and a prompt is input: no merge. Where prompts stand, what heads see of them and how a cache takes them is
as in prompt tuning.

Source: Liu et al. 2021, arXiv:2103.10385, and its code, where h is d / 2; HF peft's encoder of type LSTM is the same
network. The code's templates have prompts in front of, between and behind words and, on BERT, a [MASK] that the
language-model head fills in; here the text's head answers, and ``between`` and ``after`` place prompts in an encoder's
texts. Of a decoder no head sees vectors behind the text: there all stand in front, as they do by default. The paper
tunes the backbone too in some of its experiments; here it is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peftlib.errors import UnknownNameError, UnsupportedError
from peftlib.mechanisms import prompt, template
from peftlib.mechanisms.host import Host
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


class PTuning(Method):
    Config = PTuningConfig
    learning_rate = 1e-2
    exceptions = {  # noqa: RUF012
        f"overfits on {family}": "A prompt acts through attention alone, which random weights spread evenly, and norms "
        "behind the blocks bound what is left: eight texts of a random backbone stay closer than it can pull them."
        for family in ("roberta", "distilbert", "bart")
    }

    def attach(self, host: Host) -> None:
        c = self.config
        width = prompt.embedding(host).weight.shape[1]
        encoder = prompt.RecurrentEncoder(c.length, width, c.hidden or width // 2, c.dropout)
        self.prompt = prompt.MadePrompt(encoder)
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
        return others | {f"{path}.vectors": self.prompt.made()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.prompt.keep()
        super().load_state(state)
