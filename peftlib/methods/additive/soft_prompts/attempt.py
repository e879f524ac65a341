r"""ATTEMPT: a small attention network mixes frozen source prompts with a new one for every instance (additive, soft).

.. math:: P(x) = P_t + \sum_{j=1}^{S+1} a_j(x)\, P_j, \qquad
          a(x) = \mathrm{softmax}_j\Bigl(\tfrac{1}{T}\, \hat{P}_j^\top\,
          \mathrm{LN}\bigl(W_{up}\, \mathrm{SiLU}(W_{down} \hat{X})\bigr)\Bigr)

Shapes: P (m, e) with e the width of the embedding, X (b, t, e) for b rows of t tokens; P_1 .. P_S are the sources'
prompts, frozen, and P_{S+1} = P_t is the target's, trained; P-hat (e) and X-hat (b, e) are maxima over the prompt's
positions and over the input's tokens without padding; W_down (r, e), W_up (e, r), without biases; LN is a layer norm of
scale one and shift zero that does not train; a (b, S + 1). P_t starts from the first source's prompt. Trained: m e for
each task and 2 e r; stored with the sources' prompts, so that a file needs nothing else. The prompt depends on the
input: no merge.

With ``tasks`` above 1 the attention network is shared and each task has a target prompt of its own; rows say their task
in ``task_ids``.

Source: Asai et al. 2022, arXiv:2205.11961, and its code: r = 100, T = e exp(1), which is 2087 on T5-base, m = 100, rate
0.3. The code trains W_down, W_up and P_t (``freeze_model_params``), 230,400 numbers on T5-base; the 231,936 that are
told of the paper, whose text could not be read, would be those with LN's scale and shift. Theirs takes the maximum over
padding too. Their attention network can start from one that was trained on the source tasks and has a rate of its own;
that is not here. The sources' task heads are not used. Models that continue their own input are not supported: the
weights see the whole input, which in training is also what is to be predicted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.errors import UnsupportedError
from peftlib.mechanisms import prompt
from peftlib.mechanisms.host import Host, Tasks
from peftlib.mechanisms.precision import cast
from peftlib.methods.base import Method, MethodConfig, SavedAdapter, at_least, between, check_alike


@dataclass(frozen=True)
class AttemptConfig(MethodConfig):
    """``bottleneck`` r of the attention network, ``temperature`` T (None: e exp(1)), ``tasks``: target prompts."""

    bottleneck: int = 100
    temperature: float | None = None
    tasks: int = 1

    def __post_init__(self):
        at_least("bottleneck", self.bottleneck, 1)
        at_least("tasks", self.tasks, 1)
        if self.temperature is not None:
            between("temperature", self.temperature, 0, float("inf"))


class PromptMixture(nn.Module):
    """``forward(X) = P`` for the embedded input X (b, t, e), whose mask is (b, t); ``sources`` P_1 .. P_S (S, m, e),
    frozen, ``targets`` P_t (tasks, m, e)."""

    reads_mask = True

    def __init__(self, sources: torch.Tensor, tasks: int, bottleneck: int, temperature: float, rows: Tasks):
        super().__init__()
        e = sources.shape[-1]
        self.register_buffer("sources", sources)
        self.targets = nn.Parameter(sources[:1].repeat(tasks, 1, 1))
        self.down = nn.Linear(e, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, e, bias=False)
        self.temperature = temperature
        self.rows = rows

    def weights(self, X: torch.Tensor, mask: torch.Tensor | None, P_t: torch.Tensor) -> torch.Tensor:
        """a (b, S + 1) for the target prompt P_t (b, m, e) of each row."""
        X = cast(X, self.down.weight)  # (b, t, e)
        if mask is not None:
            X = X.masked_fill(mask[..., None] == 0, -torch.inf)  # (b, t, e)
        query = self.up(F.silu(self.down(X.amax(1))))  # (b, e) -> (b, r) -> (b, e)
        query = F.layer_norm(query.float(), query.shape[-1:])  # (b, e)
        scores = torch.cat(
            [
                query @ self.sources.amax(1).T.to(query.dtype),  # (b, e) @ (e, S) -> (b, S)
                (query * P_t.amax(1)).sum(-1, keepdim=True),  # (b, e) -> (b, 1)
            ],
            dim=-1,
        )  # (b, S + 1)
        return torch.softmax(scores / self.temperature, dim=-1)  # (b, S + 1)

    def forward(self, X: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        P_t = self.targets[self.rows.ids(len(X), X.device)]  # (b, m, e)
        a = self.weights(X, mask, P_t)[..., None, None]  # (b, S + 1, 1, 1)
        return P_t + (a[:, :-1] * self.sources).sum(1) + a[:, -1] * P_t  # (b, S, m, e) -> (b, m, e)


class Attempt(Method):
    Config = AttemptConfig
    learning_rate = 1e-2
    source_methods = ("prompt_tuning",)

    def take_sources(self, sources: tuple[SavedAdapter, ...]) -> None:
        super().take_sources(sources)
        check_alike(self.name, sources, "length", "position")

    def attach(self, host: Host) -> None:
        c, parts, settings = self.config, host.anatomy, self.sources[0].config
        if parts.stacks == ("decoder",) and parts.generates:
            raise UnsupportedError(
                f"attempt makes its prompt from the whole input, which in {type(host.model).__name__} is also what is "
                "to be predicted; use it with a classification head or an encoder-decoder model"
            )
        e = prompt.embedding(host).weight.shape[1]
        sources = torch.zeros(len(self.sources), settings.length, e)  # (S, m, e)
        for vectors, source in zip(sources, self.sources):
            if source.state is not None:
                vectors.copy_(*source.own.values())
        temperature = math.e * e if c.temperature is None else c.temperature
        mixture = PromptMixture(sources, c.tasks, c.bottleneck, temperature, host.tasks)
        host.tasks.count = c.tasks
        prompt.attach(host, mixture, settings.length, settings.position)
