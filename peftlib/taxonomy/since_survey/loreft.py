"""LoReFT's entry."""

from __future__ import annotations

from peftlib.taxonomy.types import Entry

ENTRY = Entry(
    name="loreft",
    category="since_survey",
    title="LoReFT",
    cite="wu2024reft",
    arxiv="2404.03592",
    summary="Behind each layer the hidden states of the prompt's first and last tokens are edited in a subspace of a "
    "few dimensions.",
    equation=r"h \leftarrow h + R^\top (W h + b - R h)",
    symbols=r"$h \in \mathbb{R}^{d}$: a layer's output at one token; $R \in \mathbb{R}^{r \times d}$: trained, with "
    r"orthonormal rows; $W \in \mathbb{R}^{r \times d}$, $b \in \mathbb{R}^{r}$: trained map.",
    sites=("layers",),
    form="low-rank",
    insertion="sequential",
    composition="added",
    trains="The subspace, and the map to what stands in it.",
    count="(L if layers is None else len(layers)) * (1 if tied or not (first and last) else 2) * "
    "((1 if form in ('consreft', 'lobireft') else 2) * rank * d + rank)",
    start="changed",
    start_note="What the states have in the random subspace is replaced by a random map of them.",
    merge="no",
    merge_note="The edit is made at some tokens only, and a weight acts on all of them.",
    life=("every forward: find the prompt's tokens", "generate(): only the prompt is edited"),
    original="stanfordnlp/pyreft",
    tiny={"rank": 4, "first": 2, "last": 2},
)
