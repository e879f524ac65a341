"""Reparameterized fine-tuning: the change of a weight is written with few numbers."""

from __future__ import annotations

from peftlib.taxonomy.types import Category, Entry

CATEGORIES = (
    Category(
        "reparameterized",
        "Reparameterized fine-tuning",
        "The change of a weight is written with few numbers, and folds back into the weight.",
    ),
    Category(
        "reparameterized/low_rank",
        "Low-rank decomposition",
        "The change lives in a low-dimensional subspace, a low-rank product or a Kronecker product.",
        chapter="30_low_rank",
    ),
    Category(
        "reparameterized/lora",
        "LoRA derivatives",
        "What grew out of LoRA.",
    ),
    Category(
        "reparameterized/lora/rank_adjustment",
        "Rank adjustment",
        "The rank is drawn, cut or grown while training.",
        chapter="31_lora_rank",
    ),
    Category(
        "reparameterized/lora/weight_update",
        "LoRA-guided weight update",
        "The low-rank factors steer updates or pruning of the pretrained weights.",
        chapter="32_lora_weight_update",
    ),
    Category(
        "reparameterized/lora/quantization",
        "Quantization adaptation",
        "The frozen weights are kept in few bits, the update in full precision.",
        chapter="33_lora_quantization",
    ),
    Category(
        "reparameterized/lora/improvements",
        "LoRA-based improvements",
        "Finer structure, calibrated predictions or less activation memory.",
        chapter="34_lora_improvements",
    ),
    Category(
        "reparameterized/lora/multitask",
        "LoRA-based multi-task fine-tuning",
        "Several LoRA modules are mixed, gated or added for several tasks.",
        chapter="35_lora_multitask",
    ),
)

_LINEARS = (
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.output",
    "ffn.up",
    "ffn.gate",
    "ffn.down",
)
_PRODUCT_FOLDS = "The scaled product is added to the weight."

