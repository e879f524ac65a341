"""A Kronecker-factored Laplace approximation over low-rank updates: a Gaussian over their factors around what was
trained, its fit to the data, and what it says about the logits.

A and B of each update are two linear layers. The curvature of a layer is :math:`L \\otimes R`: L (in, in) the mean
outer product of its inputs, R (out, out) the sum of those of the logits' gradients at its output, over all positions
that a gradient reaches, weighted as the generalized Gauss-Newton matrix of a softmax asks. It is exact for one example
with one such position. The prior is N(0, 1 / precision) for every weight.

Source: Ritter et al. 2018 (Kronecker-factored Laplace), as used by Yang et al. 2023, arXiv:2308.13111.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.errors import DataError, UnsupportedError
from peftlib.mechanisms.low_rank import LowRank

Batch = dict[str, torch.Tensor]


@dataclass
class Seen:
    """What one forward showed of an update: its input (N, t, in) and, for each class, the gradient of that class'
    logit at its output (N, t, out)."""

    update: LowRank
    x: torch.Tensor
    gradients: list[torch.Tensor]

    def layers(self) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
        """Input and output gradients of A, then of B, as layers without a scale."""
        A, B = (t.detach().to(self.x.dtype) for t in (self.update.A, self.update.B))
        scaled = [self.update.scale * g for g in self.gradients]
        yield self.x, [g @ B for g in scaled]
        yield F.linear(self.x, A), scaled


def look(model: nn.Module, updates: Iterable[LowRank], batch: Batch) -> tuple[torch.Tensor, list[Seen]]:
    """Logits (N, C) of a batch, and what its forward and a backward pass for each class show of the updates.

    Raises UnsupportedError for a model whose logits are not (N, C), one answer a text.
    """
    updates, kept, handles = list(updates), {}, []
    for update in updates:
        keep = lambda module, args, output: kept.update({module: (args[0].detach(), output)})  # noqa: E731
        handles.append(update.register_forward_hook(keep))
    mode = model.training
    model.eval()
    try:
        with torch.enable_grad():
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    finally:
        model.train(mode)
        for handle in handles:
            handle.remove()
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise UnsupportedError(
            f"the approximation is over class logits (N, C), and {type(model).__name__} gives {tuple(logits.shape)}; "
            "use a classification head with two labels or more"
        )
    outputs = [kept[update][1] for update in updates]
    with torch.enable_grad():
        sums = logits.sum(0).unbind()
    found = [
        torch.autograd.grad(one, outputs, retain_graph=c + 1 < len(sums), allow_unused=True)
        for c, one in enumerate(sums)
    ]
    seen = []
    for i, (update, output) in enumerate(zip(updates, outputs)):
        gradients = [torch.zeros_like(output) if f[i] is None else f[i] for f in found]
        x, *gradients = (t.double().flatten(1, -2) for t in (kept[update][0], *gradients))
        seen.append(Seen(update, x, gradients))
    return logits.detach().double(), seen


def softmax_curvature_root(logits: torch.Tensor) -> torch.Tensor:
    """(N, C, C) whose rows v_k give the Hessian of the softmax loss: sum_k v_k v_k^T = diag(p) - p p^T."""
    p = logits.softmax(-1)
    return p.sqrt()[:, :, None] * (torch.eye(p.shape[1], dtype=p.dtype, device=p.device) - p[:, None, :])


class Posterior:
    """The Gaussian. ``blocks`` has, for A and B of each update in turn, eigenvalues and eigenvectors of L and of R."""

    def __init__(self, model: nn.Module, updates: Iterable[LowRank], batches: Iterable[Batch]):
        self.model, self.updates = model, list(updates)
        self.precision = 1.0
        self.log_likelihood = 0.0
        factors: list[list] = []
        for batch in batches:
            logits, seen = look(model, self.updates, batch)
            self.log_likelihood -= float(F.cross_entropy(logits, batch["labels"], reduction="sum"))
            roots = softmax_curvature_root(logits)
            layers = [layer for one in seen for layer in one.layers()]
            factors = factors or [[0, 0.0, 0.0] for _ in layers]
            for factor, (x, gradients) in zip(factors, layers):
                reached = torch.stack(gradients).abs().sum((0, 3)) > 0
                inputs = x[reached]
                factor[0] += len(inputs)
                factor[1] = factor[1] + inputs.T @ inputs
                for root in roots.unbind(1):
                    mixed = sum(w[:, None, None] * g for w, g in zip(root.T, gradients))[reached]
                    factor[2] = factor[2] + mixed.T @ mixed
        if not factors:
            raise DataError("there are no batches to estimate the curvature from")
        self.blocks = [
            (*torch.linalg.eigh(left / max(1, count)), *torch.linalg.eigh(right)) for count, left, right in factors
        ]
        self.eigenvalues = [right[:, None].clamp(min=0) * left.clamp(min=0) for left, _, right, _ in self.blocks]

    def log_marginal_likelihood(self, precision: torch.Tensor) -> torch.Tensor:
        """The Laplace estimate of log p(data | prior precision), constants included."""
        weights = [p.detach().double() for update in self.updates for p in (update.A, update.B)]
        penalty = sum((w**2).sum() for w in weights)
        ratio = sum((value / precision).log1p().sum() for value in self.eigenvalues)
        return self.log_likelihood - (precision * penalty + ratio) / 2

    def fit_precision(self, steps: int = 100, rate: float = 0.1) -> float:
        """The prior precision of largest marginal likelihood, by Adam on its logarithm from where it is."""
        log = torch.tensor(float(self.precision), dtype=torch.float64).log().requires_grad_()
        optimizer = torch.optim.Adam([log], lr=rate)
        for _ in range(steps):
            optimizer.zero_grad()
            (-self.log_marginal_likelihood(log.exp())).backward()
            optimizer.step()
        self.precision = float(log.detach().exp())
        return self.precision

    def logits(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (N, C) and covariance (N, C, C) of the logits of the model linearized at its weights."""
        mean, seen = look(self.model, self.updates, batch)
        layers = [layer for one in seen for layer in one.layers()]
        covariance = mean.new_zeros(*mean.shape, mean.shape[1])
        for (x, gradients), (_, U, _, V), value in zip(layers, self.blocks, self.eigenvalues):
            jacobian = torch.stack([(g @ V).transpose(1, 2) @ (x @ U) for g in gradients], dim=1)
            covariance += torch.einsum("ncoi,nkoi->nck", jacobian / (value + self.precision), jacobian)
        return mean, covariance

    def probabilities(self, batch: Batch, samples: int, seed: int = 0) -> torch.Tensor:
        """Class probabilities (N, C): the softmax averaged over ``samples`` draws of the logits."""
        mean, covariance = self.logits(batch)
        value, vectors = torch.linalg.eigh(covariance)
        root = vectors * value.clamp(min=0).sqrt()[:, None, :]
        generator = torch.Generator(mean.device).manual_seed(seed)
        noise = torch.randn((samples, *mean.shape), generator=generator, dtype=mean.dtype, device=mean.device)
        return (mean + torch.einsum("nck,snk->snc", root, noise)).softmax(-1).mean(0).float()
