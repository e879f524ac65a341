"""VeRA's place in the taxonomy."""

from peftlib.taxonomy.types import Entry

ENTRY = Entry(
    name="vera",
    category="since_survey",
    title="VeRA",
    cite="kopiczko2024vera",
    arxiv="2310.11454",
    summary="All maps share one frozen random pair of factors; of each map two vectors train that scale the factors' "
    "outputs.",
    equation=r"y = W x + b \odot B\, \bigl(d \odot A x\bigr)",
    symbols=r"$W \in \mathbb{R}^{o \times i}$: frozen weight; $A \in \mathbb{R}^{r \times i}$, "
    r"$B \in \mathbb{R}^{o \times r}$: random factors, frozen, the same for all maps; $d \in \mathbb{R}^{r}$, "
    r"$b \in \mathbb{R}^{o}$: trained vectors of each map; $r$: rank.",
    sites=("attention.query", "attention.value"),
    form="low-rank",
    insertion="parallel",
    composition="added",
    trains="Two vectors of every targeted matrix.",
    count="2 * L * (d + rank)",
    start="identity",
    start_note="b starts at zero.",
    merge="exact",
    merge_note="The product of the scaled factors is added to the weight.",
)
