r"""AdapterSoup: the weights of the adapters of the nearest domains are averaged into one adapter.

.. math:: \theta_{soup} = \frac{1}{|\mathcal{N}|} \sum_{n \in \mathcal{N}} \theta_n

Shapes: those of the sources' adapters theta_n, which are of one method with one config: residual adapters (the
paper's), or sequential or parallel ones. The soup is an adapter of that method, with its count and its cost at
inference, whatever the number of sources. It needs no training and can be trained on. Start: the average. No merge, as
its sources.

N is ``chosen``, names of sources (all of them by default), which :func:`nearest` finds from sentence embeddings of the
domains and of the new text; ``peftlib.backbones.embed`` computes them with the embedded sentence encoder:

>>> vectors = {name: peftlib.backbones.embed(texts) for name, texts in domains.items()}
>>> chosen = nearest(peftlib.backbones.embed(new_texts), vectors, top=5)
>>> peftlib.attach(model, "adapter_soup", sources=[...], chosen=chosen)

Task heads: the model keeps its own, and the sources' are left out; ``heads="average"`` averages those of the chosen
too, for domains of one task with the same labels.

Source: Chronopoulou et al. 2023, arXiv:2302.07027, where domains are of language modelling, so that there are no heads,
and sentence similarity and clusters choose; of the text only the beginning could be read. That domains below a smallest
similarity are left out could not be confirmed: ``least``, without effect by default. Chosen here: the cosine of mean
embeddings; clusters by a Gaussian mixture with diagonal covariances, where a domain's score is its share of the new
text's clusters and domains below ``share`` are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from peftlib.errors import UnknownNameError
from peftlib.mechanisms.host import Host
from peftlib.methods.base import ConfigError, Method, MethodConfig, SavedAdapter, at_least, check_alike
from peftlib.methods.bases.sources import attach_source


@dataclass(frozen=True)
class AdapterSoupConfig(MethodConfig):
    """``chosen``: names of the sources that are averaged ((): all); ``heads``: "keep" the model's own task head, or
    "average" those of the chosen into it, where it then trains and is stored as a part of the soup."""

    chosen: tuple[str, ...] = ()
    heads: Literal["keep", "average"] = "keep"

    def __post_init__(self):
        if self.heads not in ("keep", "average"):
            raise UnknownNameError("heads", self.heads, ("keep", "average"))
        if len(set(self.chosen)) < len(self.chosen):
            raise ConfigError(f"chosen={self.chosen!r} names a source twice")


class AdapterSoup(Method):
    Config = AdapterSoupConfig
    learning_rate = 5e-4
    source_methods = ("residual_adapter", "sequential_adapter", "parallel_adapter")
    fewest_sources = 1

    def take_sources(self, sources: tuple[SavedAdapter, ...]) -> None:
        super().take_sources(sources)
        check_alike(self.name, sources)
        names = [source.name for source in sources]
        for name in self.config.chosen:
            if name not in names:
                raise UnknownNameError("source of adapter_soup", name, names)
            if names.count(name) > 1:
                raise ConfigError(f"{names.count(name)} sources are named {name!r}; save them under different names")
        self.averaged = [s for s in sources if not self.config.chosen or s.name in self.config.chosen]

    def attach(self, host: Host) -> None:
        attach_source(self.sources[0], host)
        soup = host.trained()
        if self.config.heads == "average" and (head := host.anatomy.head):
            host.train(head.values())
            soup = host.trained()
            for source in self.averaged:
                if source.state is not None and any(
                    n not in source.state or source.state[n].shape != p.shape for n, p in head.items()
                ):
                    raise ConfigError(f'source {source.name!r} has no task head like this model\'s; use heads="keep"')
        if all(source.state is not None for source in self.averaged):
            with torch.no_grad():
                for name, parameter in soup.items():
                    theta = torch.stack([source.state[name].double() for source in self.averaged])
                    parameter.copy_(theta.mean(0))  # (|N|, ...) -> (...)


def nearest(
    text: torch.Tensor,
    domains: Mapping[str, torch.Tensor],
    top: int = 5,
    by: Literal["similarity", "clusters"] = "similarity",
    clusters: int | None = None,
    share: float = 0.1,
    least: float = -1.0,
) -> tuple[str, ...]:
    """Names of the domains that are nearest to a text, at most ``top``, the nearest first.

    Args:
        text: sentence embeddings (n, e) of the new text.
        domains: name -> sentence embeddings (n, e) of a domain.
        by: "similarity": cosine of mean embeddings; "clusters": a Gaussian mixture of ``clusters`` (None: as many as
            domains) is fitted to the domains' sentences, and domains count by their share of the text's clusters.
        least: the smallest cosine with which a domain is taken, by "similarity"; the default takes all.
        share: the smallest share with which a domain is taken, by "clusters".
    """
    at_least("top", top, 1)
    if by not in ("similarity", "clusters"):
        raise UnknownNameError("way to choose", by, ("similarity", "clusters"))
    if by == "similarity":
        cosine = {n: float(F.cosine_similarity(text.mean(0), v.mean(0), dim=0)) for n, v in domains.items()}
        score = {n: s for n, s in cosine.items() if s >= least}
    else:
        score = {n: s for n, s in _shares(text, domains, clusters or len(domains)).items() if s >= share}
    return tuple(sorted(score, key=lambda name: -score[name])[:top])


def _shares(text: torch.Tensor, domains: Mapping[str, torch.Tensor], clusters: int) -> dict[str, float]:
    # Imported late: few need it, and it takes a second.
    from sklearn.mixture import GaussianMixture

    sentences = torch.cat(list(domains.values())).double().numpy()
    mixture = GaussianMixture(clusters, covariance_type="diag", random_state=0, reg_covar=1e-4).fit(sentences)

    def shares(embeddings: torch.Tensor) -> torch.Tensor:
        found = torch.as_tensor(mixture.predict(embeddings.double().numpy()))  # (n, e) -> (n,)
        return torch.bincount(found, minlength=clusters) / len(embeddings)  # (n,) -> (clusters,)

    counts = {name: shares(embeddings) for name, embeddings in domains.items()}
    mine = shares(text)
    whole = sum(counts.values()).clamp(min=1e-12)  # (clusters,)
    return {name: float((mine * count / whole).sum()) for name, count in counts.items()}
