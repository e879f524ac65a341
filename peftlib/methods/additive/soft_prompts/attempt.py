r"""ATTEMPT: a small attention network mixes frozen source prompts with a new one for every instance (additive, soft).

.. math:: P(x) = P_t + \sum_{j=1}^{S+1} a_j(x)\, P_j, \qquad
          a(x) = \mathrm{softmax}_j\Bigl(\tfrac{1}{T}\, \hat{P}_j^\top\,
          \mathrm{LN}\bigl(W_{up}\, \mathrm{SiLU}(W_{down} \hat{X})\bigr)\Bigr)

Shapes: P (m, e) with e the width of the embedding; P_1 .. P_S are the sources' prompts, frozen, and P_{S+1} = P_t is
the target's, trained; P-hat, X-hat (e) are maxima over the prompt's positions and over the input's tokens without
padding; W_down (r, e), W_up (e, r), without biases; LN is a layer norm of scale one and shift zero that does not train.
P_t starts from the first source's prompt. Trained: m e for each task and 2 e r; stored with the sources' prompts, so
that a file needs nothing else. The prompt depends on the input: no merge.

With ``tasks`` above 1 the attention network is shared and each task has a target prompt of its own; rows say in
``task_ids`` which is theirs.

Source: Asai et al. 2022, arXiv:2205.11961, and its code: r = 100, T = e exp(1), which is 2087 on T5-base, m = 100, rate
0.3. Theirs takes the maximum over padding too. Their attention network can start from one that was trained on the
source tasks and has a rate of its own; that is not here. The sources' task heads are not used. Models that continue
their own input are not supported: the weights see the whole input, which in training is also what is to be predicted.
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
    """``sources`` (S, m, e) frozen, ``targets`` (tasks, m, e); called with the embedded input (B, n, e) and its mask
    (B, n) it gives each row's prompt (B, m, e)."""

    reads_mask = True

    def __init__(self, sources: torch.Tensor, tasks: int, bottleneck: int, temperature: float, rows: Tasks):
        super().__init__()
        width = sources.shape[-1]
        self.register_buffer("sources", sources)
        self.targets = nn.Parameter(sources[:1].repeat(tasks, 1, 1))
        self.down = nn.Linear(width, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, width, bias=False)
        self.temperature = temperature
        self.rows = rows

    def weights(self, embedded: torch.Tensor, mask: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
        """a (B, S + 1) for each row's target prompt (B, m, e)."""
        x = cast(embedded, self.down.weight)
        if mask is not None:
            x = x.masked_fill(mask[..., None] == 0, -torch.inf)
        query = self.up(F.silu(self.down(x.amax(1))))
        query = F.layer_norm(query.float(), query.shape[-1:])
        scores = torch.cat(
            [query @ self.sources.amax(1).T.to(query.dtype), (query * targets.amax(1)).sum(-1, keepdim=True)], dim=-1
        )
        return torch.softmax(scores / self.temperature, dim=-1)

    def forward(self, embedded: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        targets = self.targets[self.rows.ids(len(embedded), embedded.device)]
        a = self.weights(embedded, mask, targets)[..., None, None]
        return targets + (a[:, :-1] * self.sources).sum(1) + a[:, -1] * targets


class Attempt(Method):
    Config = AttemptConfig
    learning_rate = 1e-2
    source_methods = ("prompt_tuning",)
    exceptions = {  # noqa: RUF012
        "overfits on bart": "As prompt tuning: a prompt acts through attention alone, which random weights spread "
        "evenly, and norms behind the blocks bound what is left."
    }

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
        width = prompt.embedding(host).weight.shape[1]
        sources = torch.zeros(len(self.sources), settings.length, width)
        for vectors, source in zip(sources, self.sources):
            if source.state is not None:
                vectors.copy_(*source.own.values())
        temperature = math.e * width if c.temperature is None else c.temperature
        mixture = PromptMixture(sources, c.tasks, c.bottleneck, temperature, host.tasks)
        host.tasks.count = c.tasks
        prompt.attach(host, mixture, settings.length, settings.position)
