r"""Laplace-LoRA: LoRA, and after training a Gaussian over its factors, which calibrates the predictions.

.. math:: p(\theta \mid \mathcal{D}) \approx \mathcal{N}(\theta_{\mathrm{MAP}}, \Sigma), \quad
    \Sigma^{-1} = \operatorname{KFAC} + \lambda I, \qquad
    f(x) \sim \mathcal{N}\bigl(f_{\mathrm{MAP}}(x),\, J \Sigma J^\top\bigr)

Shapes: theta, A (r, in) and B (out, r) of every target; J the Jacobian of the logits f in theta. Training is LoRA's,
from the identity; trained: r (in + out) a matrix. Then ``adapted.method.fit(batches)``, which :func:`peftlib.fit` and
the Trainer's callback call at the end, estimates the curvature KFAC from the training batches and the precision
lambda of the prior, N(0, 1 / lambda) for every weight, by marginal likelihood (Adam on its logarithm, from 1, 1,000
steps at 0.1), and ``adapted.method.predict(batch)`` gives probabilities: the softmax averaged over draws of f.
peftlib's evaluations use them; the model itself keeps answering with f_MAP. No merge: the mean would fold into the
weights, but the Gaussian needs the factors.

A and B of an update are two linear layers, and the curvature of each is :math:`L \otimes R`: L (in, in) is the sum of
the outer products of its inputs over all positions of all texts, divided by the number of texts, R (out, out) the sum
of the outer products of the logits' gradients at its output, over all positions, weighted as the generalized
Gauss-Newton matrix of a softmax asks. It is exact for one text of one position.

Source: Yang et al. 2023, arXiv:2308.13111, with the Kronecker factors of Ritter et al. 2018, and its code (``laplace``
on ASDL; all layers; rank 8, alpha 16, dropout 0.1, 100,000 samples a text), whose factors come out the same. As there,
the head of a classifier trains and has no Gaussian; its script for LLaMA instead adapts the language-model head too,
with a Gaussian, and cuts it to the answers' tokens. Where we differ: padding is not among the positions (the code sums
its inputs too, so that L depends on which texts share a batch), and the factors of size d are kept whole, where the
paper has a low-rank form of them. Files hold the factors A and B; the Gaussian is as large as the inputs squared and is
fitted again, in one pass over the training data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from peftlib.anatomy import Site
from peftlib.errors import DataError, StateError, UnsupportedError
from peftlib.mechanisms.low_rank import LowRank
from peftlib.methods.base import MethodConfig, at_least
from peftlib.methods.bases.low_rank import LowRankUpdates

Batch = dict[str, torch.Tensor]

_AT_A_TIME = 10_000
"""Draws of the logits that are held in memory together."""


@dataclass(frozen=True)
class LaplaceLoRAConfig(MethodConfig):
    """``rank`` r, ``alpha`` (the update is scaled by alpha / r), ``targets`` (site patterns), ``dropout`` on the
    update's input, ``samples`` of the logits for a prediction."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | str = ("*attention.query", "*attention.value")
    dropout: float = 0.1
    samples: int = 100_000

    def __post_init__(self):
        at_least("rank", self.rank, 1)
        at_least("samples", self.samples, 1)


class Posterior:
    """The Gaussian N(theta_MAP, (KFAC + precision I)^-1) over the factors of the updates.

    ``blocks`` has, for A and B of each update in turn, eigenvalues and eigenvectors of L and of R.
    """

    def __init__(self, model: nn.Module, updates: Iterable[LowRank], batches: Iterable[Batch]):
        self.model, self.updates = model, list(updates)
        self.precision = 1.0
        self.log_likelihood = 0.0
        rows = 0
        factors: list[list] = []  # for each layer: L times the number of texts, R
        for batch in batches:
            logits, records = record(model, self.updates, batch)  # (N, C)
            self.log_likelihood -= float(F.cross_entropy(logits, batch["labels"], reduction="sum"))
            roots = softmax_curvature_root(logits)  # (N, C) -> (N, C, C)
            layers = [layer for one in records for layer in one.layers()]
            factors = factors or [[0.0, 0.0] for _ in layers]
            rows += len(logits)
            for factor, (x, gradients) in zip(factors, layers):
                inputs = x[_counts(x, batch.get("attention_mask"), layers)]  # (N, t, in) -> (n, in)
                factor[0] = factor[0] + inputs.T @ inputs  # (in, in)
                for root in roots.unbind(1):  # (N, C)
                    mixed = sum(w[:, None, None] * g for w, g in zip(root.T, gradients)).flatten(0, 1)  # (N t, out)
                    factor[1] = factor[1] + mixed.T @ mixed  # (out, out)
        if not factors:
            raise DataError("there are no batches to estimate the curvature from")
        self.blocks = [(*torch.linalg.eigh(left / rows), *torch.linalg.eigh(right)) for left, right in factors]
        self.eigenvalues = [  # of KFAC, (out, in) for each layer
            right[:, None].clamp(min=0) * left.clamp(min=0) for left, _, right, _ in self.blocks
        ]

    def log_marginal_likelihood(self, precision: torch.Tensor) -> torch.Tensor:
        """The Laplace estimate of log p(data | prior precision), constants included."""
        weights = [p.detach().double() for update in self.updates for p in (update.A, update.B)]
        penalty = sum((w**2).sum() for w in weights)
        ratio = sum((value / precision).log1p().sum() for value in self.eigenvalues)
        return self.log_likelihood - (precision * penalty + ratio) / 2

    def fit_precision(self, steps: int = 1000, rate: float = 0.1) -> float:
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
        mean, records = record(self.model, self.updates, batch)  # (N, C)
        layers = [layer for one in records for layer in one.layers()]
        covariance = mean.new_zeros(*mean.shape, mean.shape[1])  # (N, C, C)
        for (x, gradients), (_, U, _, V), value in zip(layers, self.blocks, self.eigenvalues):
            # (N, out, t) (N, t, in) for each class -> (N, C, out, in)
            J = torch.stack([(g @ V).transpose(1, 2) @ (x @ U) for g in gradients], dim=1)
            covariance += torch.einsum("ncoi,nkoi->nck", J / (value + self.precision), J)
        return mean, covariance

    def probabilities(self, batch: Batch, samples: int, seed: int = 0) -> torch.Tensor:
        """Class probabilities (N, C): the softmax averaged over ``samples`` draws of the logits."""
        mean, covariance = self.logits(batch)  # (N, C), (N, C, C)
        value, vectors = torch.linalg.eigh(covariance)  # (N, C), (N, C, C)
        root = vectors * value.clamp(min=0).sqrt()[:, None, :]  # (N, C, C)
        generator = torch.Generator(mean.device).manual_seed(seed)
        total = torch.zeros_like(mean)
        for count in torch.arange(samples).split(_AT_A_TIME):
            shape = (len(count), *mean.shape)
            noise = torch.randn(shape, generator=generator, dtype=mean.dtype, device=mean.device)
            # (s, N, C) -> (N, C)
            total += (mean + torch.einsum("nck,snk->snc", root, noise)).softmax(-1).sum(0)
        return (total / samples).float()


