"""OFT's entry."""

from __future__ import annotations

from peftlib.taxonomy.types import Entry

ENTRY = Entry(
    name="oft",
    category="since_survey",
    title="OFT",
    cite="qiu2023oft",
    arxiv="2306.07280",
    summary="The inputs of frozen linear maps are turned by a block-diagonal orthogonal matrix, so that the angles "
    "between the rows of a weight stay as they were.",
    equation=r"y = W R x,\qquad R = \operatorname{diag}(R_1, \dots, R_k),\qquad R_i = (I + Q_i)(I - Q_i)^{-1}",
    symbols=r"$W \in \mathbb{R}^{o \times i}$: frozen weight; $Q_i = -Q_i^\top \in \mathbb{R}^{s \times s}$: trained "
    r"skew-symmetric blocks; $k = i / s$: blocks; $s$: block size.",
    sites=("attention.query", "attention.key", "attention.value", "attention.output"),
    form="rotation",
    insertion="sequential",
    composition="multiplied",
    trains="What stands above the diagonals of the blocks.",
    count="4 * L * (1 if block_share else d // block_size) * (block_size * (block_size - 1) // 2)",
    start="identity",
    start_note="Q starts at zero.",
    merge="exact",
    merge_note="The weight is multiplied by the rotation.",
    original="Zeju1997/oft",
    tiny={"block_size": 8},
)