METHODS = (
    Entry(
        name="intrinsic_said",
        category="reparameterized/low_rank",
        title="Intrinsic SAID",
        cite="aghajanyan2021",
        arxiv="2012.13255",
        summary="All parameters move inside a random subspace of a few hundred dimensions, reached by a Fastfood "
        "transform, with one trained scale a group.",
        equation=r"\theta_{\ell} = \theta_{0,\ell} + \lambda_{\ell}\, P_{\ell} z,\qquad "
        r"P_{\ell} z \propto H\, G\, \Pi\, H\, B\, z",
        symbols=r"$z$: the trained point, shared by all groups $\ell$; $\lambda_{\ell}$: trained scale of a group; "
        r"$H$: Walsh-Hadamard transform; $G$: Gaussian diagonal; $\Pi$: permutation; $B$: diagonal of random signs.",
        sites=("weights", "biases", "norms", "embeddings"),
        form="projection",
        insertion="in place",
        composition="gated",
        trains="The point and the groups' scales; their sum is the dimension d'.",
        count="dimension",
        start="identity",
        start_note="The point starts at zero.",
        merge="exact",
        merge_note="The projected point is added to the weights.",
        life=("every forward: project the point, in memory linear in the number of parameters",),
    ),
    Entry(
        name="lora",
        category="reparameterized/low_rank",
        title="LoRA",
        cite="hu2022lora",
        arxiv="2106.09685",
        summary="A product of two thin matrices is added beside frozen linear maps.",
        equation=r"y = W x + \frac{\alpha}{r}\, B A x",
        symbols=r"$W \in \mathbb{R}^{o \times i}$: frozen weight; $A \in \mathbb{R}^{r \times i}$, "
        r"$B \in \mathbb{R}^{o \times r}$: trained factors; $\alpha$: scale; $r$: rank.",
        sites=("attention.query", "attention.value"),
        form="low-rank",
        insertion="parallel",
        composition="scaled",
        trains="The two factors of every targeted matrix.",
        count="2 * L * 2 * d * rank",
        start="identity",
        start_note="B starts at zero.",
        merge="exact",
        merge_note=_PRODUCT_FOLDS,
        original="microsoft/LoRA",
    ),
    Entry(
        name="krona",
        category="reparameterized/low_rank",
        title="KronA",
        cite="edalati2022krona",
        arxiv="2212.10650",
        summary="A Kronecker product of two small matrices takes the place of LoRA's low-rank product.",
        equation=r"y = W x + s\, (A \otimes B)\, x",
        symbols=r"$A \in \mathbb{R}^{k \times k}$, $B \in \mathbb{R}^{\frac{o}{k} \times \frac{i}{k}}$: trained "
        r"factors, applied without forming the product; $s$: scale.",
        sites=("attention.query", "attention.value"),
        form="low-rank",
        insertion="parallel",
        composition="scaled",
        trains="The two factors of every targeted matrix, or of every feed-forward block in the forms beside it.",
        count="L * (2 if form == 'krona' else 1) * (factor * factor + (d // factor) * (d // factor)) "
        "+ L * (form == 'krona_b_res')",
        start="identity",
        start_note="B starts at zero.",
        merge="exact",
        merge_note="The scaled Kronecker product is added to the weight (the form beside attention's projections).",
        tiny={"factor": 8},  # 32 does not divide every matrix of a tiny model
    ),
    Entry(
        name="dylora",
        category="reparameterized/lora/rank_adjustment",
        title="DyLoRA",
        cite="valipour2023",
        arxiv="2210.07558",
        summary="A rank is drawn at every step and only that many components are used, so that any smaller rank can "
        "be cut out after training.",
        equation=r"y = W x + \frac{\alpha}{b}\, B_{:,\, :b}\, A_{:b,\, :}\, x,\qquad b \sim \mathcal{U}\{1, \dots, r\}",
        symbols=r"$A \in \mathbb{R}^{r \times i}$, $B \in \mathbb{R}^{o \times r}$: trained factors; $b$: the rank of "
        r"this step; of its components only the last, $b$, gets a gradient.",
        sites=("attention.query", "attention.value"),
        form="low-rank",
        insertion="parallel",
        composition="scaled",
        trains="The two factors of every targeted matrix, one component a step: the last of the drawn rank.",
        count="2 * L * 2 * d * rank",
        start="identity",
        start_note="B starts at zero.",
        merge="exact",
        merge_note="The first b components are added to the weight, scaled by alpha / b.",
        life=("on_step_start: draw the rank",),
        original="huawei-noah/Efficient-NLP",
        tiny={"rank": 2},  # of three steps two draw the same component: A learns where B is no longer zero
    ),
    Entry(
        name="adalora",
        category="reparameterized/lora/rank_adjustment",
        title="AdaLoRA",
        cite="zhang2023adalora",
        arxiv="2303.10512",
        summary="Updates are kept in the form of a singular value decomposition, and a cubic schedule prunes the least "
        "important singular values of all matrices to one budget.",
        equation=r"y = W x + \frac{\alpha}{r}\, P \Lambda Q\, x,\qquad "
        r"\mathcal{L} + \gamma \bigl(\|P^{\top} P - I\|_F + \|Q Q^{\top} - I\|_F\bigr)",
        symbols=r"$P \in \mathbb{R}^{o \times r}$, $\Lambda \in \mathbb{R}^{r}$ (diagonal), "
        r"$Q \in \mathbb{R}^{r \times i}$: trained; $r$: the initial rank; $\gamma$: weight of the orthogonality "
        r"penalty, a mean over all matrices.",
        sites=_LINEARS,
        form="low-rank",
        insertion="parallel",
        composition="scaled",
        trains="The three factors of every targeted matrix at the initial rank.",
        count="L * rank * (8 * d + 2 * (d + f) + 6)",
        start="identity",
        start_note="The singular values start at zero.",
        merge="exact",
        merge_note=_PRODUCT_FOLDS,
        life=(
            "penalty: orthogonality of P and Q",
            "on_gradients: smoothed sensitivity and its uncertainty",
            "on_step_end: zero the least important singular values, so that exactly the budget remains",
        ),
        original="QingruZhang/AdaLoRA",
        tiny_rate=0.03,
    ),
    Entry(
        name="increlora",
        category="reparameterized/lora/rank_adjustment",
        title="IncreLoRA",
        cite="zhang2023increlora",
        arxiv="2308.12043",
        summary="Every matrix starts at rank one, and ranks grow where the importance is highest until the budget is "
        "spent; the next component is trained in advance.",
        equation=r"y = W x + \frac{\alpha}{r_k} \sum_{j=1}^{r_k + 1} \lambda_{k,j}\, b_{k,j} a_{k,j}^{\top} x,\qquad "
        r"S_k = \operatorname{mean} \Bigl|\Delta W_k \odot \frac{\partial \mathcal{L}}{\partial \Delta W_k}\Bigr|",
        symbols=r"$a_{k,j} \in \mathbb{R}^{i}$, $b_{k,j} \in \mathbb{R}^{o}$, $\lambda_{k,j}$: component $j$ of matrix "
        r"$k$; $r_k$: its current rank; component $r_k + 1$ is the reserve, with a tiny fixed $\lambda$.",
        sites=_LINEARS,
        form="low-rank",
        insertion="parallel",
        composition="scaled",
        trains="One component and the reserve of every matrix at first; at the end the budget's components. Counted is "
        "the room for as many as the rounds can bring one matrix.",
        count="min(d, 1 + grow * max(1, ceil(6 * L * (target_rank - 1) / (min(top, 6 * L) * grow)))) "
        "* L * (8 * d + 2 * (d + f) + 6)",
        start="near",
        start_note="The reserve components act with a weight of 1e-5.",
        merge="exact",
        merge_note="The active components are added to the weight.",
        life=(
            "penalty: orthogonality of the components",
            "on_gradients: importance of every matrix, smoothed",
            "on_step_end: give rank to the most important matrices, and drop the unused reserves at the budget",
            "learning rate: what begins to train in a round has the schedule for itself, over the steps that are left",
        ),
        original="FeiyuZhang98/IncreLoRA",
        tiny_rate=0.01,
    ),
    Entry(
        name="delta_lora",
        category="reparameterized/lora/weight_update",
        title="Delta-LoRA",
        cite="zi2023deltalora",
        arxiv="2309.02411",
        summary="The pretrained weight follows the change of the low-rank product from step to step, without a "
        "gradient or optimizer state of its own.",
        equation=r"W_{t+1} = W_t + \lambda\, \frac{\alpha}{r}\, \bigl(B_{t+1} A_{t+1} - B_t A_t\bigr)",
        symbols=r"$A_t \in \mathbb{R}^{r \times i}$, $B_t \in \mathbb{R}^{o \times r}$: LoRA's factors after step $t$; "
        r"$\lambda$: how far the weight follows; it starts after a warm-up of $K$ steps.",
        sites=("attention.query", "attention.value"),
        form="low-rank + tensors",
        insertion="parallel + in place",
        composition="scaled + replaced",
        trains="LoRA's factors; the targeted weights move with them.",
        count="2 * L * 2 * d * rank",
        start="identity",
        start_note="B starts at zero.",
        merge="exact",
        merge_note="The scaled product is added to the weight that has already moved.",
        life=("on_step_end: after the warm-up, add the change of the product to the weight",),
    ),
    Entry(
        name="lora_prune",
        category="reparameterized/lora/weight_update",
        title="LoRAPrune",
        cite="zhang2023loraprune",
        arxiv="2305.18403",
        summary="Heads and feed-forward channels are removed by scores that LoRA's gradients and weights give, which "
        "leaves a smaller and faster model.",
        equation=r"\frac{\partial \mathcal{L}}{\partial W} \approx g_B A + B g_A - g_B g_A,\qquad "
        r"s = \Bigl|\widehat{\frac{\partial \mathcal{L}}{\partial W}} \odot (W + B A)\Bigr|",
        symbols=r"$g_A, g_B$: gradients of LoRA's factors $A, B$; $s$: importance of a weight, summed over a head or a "
        r"channel, of unit norm a matrix (option: squares, without the norm), and smoothed over steps.",
        sites=("attention.heads", *_LINEARS),
        form="low-rank + entries",
        insertion="parallel + in place",
        composition="scaled + multiplied",
        trains="LoRA's factors on all linear maps, before the cut.",
        count="L * rank * (8 * d + 2 * (d + f))",
        start="identity",
        start_note="B starts at zero and nothing is pruned yet.",
        merge="exact",
        merge_note="Masked heads and channels are cut away and the products are added to what is left, a smaller "
        "model.",
        life=(
            "on_gradients: importance of heads and channels",
            "on_step_end: mask more of them along a cubic schedule",
            "on_train_end: cut them out of the weights",
        ),
        original="aim-uofa/LoRAPrune",
        # A few steps; of two layers, and of the only one when it compiles; two runs of the same steps are compared.
        tiny={"interval": 1, "spare_last": 0, "dropout": 0.0},
        tiny_rate=0.01,
        exceptions=dict.fromkeys(
            ("merge on t5", "merge on mt5"),
            "The layers share one position bias with a row for every head, so attention modules that lost heads keep a "
            "part that chooses their rows; the outputs are equal.",
        ),
    ),
    Entry(
        name="qlora",
        category="reparameterized/lora/quantization",
        title="QLoRA",
        cite="dettmers2023qlora",
        arxiv="2305.14314",
        summary="The frozen weights are kept in 4-bit NormalFloat with quantized scales, and LoRA trains on every "
        "linear map.",
        equation=r"y = \operatorname{deq}\bigl(c_1,\, c_2,\, W^{\mathrm{NF4}}\bigr)\, x + \frac{\alpha}{r}\, B A x",
        symbols=r"$W^{\mathrm{NF4}}$: 4-bit codes in blocks of 64; $c_2$: the blocks' 8-bit scales; $c_1$: scales of "
        r"these scales; $A \in \mathbb{R}^{r \times i}$, $B \in \mathbb{R}^{o \times r}$: trained factors.",
        sites=_LINEARS,
        form="low-rank",
        insertion="parallel",
        composition="scaled",
        trains="LoRA's factors on every linear map of the layers.",
        count="L * rank * (8 * d + 2 * (d + f))",
        start="near",
        start_note="B starts at zero, so the output is exactly that of the quantized backbone.",
        merge="exact",
        merge_note="The product is added to the dequantized weight, which then is a plain, unquantized one.",
        life=("attach: quantize the frozen weights",),
        original="artidoro/qlora",
        tiny={"rank": 8},  # rank 64 is wider than a tiny model
    ),
    Entry(
        name="qa_lora",
        category="reparameterized/lora/quantization",
        title="QA-LoRA",
        cite="xu2024qalora",
        arxiv="2309.14717",
        summary="LoRA sees its input pooled over the quantization groups, so that the update folds into the zero "
        "points of the low-bit weight.",
        equation=r"y = \tilde{W} x + s\, B A\, \operatorname{pool}_{g}(x)",
        symbols=r"$\tilde{W}$: group-wise INT4 weight with scales and zero points; $\operatorname{pool}_{g}$: mean "
        r"over groups of $g$ inputs; $A \in \mathbb{R}^{r \times i/g}$, $B \in \mathbb{R}^{o \times r}$: trained.",
        sites=_LINEARS,
        form="low-rank",
        insertion="parallel",
        composition="scaled",
        trains="LoRA's factors; A has one column a group.",
        count="L * rank * (4 * (d // group + d) + (d // group + f) + (f // group + d))",
        start="near",
        start_note="B starts at zero, so the output is exactly that of the quantized backbone.",
        merge="exact",
        merge_note="The update is constant within a group and moves the zero points, which are floats.",
        life=("attach: quantize the frozen weights",),
        original="yuhuixu1993/qa-lora",
        tiny={"rank": 8, "group": 8},  # groups of 32 inputs leave a tiny model one or two
        tiny_rate=0.01,
    ),
    Entry(
        name="loftq",
        category="reparameterized/lora/quantization",
        title="LoftQ",
        cite="li2024loftq",
        arxiv="2310.08659",
        summary="Quantization and a low-rank fit of its error alternate, so that the quantized weight plus LoRA's "
        "start is close to the original weight.",
        equation=r"\min_{Q, A, B} \bigl\|W - Q - B A\bigr\|_F,\qquad "
        r"Q_t = q\bigl(W - B_{t-1} A_{t-1}\bigr),\quad B_t A_t = \operatorname{SVD}_r\bigl(W - Q_t\bigr)",
        symbols=r"$q$: quantization to $N$ bits and back; $\operatorname{SVD}_r$: best rank-$r$ approximation, split "
        r"evenly between the factors.",
        sites=_LINEARS,
        form="low-rank",
        insertion="parallel",
        composition="scaled",
        trains="LoRA's factors on every linear map of the layers, from that start.",
        count="L * rank * (8 * d + 2 * (d + f))",
        start="near",
        start_note="Quantized weight and factors together approximate the weight, closer than quantization alone.",
        merge="exact",
        merge_note="The product is added to the dequantized weight, which then is a plain, unquantized one.",
        life=("attach: alternate quantization and decomposition, and keep the best iterate",),
        original="yxli2123/LoftQ",
        tiny={"rank": 8, "alpha": 8.0, "iterations": 1},  # the same; and every check attaches several times
    ),
    Entry(
        name="kernel_mix",
        category="reparameterized/lora/improvements",
        title="Kernel-mix",
        cite="chen2022kernel",
        arxiv="2205.03720",
        summary="Each attention head has a low-rank update of its own beside one shared by all heads, on queries, "
        "values and outputs.",
        equation=r"Q_h \mathrel{+}= B_h A_h x + [\,\bar{B} \bar{A} x\,]_h,\quad "
        r"V_h \mathrel{+}= B'_h A'_h k_h + [\,\bar{B}' \bar{A}' x\,]_h,\quad "
        r"O \mathrel{+}= B'' [\,A''_h o_h\,]_h + \bar{B}'' \bar{A}'' o",
        symbols=r"$A_h \in \mathbb{R}^{r_q \times d}$, $B_h \in \mathbb{R}^{p \times r_q}$ with $p = d / H$: factors "
        r"of head $h$; barred factors: shared by all heads; $k_h$: the head's key; $o_h$: the head's output; biases "
        r"are left out.",
        sites=("attention.query", "attention.value", "attention.output", "attention.heads"),
        form="low-rank",
        insertion="parallel",
        composition="added",
        trains="Factors of each head, shared factors, and a bias for each of the three maps that has one.",
        count="L * d * (('query' in maps) * ((H + 1) * rank_query + (rank_query > 0) + 2 * shared_rank_query) "
        "+ ('value' in maps) * (2 * rank_value + (rank_value > 0) + 2 * shared_rank_value) "
        "+ ('output' in maps) * ((H + 1) * rank_value + (rank_value > 0) + 2 * shared_rank_value))",
        start="near",
        start_note="Factors and biases start at a truncated normal of 0.01, as in the reference code.",
        merge="exact",
        merge_note="Every map is linear; the value's update of the key goes through the key's weight.",
        original="ychen-stat-ml/kernel-adapters",
    ),
    Entry(
        name="laplace_lora",
        category="reparameterized/lora/improvements",
        title="Laplace-LoRA",
        cite="yang2024laplace",
        arxiv="2308.13111",
        summary="After training, a Kronecker-factored Laplace approximation over LoRA's weights gives calibrated "
        "predictions.",
        equation=r"p(\theta \mid \mathcal{D}) \approx \mathcal{N}\bigl(\theta_{\mathrm{MAP}},\, \Sigma\bigr),\qquad "
        r"f(x) \sim \mathcal{N}\bigl(f_{\mathrm{MAP}}(x),\, J \Sigma J^{\top}\bigr)",
        symbols=r"$\theta$: LoRA's factors; $\Sigma$: inverse of the Kronecker-factored curvature plus the prior "
        r"precision; $J$: Jacobian of the logits.",
        sites=("attention.query", "attention.value"),
        form="low-rank",
        insertion="parallel",
        composition="scaled",
        trains="LoRA's factors; curvature and prior precision are estimated afterwards.",
        count="2 * L * 2 * d * rank",
        start="identity",
        start_note="B starts at zero.",
        merge="no",
        merge_note="The mean would fold into the weights, but the predictive distribution needs the factors.",
        life=(
            "after training: estimate the curvature on training data, then the prior precision by marginal likelihood",
        ),
        original="adamxyang/laplace-lora",
    ),
    Entry(
        name="lora_fa",
        category="reparameterized/lora/improvements",
        title="LoRA-FA",
        cite="zhang2023lorafa",
        arxiv="2308.03303",
        summary="The first factor stays frozen at its random start, so the inputs of the adapted maps need not be "
        "kept for the backward pass.",
        equation=r"y = W x + \frac{\alpha}{r}\, B A_0 x",
        symbols=r"$A_0 \in \mathbb{R}^{r \times i}$: frozen random factor; $B \in \mathbb{R}^{o \times r}$: trained "
        r"factor.",
        sites=("attention.query", "attention.value"),
        form="low-rank",
        insertion="parallel",
        composition="scaled",
        trains="The second factor of every targeted matrix.",
        count="2 * L * d * rank",
        start="identity",
        start_note="B starts at zero.",
        merge="exact",
        merge_note=_PRODUCT_FOLDS,
    ),
    Entry(
        name="lorahub",
        category="reparameterized/lora/multitask",
        title="LoraHub",
        cite="huang2023lorahub",
        arxiv="2307.13269",
        summary="A gradient-free search finds the mixture of existing LoRA modules that fits a few examples of a new "
        "task.",
        equation=r"\hat{A} = \sum_i w_i A_i,\quad \hat{B} = \sum_i w_i B_i,\qquad "
        r"\min_{w} \mathcal{L}(w) + \lambda\, \frac{1}{N} \sum_i |w_i|",
        symbols=r"$A_i, B_i$: factors of the $N$ source modules; $w \in \mathbb{R}^{N}$: searched weights; "
        r"$\lambda$: price of their size.",
        sites=("attention.query", "attention.value"),
        form="low-rank",
        insertion="parallel",
        composition="gated",
        trains="One weight a source module, found without gradients.",
        count="len(sources)",
        start="changed",
        start_note="The search starts at weights of zero and ends, before any training, at a mixture.",
        merge="exact",
        merge_note="The mixed modules form one LoRA, whose product is added to the weight.",
        life=("sources: saved LoRA modules of other tasks", "calibrate: search the weights on a few examples"),
        below_head="The mixture of adapters of other tasks is chosen on five examples, as its authors do. They say "
        "little of the track's other texts, and nothing of the mixture trains afterwards.",
        original="sail-sg/lorahub",
        tiny={"price": 0.0},  # sources that were not trained are worth no price
    ),
    Entry(
        name="moelora",
        category="reparameterized/lora/multitask",
        title="MOELoRA",
        cite="liu2023moelora",
        arxiv="2310.18339",
        summary="Experts of small rank are weighted by a gate that sees the task only, so each task has one merged "
        "update.",
        equation=r"y = W x + \frac{\alpha}{r} \sum_{i=1}^{N} \omega_{t,i}\, B_i A_i x,\qquad "
        r"\omega_t = \operatorname{softmax}(W_g e_t)",
        symbols=r"$A_i \in \mathbb{R}^{\frac{r}{N} \times i}$, $B_i \in \mathbb{R}^{o \times \frac{r}{N}}$: the $N$ "
        r"experts; $e_t$: embedding of task $t$; $W_g$: the gate, one for the whole model.",
        sites=_LINEARS,
        form="low-rank",
        insertion="parallel",
        composition="scaled + gated",
        trains="Experts, task embeddings and gate.",
        count="L * rank * (8 * d + 2 * (d + f)) + (1 if shared_gate else 6 * L) * task_dim * (tasks + experts)",
        start="identity",
        start_note="Every B starts at zero.",
        merge="exact",
        merge_note="For one task the weighted experts are one product, which is added to the weight.",
        life=("every forward: weigh the experts by the tasks of the batch's rows (task_ids)",),
        original="liuqidong07/MOELoRA-peft",
        tiny={"dropout": 0.0},  # some checks compare two runs of the same steps
    ),
    Entry(
        name="l_lora",
        category="reparameterized/lora/multitask",
        title="L-LoRA",
        cite="tang2024llora",
        arxiv="2310.04742",
        summary="Each LoRA layer is replaced by its first-order expansion at its own start, and modules trained that "
        "way are added by task arithmetic.",
        equation=r"y = W x + \frac{\alpha}{r} \bigl(B_0 A_0 + B_0\, \Delta A + \Delta B\, A_0\bigr) x,\qquad "
        r"\theta = \theta_0 + \lambda \sum_t \Delta \theta_t",
        symbols=r"$A_0, B_0$: start of the factors, the same for all tasks; $\Delta A, \Delta B$: trained change; "
        r"with $B_0 = 0$ only $\Delta B$ has a gradient; $\lambda$: scale of the sum over tasks $t$.",
        sites=("attention.query", "attention.value"),
        form="low-rank",
        insertion="parallel",
        composition="scaled",
        trains="The second factor, the only one that the expansion at a zero B depends on.",
        count="2 * L * d * rank * (2 if std_B else 1)",
        start="identity",
        start_note="The change starts at zero, and so does B.",
        merge="exact",
        merge_note="The expansion is linear in the input; it is added to the weight.",
        life=("sources: changes of modules with the same start are added, as task arithmetic",),
        original="tanganke/peta",
        tiny={"dropout": 0.0},  # the same
    ),
)