class LaplaceLoRA(LowRankUpdates):
    Config = LaplaceLoRAConfig
    learning_rate = 2e-3

    def __init__(self, config: LaplaceLoRAConfig):
        super().__init__(config)
        self.posterior: Posterior | None = None

    def update(self, site: Site) -> LowRank:
        c = self.config
        return LowRank(site.in_features, site.out_features, c.rank, c.alpha / c.rank, c.dropout)

    @property
    def fitted(self) -> bool:
        return self.posterior is not None

    def fit(self, batches: Iterable[Batch]) -> float:
        """Estimate the Gaussian from training batches (model inputs with ``labels``), once training is over. Gives the
        prior precision. A later fit, after more training, replaces it."""
        self.posterior = Posterior(self.host.model, self.updates.values(), map(self._here, batches))
        return self.posterior.fit_precision()

    def predict(self, batch: Batch, seed: int = 0) -> torch.Tensor:
        """Class probabilities (N, C) of a batch under the Gaussian. Raises StateError before :meth:`fit`."""
        if self.posterior is None:
            raise StateError(
                "laplace_lora has no Gaussian yet (files do not hold it): after training or loading, call "
                "adapted.method.fit(training_batches)"
            )
        return self.posterior.probabilities(self._here(batch), self.config.samples, seed)

    def _here(self, batch: Batch) -> Batch:
        return {k: v.to(self.host.device) for k, v in batch.items()}


@dataclass
class Record:
    """One forward of an update: its input (N, t, in) and, for each class, the gradient of that class' logit at its
    output (N, t, out)."""

    update: LowRank
    x: torch.Tensor
    gradients: list[torch.Tensor]

    def layers(self) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
        """Input and output gradients of A, then of B, as layers without a scale."""
        A, B = (t.detach().to(self.x.dtype) for t in (self.update.A, self.update.B))
        scaled = [self.update.scale * g for g in self.gradients]  # (N, t, out)
        yield self.x, [g @ B for g in scaled]  # (N, t, in), (N, t, r)
        yield F.linear(self.x, A), scaled  # (N, t, r), (N, t, out)


def record(model: nn.Module, updates: Iterable[LowRank], batch: Batch) -> tuple[torch.Tensor, list[Record]]:
    """Logits (N, C) of a batch, and a record of each update from this forward and a backward pass for each class.

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
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits  # (N, C)
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
    records = []
    for i, (update, output) in enumerate(zip(updates, outputs)):
        gradients = [torch.zeros_like(output) if f[i] is None else f[i] for f in found]
        x, *gradients = (t.double().flatten(1, -2) for t in (kept[update][0], *gradients))  # (N, t, in), (N, t, out)
        records.append(Record(update, x, gradients))
    return logits.detach().double(), records


def _counts(x: torch.Tensor, mask: torch.Tensor | None, layers: list) -> torch.Tensor:
    """Which positions (N, t) of a layer's inputs x (N, t, in) are no padding: by the attention mask where it is of
    these positions, else all that some layer's gradient reaches."""
    if mask is not None and mask.shape == x.shape[:2]:
        return mask.bool()
    gradients = [g for other, each in layers if other.shape[:2] == x.shape[:2] for g in each]
    return torch.stack([g.abs().amax(-1) for g in gradients]).amax(0) > 0  # (N, t)


def softmax_curvature_root(logits: torch.Tensor) -> torch.Tensor:
    """(N, C, C) whose rows v_k give the Hessian of the softmax loss: sum_k v_k v_k^T = diag(p) - p p^T."""
    p = logits.softmax(-1)  # (N, C)
    eye = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
    return p.sqrt()[:, :, None] * (eye - p[:, None, :])  # (N, C, C)
