"""The two ends between which every method is compared."""

from __future__ import annotations

from peftlib.taxonomy.types import Category, Entry

CATEGORIES = (
    Category(
        "baselines",
        "Baselines",
        "Full fine-tuning and training the task head alone: the two ends between which every method is compared.",
        chapter="00_quickstart",
    ),
)

METHODS = (
    Entry(
        name="full",
        category="baselines",
        title="Full fine-tuning",
        cite="devlin2019bert",
        arxiv="1810.04805",
        summary="Every parameter of the backbone trains, or those of its top layers only.",
        equation=r"\theta \leftarrow \theta - \eta\, \nabla_{\theta} \mathcal{L}(\theta)",
        symbols=r"$\theta$: all parameters of the backbone and the head; $\eta$: learning rate.",
        sites=("weights", "biases", "norms", "embeddings", "head"),
        form="tensors",
        insertion="in place",
        composition="replaced",
        trains="All parameters; with last_layers=k those of the top k layers.",
        count="total if last_layers is None else last_layers * (4 * (d * d + d) + 2 * d * f + f + d + 4 * d)",
        start="identity",
        start_note="Nothing is added.",
        merge="exact",
        merge_note="There is nothing to fold: the backbone itself is trained.",
    ),
    Entry(
        name="head",
        category="baselines",
        title="Head only",
        cite="devlin2019bert",
        arxiv="1810.04805",
        summary="The backbone stays frozen; only the task head trains on its features.",
        equation=r"\hat{y} = \operatorname{head}_{\phi}\bigl(f_{\theta_0}(x)\bigr)",
        symbols=r"$\phi$: parameters of the head; $\theta_0$: the frozen backbone.",
        sites=("head",),
        form="tensors",
        insertion="in place",
        composition="replaced",
        trains="The task head.",
        count="0",
        start="identity",
        start_note="Nothing is added.",
        merge="exact",
        merge_note="There is nothing to fold: the backbone is unchanged.",
        tiny_rate=0.003,
    ),
)
