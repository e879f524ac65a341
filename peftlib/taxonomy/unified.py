"""Unified fine-tuning: one recipe that serves several kinds of modules."""

from __future__ import annotations

from peftlib.taxonomy.types import Category, Entry

CATEGORIES = (
    Category(
        "unified",
        "Unified fine-tuning",
        "One recipe that serves several kinds of modules: a mixture, a pruning or a mask over adapters, prefixes and "
        "LoRA alike.",
        chapter="50_unified",
    ),
)

METHODS = (
    Entry(
        name="adamix",
        category="unified",
        title="AdaMix",
        cite="wang2022adamix",
        arxiv="2205.12410",
        summary="Several adaptation modules at each place, of which every pass draws one at random; a consistency loss "
        "ties two passes together and the modules are averaged into one at the end.",
        equation=r"h \leftarrow h + W_{\mathrm{up}}\, \sigma\bigl(W_{\mathrm{down}}^{(i)} h\bigr),\quad "
        r"i \sim \mathcal{U}\{1,\dots,M\};\qquad "
        r"\mathcal{L} + \tfrac{w}{2}\bigl(\mathrm{KL}(p\,\|\,q) + \mathrm{KL}(q\,\|\,p)\bigr)",
        symbols=r"$W_{\mathrm{down}}^{(i)} \in \mathbb{R}^{r \times d}$: the $M$ down-projections; "
        r"$W_{\mathrm{up}} \in \mathbb{R}^{d \times r}$: the shared up-projection; $p, q$: predictions of two passes; "
        r"$w$: weight of the consistency loss.",
        sites=("ffn.down",),
        form="bottleneck",
        insertion="sequential",
        composition="added",
        trains="M down-projections and one up-projection a layer; after training one of each remains.",
        count="L * (experts * (d * bottleneck + bottleneck) + bottleneck * d + d) if form == 'adapter' else "
        "L * len(targets) * (experts + 1) * d * rank",
        start="near",
        start_note="Both projections start at N(0, 0.02), as in the paper.",
        merge="no",
        merge_note="The M modules become one adapter, but its nonlinearity keeps that out of the backbone's weights. "
        "The LoRA form alone merges.",
        life=(
            "every training forward: draw the module of each place, for each of two passes",
            "penalty: symmetric KL divergence between the two passes' predictions, the targets detached",
            "on_train_end: average the modules into one",
        ),
        original="microsoft/AdaMix",
    ),
    Entry(
        name="sparse_adapter",
        category="unified",
        title="SparseAdapter",
        cite="he2022sparse",
        arxiv="2210.04284",
        summary="Adapters are pruned before training by a score such as SNIP, so that a wider bottleneck costs the "
        "same budget.",
        equation=r"h \leftarrow h + (M_{\mathrm{up}} \odot W_{\mathrm{up}})\, "
        r"\sigma\bigl((M_{\mathrm{down}} \odot W_{\mathrm{down}})\, \mathrm{LN}(h)\bigr),\quad "
        r"M = \bigl[\,s \ge \tau\,\bigr],\ s_{\mathrm{SNIP}} = \Bigl|\tfrac{\partial \mathcal{L}}{\partial m}\Bigr|",
        symbols=r"$M$: binary masks, fixed before training; $s$: score of an entry; $\tau$: threshold that keeps the "
        r"wanted share of all entries.",
        sites=("attention.output", "ffn.down"),
        form="bottleneck",
        insertion="sequential",
        composition="added",
        trains="The entries of the adapters that the mask keeps, their biases and the norms on their inputs.",
        count="(lambda adapters, entries: adapters * (bottleneck + d + 2 * d * norm) + (int(density * sum("
        "n * s for n, s in entries)) if scope == 'global' else sum(n * int(density * s) for n, s in entries)))("
        "{'adapter': 2 * L, 'lora': 0, 'mam': L}[form], {'adapter': [(4 * L, d * bottleneck)], "
        "'lora': [(2 * L * len(targets), d * rank)], 'mam': [(2 * L, d * bottleneck)]}[form]) + "
        "(length * d + (d + 1) * hidden + 2 * L * d * (hidden + 1) if form == 'mam' else 0)",
        start="near",
        start_note="Both projections start at N(0, 0.02): with a zero up-projection every SNIP score is zero.",
        merge="no",
        merge_note="A pruned adapter is still nonlinear, so it stays beside the backbone's weights.",
        life=("calibrate: score every entry on training batches, then fix the mask",),
        original="Shwai-He/SparseAdapter",
        tiny={"dropout": 0.0},  # some checks compare two runs of the same steps
    ),
    Entry(
        name="propetl",
        category="unified",
        title="ProPETL",
        cite="zeng2023propetl",
        arxiv="2305.17682",
        summary="One prototype module is shared by all layers, and each layer (and task) learns a binary mask that "
        "picks its own subnetwork from it.",
        equation=r"\theta_{\ell} = \theta_{\mathrm{pro}} \odot M_{\ell},\qquad "
        r"M_{\ell} = \operatorname{top}_{k}\bigl(|S_{\ell}|\bigr)",
        symbols=r"$\theta_{\mathrm{pro}}$: the prototype's weights (adapter, prefix or LoRA); $S_{\ell}$: trained "
        r"scores of layer $\ell$, of the prototype's shape; $M_{\ell}$: their binary mask, with $k$ entries kept in "
        r"each tensor. With several tasks, the mask is $\max(M_{\ell}, M_t)$ for a row of task $t$.",
        sites=("attention.query", "attention.key", "attention.value", "ffn.down"),
        form="bottleneck",
        insertion="sequential",
        composition="added + multiplied",
        trains="The prototype and the scores of every layer; stored are the prototype and one bit a score.",
        count="(L + 1) * 2 * d * bottleneck + bottleneck + d if form == 'adapter' else "
        "length * d + (d + 1) * hidden + 2 * d * (hidden + 1) + 2 * L * length * d if form == 'prefix' else "
        "(L + 1) * len(targets) * 2 * d * rank",
        start="near",
        start_note="An adapter starts at small weights. LoRA starts as the identity, and a prefix changes the output.",
        merge="no",
        merge_note="An adapter is nonlinear and a prefix depends on the query; the LoRA form alone merges.",
        life=(
            "every forward: binarize the scores, with a straight-through gradient",
            "the scores train with a learning rate of their own",
        ),
        original="ChaosCodes/ProPETL",
    ),
)
