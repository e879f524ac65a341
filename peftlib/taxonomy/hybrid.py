"""Hybrid fine-tuning: several kinds of modules in one model, combined by hand or by search."""

from __future__ import annotations

from peftlib.taxonomy.types import Category, Entry

CATEGORIES = (
    Category(
        "hybrid",
        "Hybrid fine-tuning",
        "Several kinds of modules in one model.",
    ),
    Category(
        "hybrid/manual",
        "Manual combination",
        "A designer chooses which modules go where.",
        chapter="40_hybrid",
    ),
    Category(
        "hybrid/automatic",
        "Automatic combination",
        "A search over structures chooses which modules go where, under a budget.",
        chapter="40_hybrid",
    ),
)

METHODS = (
    Entry(
        name="mam_adapter",
        category="hybrid/manual",
        title="MAM adapter",
        cite="he2022unified",
        arxiv="2110.04366",
        summary="Mix-and-match: a short prefix on attention and a scaled parallel adapter beside the feed-forward "
        "block.",
        equation=r"\operatorname{Attn}\bigl(Q, [P_K; K], [P_V; V]\bigr),\qquad "
        r"\mathrm{FFN}(x) + s\, W_{\mathrm{up}}\, \mathrm{ReLU}(W_{\mathrm{down}} x)",
        symbols=r"$P_K, P_V \in \mathbb{R}^{m \times d}$: trained keys and values; "
        r"$W_{\mathrm{down}} \in \mathbb{R}^{r \times d}$, $W_{\mathrm{up}} \in \mathbb{R}^{d \times r}$: the adapter; "
        r"$s$: its fixed scale.",
        sites=("attention.key", "attention.value", "ffn.down"),
        form="attention + bottleneck",
        insertion="parallel",
        composition="gated + scaled",
        trains="The parallel adapter of every layer, and an MLP that makes the keys and values or those themselves.",
        count="L * (2 * d * bottleneck + bottleneck + d) + (length * d + (d + 1) * hidden + 2 * L * d * (hidden + 1) "
        "if reparametrize else 2 * L * length * d)",
        start="changed",
        start_note="The adapter starts at zero, but a prefix draws attention from the first step on.",
        merge="no",
        merge_note="A prefix depends on the query and the adapter is nonlinear.",
        original="jxhe/unify-parameter-efficient-tuning",
        tiny={"length": 8, "hidden": 64, "bottleneck": 32},  # wider than the whole backbone otherwise
    ),
    Entry(
        name="u_mam",
        category="hybrid/manual",
        title="U-MAM",
        cite="lawton2023",
        arxiv="2305.16597",
        summary="A MAM adapter whose single entries are pruned, in rounds of training, down to a budget.",
        equation=r"\delta \leftarrow z \odot \delta,\qquad z = \operatorname{top}_{k}(s),\qquad "
        r"s_i = \Bigl|\delta_i\, \frac{\partial \mathcal{L}}{\partial \delta_i}\Bigr|",
        symbols=r"$\delta$: all entries of the prefixes and adapters; $s$: first-order estimate of the loss change "
        r"when an entry is set to zero; $z$: binary mask with $k$ ones.",
        sites=("attention.key", "attention.value", "ffn.down"),
        form="attention + bottleneck",
        insertion="parallel",
        composition="gated + scaled",
        trains="The entries of a MAM adapter that survive pruning, chosen in a search before training.",
        count="int(density * L * (2 * length * d + 2 * d * bottleneck + bottleneck + d))",
        start="changed",
        start_note="The prefix draws attention from the first step on.",
        merge="no",
        merge_note="A prefix depends on the query and the adapter is nonlinear.",
        life=("calibrate: train all entries for a while, score and prune them round by round, then start anew",),
        tiny={"length": 8, "bottleneck": 32, "steps": 4},  # wider than the whole backbone otherwise
    ),
    Entry(
        name="compacter",
        category="hybrid/manual",
        title="Compacter",
        cite="mahabadi2021compacter",
        arxiv="2106.04647",
        summary="Adapters whose weights are sums of Kronecker products of small matrices shared by all layers with "
        "low-rank matrices of their own.",
        equation=r"W = \sum_{i=1}^{n} A_i \otimes \bigl(s_i\, t_i^{\top}\bigr)",
        symbols=r"$A_i \in \mathbb{R}^{n \times n}$: shared by all adapters; "
        r"$s_i \in \mathbb{R}^{\frac{d}{n} \times r}$, $t_i \in \mathbb{R}^{\frac{b}{n} \times r}$: "
        r"an adapter's own factors; $b$: bottleneck.",
        sites=("attention.output", "ffn.down", "norms"),
        form="bottleneck + tensors",
        insertion="sequential + in place",
        composition="added + replaced",
        trains="The shared matrices, each adapter's factors and biases, and the norms of the blocks and behind the "
        "last layers.",
        count="L * (1 if plus_plus else 2) * (2 * (d + bottleneck) * rank + bottleneck + d) + divisions**3 "
        "+ 4 * L * d * train_norms",
        start="near",
        start_note="The shared matrices start at N(0, 0.0001²), not at zero: factors that are all zero do not train.",
        merge="no",
        merge_note="The adapter between the two projections is nonlinear.",
        original="rabeehk/compacter",
    ),
    Entry(
        name="unipelt",
        category="hybrid/manual",
        title="UniPELT",
        cite="mao2022unipelt",
        arxiv="2110.07577",
        summary="LoRA, prefix and adapter in every layer, each behind a gate that the layer's input opens or closes.",
        equation=r"\mathcal{G}_m = \sigma\bigl(w_m^{\top} x + b_m\bigr),\qquad "
        r"h \leftarrow h + \sum_{m \in \{\mathrm{LoRA},\, \mathrm{prefix},\, \mathrm{adapter}\}} "
        r"\mathcal{G}_m\, \Delta_m(x)",
        symbols=r"$\mathcal{G}_m \in (0, 1)$: gate of module $m$; $w_m \in \mathbb{R}^{d}$, $b_m$: its weights; "
        r"$\Delta_m$: what the module adds at its own place.",
        sites=("attention.query", "attention.key", "attention.value", "ffn.down"),
        form="low-rank + attention + bottleneck",
        insertion="parallel + sequential",
        composition="scaled + gated",
        trains="The three modules and their gates in every layer.",
        count="L * (len(targets) * 2 * d * rank + 2 * d * bottleneck + bottleneck + d + (len(targets) + 2) * (d + 1)) "
        "+ (length * d + (d + 1) * hidden + 2 * L * d * (hidden + 1) if reparametrize else 2 * L * length * d)",
        start="changed",
        start_note="LoRA starts at zero and the adapter near it, but the gated prefix draws attention from the first "
        "step on.",
        merge="no",
        merge_note="The gates depend on the input.",
        original="morningmoni/UniPELT",
        tiny={"length": 8, "hidden": 64, "bottleneck": 16},  # an MLP wider than the whole backbone otherwise
    ),
    Entry(
        name="autopeft",
        category="hybrid/automatic",
        title="AutoPEFT",
        cite="zhou2024autopeft",
        arxiv="2301.12132",
        summary="Multi-objective Bayesian optimization over layers, adapter sizes and prefix length yields a set of "
        "structures that trade score against parameters.",
        equation=r"\max_{c \in \mathcal{C}} \bigl(\mathrm{score}(c),\, -\mathrm{params}(c)\bigr),\qquad "
        r"c = \bigl(r_{\mathrm{serial}},\, r_{\mathrm{parallel}},\, m,\, z_1, \dots, z_L\bigr)",
        symbols=r"$r_{\mathrm{serial}}, r_{\mathrm{parallel}}$: bottlenecks; $m$: prefix length; "
        r"$z_{\ell} \in \{0, 1\}$: whether layer $\ell$ has modules; $\mathcal{C}$: the search space.",
        sites=("attention.key", "attention.value", "ffn.down"),
        form="attention + bottleneck",
        insertion="parallel + sequential",
        composition="gated + added",
        trains="Serial and parallel adapters of the layers that the structure switches on, and an MLP that makes their "
        "prefixes or those themselves.",
        count="(sum(layers) if layers else L) * (2 * d * (serial + parallel) + serial + parallel "
        "+ d * ((serial > 0) + (parallel > 0))) + (length > 0) * (length * d + (d + 1) * hidden "
        "+ 2 * (sum(layers) if layers else L) * d * (hidden + 1) if reparametrize "
        "else 2 * (sum(layers) if layers else L) * length * d)",
        start="changed",
        start_note="A structure with a prefix changes the output; one of adapters alone starts at the backbone's or "
        "near it.",
        merge="no",
        merge_note="Adapters are nonlinear and a prefix depends on the query.",
        life=("before training: search the structures, each scored by a training run of its own",),
        original="cambridgeltl/autopeft",
        tiny={
            "serial": 32,
            "parallel": 32,
            "length": 8,
            "hidden": 64,
        },  # adapters wider than the whole backbone otherwise
    ),
    Entry(
        name="s3delta",
        category="hybrid/automatic",
        title="S3Delta (sparse structure search)",
        cite="hu2022s3delta",
        arxiv="2206.07382",
        summary="Binary-concrete gates over candidate modules at every place are learned by bi-level optimization at a "
        "fixed expected budget; the chosen structure is then trained anew.",
        equation=r"\hat{z}_i = \sigma\bigl(\operatorname{logit} u + \operatorname{logit} p_i\bigr),\quad "
        r"p_i = \sigma\Bigl(\frac{\alpha_i - b}{\beta}\Bigr),\quad \sum_i p_i\, n_i = B",
        symbols=r"$\alpha_i$: trained structure parameter of candidate $i$; $n_i$: its number of parameters; "
        r"$b$: shift that makes the expected number equal the budget $B$; $u \sim \mathcal{U}(0, 1)$; "
        r"$\beta$: temperature.",
        sites=(
            "attention.query",
            "attention.key",
            "attention.value",
            "attention.output",
            "ffn.up",
            "ffn.down",
            "biases",
            "norms",
        ),
        form="low-rank + bottleneck + vector",
        insertion="parallel + sequential",
        composition="scaled + added + multiplied",
        trains="While searching, all candidates (LoRA, low-rank adapter, biases, norms) and their gates; afterwards "
        "the chosen ones, at most the budget.",
        count="int(budget * total)",
        start="changed",
        start_note="LoRA, biases and norms start at zero change, adapters at random maps, as in the original.",
        merge="no",
        merge_note="A structure with adapters is nonlinear; LoRA, biases and norms alone would fold.",
        life=(
            "calibrate: learn the gates and the candidates on two halves of the training batches, then keep the most "
            "probable candidates that fit the budget, from their start",
        ),
        original="thunlp/S3Delta",
        tiny={"budget": 0.0285, "steps": 1},  # 0.1 % is one candidate; no sum of sizes is 2.85 %; attached often
        exceptions={
            "count": "What trains is what the search chose; the formula is the budget, the most that it can be.",
        },
    ),
    Entry(
        name="s4",
        category="hybrid/automatic",
        title="S4 (design spaces)",
        cite="chen2023s4",
        arxiv="2301.01821",
        summary="Layers in four groups, small at both ends, share the budget evenly, and each group has its own set of "
        "modules.",
        equation=r"G_1: \{A, L\},\quad G_2: \{A, P\},\quad G_3: \{A, P, B\},\quad G_4: \{P, B, L\}",
        symbols=r"$G_1, \dots, G_4$: layer groups from the input to the output; $A$: adapter; $L$: LoRA; $P$: prefix; "
        r"$B$: biases.",
        sites=("attention.query", "attention.key", "attention.value", "ffn.down", "biases"),
        form="low-rank + attention + bottleneck + tensors",
        insertion="parallel + sequential + in place",
        composition="gated + scaled + added + replaced",
        trains="In every layer the modules of its group.",
        count="(lambda share, a, p, b, r: sum((round(sum(groups[:i + 1]) * L / sum(groups)) "
        "- round(sum(groups[:i]) * L / sum(groups))) * n for i, n in enumerate("
        "(a(share / 2) + r(share / 2), a(share / 2) + p(share / 2), "
        "a((share - b) / 2) + p((share - b) / 2) + b, p((share - b) / 2) + b + r((share - b) / 2)))))("
        "budget * total / L, lambda s: (2 * d + 1) * int((s - d) / (2 * d + 1)) + d, "
        "lambda s: 2 * d * int(s / (2 * d)), 7 * d + f, lambda s: 4 * d * int(s / (4 * d)))",
        start="changed",
        start_note="The prefixes draw attention from the first step on.",
        merge="no",
        merge_note="Adapters are nonlinear and a prefix depends on the query.",
        original="amazon-science/peft-design-spaces",
        tiny={
            "budget": 0.1,
            "groups": (1, 0, 0, 1),
        },  # two layers with all four methods; 0.5 % is less than their biases
    ),
)
