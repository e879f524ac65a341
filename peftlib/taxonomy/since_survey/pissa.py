"""PiSSA's place in the taxonomy."""

from peftlib.taxonomy.types import Entry

ENTRY = Entry(
    name="pissa",
    category="since_survey",
    title="PiSSA",
    cite="meng2024pissa",
    arxiv="2404.02948",
    summary="LoRA's factors start as the principal singular components of the weight, which is frozen without them.",
    equation=r"y = \bigl(W - s\, B_0 A_0\bigr)\, x + s\, B A x,\qquad B_0 = U_r \sqrt{\Sigma_r / s},\quad "
    r"A_0 = \sqrt{\Sigma_r / s}\, V_r^{\top}",
    symbols=r"$W = U \Sigma V^{\top} \in \mathbb{R}^{o \times i}$: pretrained weight, $\Sigma_r$ its $r$ largest "
    r"singular values; $A \in \mathbb{R}^{r \times i}$, $B \in \mathbb{R}^{o \times r}$: trained factors, at first "
    r"$A_0, B_0$; $s = \alpha / r$: scale, 1 by default.",
    sites=("attention.query", "attention.key", "attention.value", "attention.output", "ffn.up", "ffn.gate", "ffn.down"),
    form="low-rank",
    insertion="parallel",
    composition="scaled",
    trains="The two factors on every linear map of the layers.",
    count="L * rank * (8 * d + 2 * (d + f))",
    start="near",
    start_note="What the factors take up is taken off the weight, so the output changes by rounding alone.",
    merge="exact",
    merge_note="The scaled product is added to the weight that was left.",
    life=("attach: split the frozen weights' principal components off",),
    original="GraphPKU/PiSSA",
    tiny={"rank": 8},  # rank 128 is wider than a tiny model
)
