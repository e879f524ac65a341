"""Partial fine-tuning: a part of the backbone's own parameters trains, and nothing is added."""

from __future__ import annotations

from peftlib.taxonomy.types import Category, Entry

CATEGORIES = (
    Category(
        "partial",
        "Partial fine-tuning",
        "A part of the backbone's own parameters trains; the network keeps its shape and speed.",
    ),
    Category(
        "partial/bias",
        "Bias update",
        "The bias vectors train, or the most useful of them.",
        chapter="20_bias_update",
    ),
    Category(
        "partial/pretrained_weight_masking",
        "Pretrained weight masking",
        "A mask over the pretrained weights is learned, or chosen by importance.",
        chapter="21_weight_masking",
    ),
    Category(
        "partial/delta_weight_masking",
        "Delta weight masking",
        "A mask over the change of the weights says which entries may move.",
        chapter="21_weight_masking",
    ),
)

METHODS = (
    Entry(
        name="bitfit",
        category="partial/bias",
        title="BitFit",
        cite="zaken2022bitfit",
        arxiv="2106.10199",
        summary="Only the bias terms of the backbone train.",
        equation=r"y = W x + b,\qquad W \text{ frozen},\quad b \text{ trained}",
        symbols=r"$W \in \mathbb{R}^{o \times i}$: any linear map; $b \in \mathbb{R}^{o}$: its bias; norms have a "
        r"trained shift as well.",
        sites=("biases",),
        form="tensors",
        insertion="in place",
        composition="replaced",
        trains="Every bias vector: of attention, feed-forward blocks and norms.",
        count="L * (d + f) if queries_and_inner else L * (7 * d + f) + d + d * pooler",
        start="identity",
        start_note="Nothing is added.",
        merge="exact",
        merge_note="The biases are the backbone's own; there is nothing to fold.",
        original="benzakenelad/BitFit",
    ),
    Entry(
        name="u_bitfit",
        category="partial/bias",
        title="U-BitFit",
        cite="lawton2023",
        arxiv="2305.16597",
        summary="Unstructured pruning of BitFit: only the bias entries whose change matters most keep training.",
        equation=r"b = b_0 + z \odot \delta,\qquad z = \operatorname{top}_{k}(s),\qquad "
        r"s_i = \Bigl|\delta_i\, \frac{\partial \mathcal{L}}{\partial \delta_i}\Bigr|",
        symbols=r"$b_0$: pretrained biases; $\delta$: their change; $s$: first-order estimate of the loss change when "
        r"an entry is set back; $z$: binary mask with $k$ ones.",
        sites=("biases",),
        form="entries",
        insertion="in place",
        composition="replaced",
        trains="The chosen bias entries, as values with indices, and the task head; the search trains all biases.",
        count="int(density * (L * (7 * d + f) + d + d * pooler))",
        start="identity",
        start_note="Everything is rewound before the chosen biases train.",
        merge="exact",
        merge_note="The values are the backbone's own biases.",
        life=("calibrate: train all biases, prune their change to the budget by first-order scores, rewind",),
        tiny={"density": 0.9},  # half of a tiny model's few hundred biases do not tell eight texts apart
    ),
    Entry(
        name="s_bitfit",
        category="partial/bias",
        title="S-BitFit",
        cite="lawton2023",
        arxiv="2305.16597",
        summary="Structured pruning of BitFit: whole bias vectors are kept or set back.",
        equation=r"b_j = b_{0,j} + z_j\, \delta_j,\qquad s_j = \Bigl|\sum_{i} \delta_{j,i}\, "
        r"\frac{\partial \mathcal{L}}{\partial \delta_{j,i}}\Bigr|",
        symbols=r"$\delta_j$: change of the $j$-th bias vector; $z_j \in \{0, 1\}$: whether it is kept; $s_j$: its "
        r"score.",
        sites=("biases",),
        form="tensors",
        insertion="in place",
        composition="replaced",
        trains="The chosen bias vectors and the task head; the search trains all biases.",
        count="int(density * (L * (7 * d + f) + d + d * pooler)) // d * d",
        start="identity",
        start_note="Everything is rewound before the chosen biases train.",
        merge="exact",
        merge_note="The values are the backbone's own biases.",
        life=("calibrate: train all biases, prune whole vectors of their change to the budget, rewind",),
        tiny={"density": 0.9},
    ),
    Entry(
        name="threshold_mask",
        category="partial/pretrained_weight_masking",
        title="Threshold mask",
        cite="zhao2020masking",
        arxiv="2004.12406",
        summary="A binary mask over the frozen weights is learned through real-valued scores and a threshold.",
        equation=r"y = (W \odot M)\, x + b,\qquad M = \bigl[\,S > \tau\,\bigr]",
        symbols=r"$W \in \mathbb{R}^{o \times i}$: frozen weight; $S \in \mathbb{R}^{o \times i}$: trained scores; "
        r"$\tau$: threshold; the gradient passes the step unchanged (straight-through).",
        sites=(
            "attention.query",
            "attention.key",
            "attention.value",
            "attention.output",
            "ffn.up",
            "ffn.gate",
            "ffn.down",
        ),
        form="entries",
        insertion="in place",
        composition="multiplied",
        trains="One score a masked weight; stored is one bit each.",
        count="L * (4 * d * d + 2 * d * f)",
        start="changed",
        start_note="A share of the weights, set by the initial sparsity, is masked at the start.",
        merge="exact",
        merge_note="The masked weight replaces the weight.",
        life=("every forward: binarize the scores, with a straight-through gradient",),
        original="ptlmasking/maskbert",
    ),
    Entry(
        name="fish_mask",
        category="partial/pretrained_weight_masking",
        title="FISH mask",
        cite="sung2021fish",
        arxiv="2111.09839",
        summary="The entries with the largest empirical Fisher information on a few samples train; the rest is frozen "
        "throughout.",
        equation=r"\hat{F}_i = \frac{1}{N} \sum_{n=1}^{N} "
        r"\bigl(\nabla_{\theta_i} \log p_{\theta}(y_n \mid x_n)\bigr)^2,\qquad "
        r"\theta_i = \begin{cases} v_i & i \in \operatorname{top}_{k} \hat{F} \\ \theta_{0,i} & \text{else}\end{cases}",
        symbols=r"$N$: samples, each with a gradient of its own; $v \in \mathbb{R}^{k}$: trained values of the chosen "
        r"entries; $k$: a fixed share of all parameters.",
        sites=("weights", "biases", "norms", "embeddings"),
        form="entries",
        insertion="in place",
        composition="replaced",
        trains="The chosen k entries, as values with indices, and the task head, which is charged to the budget.",
        count="int(density * (total + head)) - head * charge_head",
        start="identity",
        start_note="The values start as the weights' own.",
        merge="exact",
        merge_note="The values are the weights' own entries.",
        life=("calibrate: sum squared gradients sample by sample, then fix the mask",),
        original="varunnair18/FISH",
        tiny={"density": 0.1},  # 0.5 % of a tiny model is less than its head
    ),
    Entry(
        name="lt_sft",
        category="partial/delta_weight_masking",
        title="LT-SFT",
        cite="ansell2022",
        arxiv="2110.07560",
        summary="Lottery-ticket sparse fine-tuning: train all, take the entries that moved most, rewind, train those; "
        "the sparse vectors of tasks and languages add up.",
        equation=r"\theta = \theta_0 + \phi,\quad \|\phi\|_0 = K;\qquad "
        r"\theta_{\mathrm{task} + \mathrm{lang}} = \theta_0 + \phi_{\mathrm{task}} + \phi_{\mathrm{lang}}",
        symbols=r"$\phi$: sparse difference with the $K$ entries that moved most in a first, full training.",
        sites=("weights", "biases", "norms", "embeddings"),
        form="entries",
        insertion="in place",
        composition="replaced",
        trains="The K chosen entries, as values with indices, and the task head; the first phase, which chooses them, "
        "trains everything and needs the memory of full fine-tuning.",
        count="int(density * total)",
        start="identity",
        start_note="Everything is rewound before the chosen entries train.",
        merge="exact",
        merge_note="The values are the weights' own entries.",
        life=(
            "calibrate: train everything, choose the entries that moved most, rewind all weights",
            "vectors of other tasks or languages are added to the trained one",
        ),
        original="cambridgeltl/composable-sft",
    ),
    Entry(
        name="child_tuning_f",
        category="partial/delta_weight_masking",
        title="Child-Tuning F",
        cite="xu2021childtuning",
        arxiv="2109.05687",
        summary="Every step a random subset of the gradient entries is used and rescaled.",
        equation=r"\theta \leftarrow \theta - \eta\, \frac{M_t}{p} \odot \nabla_{\theta} \mathcal{L},\qquad "
        r"M_t \sim \mathrm{Bernoulli}(p)",
        symbols=r"$M_t$: mask of the parameters' shape, drawn anew at step $t$; $p$: share of entries that is kept.",
        sites=("weights", "biases", "norms", "embeddings"),
        form="entries",
        insertion="in place",
        composition="replaced",
        trains="All parameters, a random share at each step.",
        count="total",
        start="identity",
        start_note="Nothing is added.",
        merge="exact",
        merge_note="There is nothing to fold: the backbone itself is trained.",
        life=("on_gradients: multiply by a fresh Bernoulli mask and divide by p",),
        original="alibaba/AliceMind",
        tiny={"density": 0.7},  # of a head's two biases one must pass once in three steps
    ),
    Entry(
        name="child_tuning_d",
        category="partial/delta_weight_masking",
        title="Child-Tuning D",
        cite="xu2021childtuning",
        arxiv="2109.05687",
        summary="A child network, the encoder entries with the largest Fisher information on the task, is chosen once "
        "and trained.",
        equation=r"\theta \leftarrow \theta - \eta\, M \odot \nabla_{\theta} \mathcal{L},\qquad "
        r"M = \bigl[\,F \ge F_{(1-p)}\,\bigr],\quad "
        r"F_i = \frac{1}{|\mathcal{B}|} \sum_{\beta \in \mathcal{B}} \bigl(\nabla_{\theta_i} "
        r"\mathcal{L}_{\beta}\bigr)^2",
        symbols=r"$F$: Fisher information, averaged over batches $\beta$; $F_{(1-p)}$: its quantile over all encoder "
        r"layers; $p$: share of entries that train.",
        sites=("weights", "biases", "norms", "embeddings"),
        form="entries",
        insertion="in place",
        composition="replaced",
        trains="The chosen share of the layers' entries, as values; embeddings, pooler and head fully.",
        count="train_rest * (total - L * (4 * d * d + 2 * d * f + 9 * d + f)) "
        "+ int(density * L * (4 * d * d + 2 * d * f + 9 * d + f))",
        start="identity",
        start_note="The values start as the weights' own.",
        merge="exact",
        merge_note="There is nothing to fold: the backbone's own entries are trained.",
        life=("calibrate: average the squared gradients of batches, then fix the mask",),
        original="alibaba/AliceMind",
    ),
    Entry(
        name="diff_pruning",
        category="partial/delta_weight_masking",
        title="Diff pruning",
        cite="guo2021diff",
        arxiv="2012.07463",
        summary="A sparse difference is learned with hard-concrete gates and an L0 penalty, cut to the exact density "
        "and tuned once more.",
        equation=r"\theta = \theta_0 + z \odot w,\qquad "
        r"z = \min\bigl(1, \max\bigl(0,\, \sigma(\operatorname{logit} u + \alpha)(r - l) + l\bigr)\bigr),\qquad "
        r"\mathcal{L} + \lambda \sum_i \sigma\Bigl(\alpha_i - \log \frac{-l}{r}\Bigr)",
        symbols=r"$w$: change of every parameter; $\alpha$: gate parameters, one an entry and, in the structured form, "
        r"one more a tensor; $u \sim \mathcal{U}(0, 1)$; $l < 0 < 1 < r$: stretch; $\lambda$: price of a non-zero.",
        sites=("weights", "biases", "norms", "embeddings"),
        form="entries",
        insertion="in place",
        composition="replaced",
        trains="The k entries that the projection keeps, as values with indices, and the task head; the first phase "
        "trains a change and a gate of every entry and needs more memory than full fine-tuning.",
        count="int(density * total)",
        start="changed",
        start_note="The difference starts at zero, and the k entries go on from where the first phase has left it.",
        merge="exact",
        merge_note="The values are the weights' own entries.",
        life=("calibrate: train change and gates under the price of non-zeros, project to the density, fix the mask",),
        original="dguo98/DiffPruning",
    ),
    Entry(
        name="sam",
        category="partial/delta_weight_masking",
        title="SAM (second-order approximation)",
        cite="fu2023sam",
        arxiv="2211.15583",
        summary="The entries with the largest accumulated task gradient at the pretrained point train, which a "
        "second-order view of the loss singles out.",
        equation=r"M = \operatorname{top}_{k}\Bigl(\bigl(\sum_{t} \nabla_{\theta} "
        r"\mathcal{L}_t(\theta_0)\bigr)^2\Bigr),\qquad \theta = \theta_0 + M \odot \delta",
        symbols=r"$\mathcal{L}_t$: loss on batch $t$; $M$: binary mask, chosen within each parameter tensor; "
        r"$\delta$: trained change.",
        sites=("weights", "biases", "norms", "embeddings"),
        form="entries",
        insertion="in place",
        composition="replaced",
        trains="The chosen share of every tensor's entries, as values with indices, and the task head.",
        count="int(density * total)",
        start="identity",
        start_note="The values start as the weights' own.",
        merge="exact",
        merge_note="The values are the weights' own entries.",
        life=("calibrate: accumulate gradients without updates, then fix the mask",),
        original="fuzihaofzh/AnalyzeParameterEfficientFinetune",
    ),
)
