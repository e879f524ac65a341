r"""Laplace-LoRA: LoRA, and after training a Gaussian over its factors, which calibrates the predictions.

.. math:: p(\theta \mid \mathcal{D}) \approx \mathcal{N}(\theta_{\mathrm{MAP}}, \Sigma), \quad
    \Sigma^{-1} = \operatorname{KFAC} + \lambda I, \qquad
    f(x) \sim \mathcal{N}\bigl(f_{\mathrm{MAP}}(x),\, J \Sigma J^\top\bigr)

Shapes: theta, A (r, in) and B (out, r) of every target; J their Jacobian of the logits f. Training is LoRA's, from the
identity; trained: r (in + out) a matrix. Then ``adapted.method.fit(batches)``, which :func:`peftlib.fit` and the
Trainer's callback call at the end, estimates the Kronecker-factored curvature from the training batches and the one
prior precision lambda by marginal likelihood (Adam on its logarithm, from 1, 100 steps at 0.1), and
``adapted.method.predict(batch)`` gives probabilities: the softmax averaged over draws of f. peftlib's evaluations use
them; the model itself keeps answering with f_MAP. No merge: the mean would fold into the weights, but the Gaussian
needs the factors.

Source: Yang et al. 2023, arXiv:2308.13111, and its code (all layers; rank 8, alpha 16, dropout 0.1, here off by
default). Where we differ: the factors of size d are kept whole, where the paper has a low-rank form of them; answers
come from a classification head, where it cuts the language-model head to the answers' tokens, and ``samples`` is 1,000
a text (the code: 100,000). Positions count as examples of their own, those without a gradient (padding) not at all:
chosen here. Files hold the factors A and B; the Gaussian is as large as the inputs squared and is fitted again, in one
pass over the training data.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from peftlib.errors import StateError
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.laplace import Posterior
from peftlib.mechanisms.low_rank import LowRank, check_rank
from peftlib.methods.base import Method, MethodConfig, at_least


@dataclass(frozen=True)
class LaplaceLoRAConfig(MethodConfig):
    """``rank`` r, ``alpha`` (the update is scaled by alpha / r), ``targets`` (site patterns), ``dropout`` on the
    update's input, ``samples`` of the logits for a prediction."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | str = ("*attention.query", "*attention.value")
    dropout: float = 0.0
    samples: int = 1000

    def __post_init__(self):
        at_least("rank", self.rank, 1)
        at_least("samples", self.samples, 1)


class LaplaceLoRA(Method):
    Config = LaplaceLoRAConfig
    learning_rate = 2e-3

    def attach(self, host: Host) -> None:
        c = self.config
        self.updates = {}
        self.posterior: Posterior | None = None
        for site in host.anatomy.sites(c.targets):
            check_rank(c.rank, site)
            update = LowRank(site.in_features, site.out_features, c.rank, c.alpha / c.rank, c.dropout)
            self.updates[site] = host.after(site, "lora", update)

    @property
    def fitted(self) -> bool:
        return self.posterior is not None

    def fit(self, batches: Iterable[dict[str, torch.Tensor]]) -> float:
        """Estimate the Gaussian from training batches (model inputs with ``labels``), once training is over. Gives the
        prior precision. A later fit, after more training, replaces it."""
        self.posterior = Posterior(self.host.model, self.updates.values(), map(self._here, batches))
        return self.posterior.fit_precision()

    def predict(self, batch: dict[str, torch.Tensor], seed: int = 0) -> torch.Tensor:
        """Class probabilities (N, C) of a batch under the Gaussian. Raises StateError before :meth:`fit`."""
        if self.posterior is None:
            raise StateError(
                "laplace_lora has no Gaussian yet (files do not hold it): after training or loading, call "
                "adapted.method.fit(training_batches)"
            )
        return self.posterior.probabilities(self._here(batch), self.config.samples, seed)

    def _here(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: v.to(self.host.device) for k, v in batch.items()}
