"""DoRA's place in the taxonomy."""

from peftlib.taxonomy.types import Entry

ENTRY = Entry(
    name="dora",
    category="since_survey",
    title="DoRA",
    cite="liu2024dora",
    arxiv="2402.09353",
    summary="A weight is split into the lengths of its rows and their directions; the lengths train as they are, the "
    "directions through LoRA's product.",
    equation=r"y = \frac{m}{n} \odot \bigl(W x + \tfrac{\alpha}{r}\, B A x\bigr) + b,\qquad "
    r"n_j = \bigl\| \bigl(W + \tfrac{\alpha}{r}\, B A\bigr)_j \bigr\|_2",
    symbols=r"$W \in \mathbb{R}^{o \times i}$, $b \in \mathbb{R}^{o}$: frozen weight and bias; $m \in \mathbb{R}^{o}$: "
    r"trained lengths; $A \in \mathbb{R}^{r \times i}$, $B \in \mathbb{R}^{o \times r}$: trained factors; $n_j$: the "
    r"length of row $j$, a constant in the backward pass; $\alpha$: scale; $r$: rank.",
    sites=("attention.query", "attention.key", "attention.value", "ffn.up", "ffn.down"),
    form="low-rank + vector",
    insertion="parallel + sequential",
    composition="scaled + multiplied",
    trains="The two factors and the length of every row of every targeted matrix.",
    count="L * (rank * (8 * d + 2 * f) + 4 * d + f)",
    start="identity",
    start_note="B starts at zero and the lengths at those of the rows.",
    merge="exact",
    merge_note="The rows of the weight plus the scaled product get the trained lengths.",
    original="NVlabs/DoRA",
    tiny={"rank": 8, "alpha": 16.0},  # rank 32 is wider than a tiny model's keys
)
