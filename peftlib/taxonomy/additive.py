"""Additive fine-tuning: new parameters beside a frozen backbone."""

from __future__ import annotations

from peftlib.taxonomy.types import Category, Entry

CATEGORIES = (
    Category(
        "additive",
        "Additive fine-tuning",
        "New parameters are added beside a frozen backbone, and only they train.",
    ),
    Category(
        "additive/adapters",
        "Adapter-based fine-tuning",
        "Small networks inside the layers change the hidden states.",
        chapter="10_adapters",
    ),
    Category(
        "additive/soft_prompts",
        "Soft prompt-based fine-tuning",
        "Trained vectors at the input, or trained keys and values in every layer, steer the frozen network.",
        chapter="11_soft_prompts",
    ),
    Category(
        "additive/others",
        "Other additive methods",
        "Side networks, scaling vectors, token vectors and late fusion.",
        chapter="12_additive_others",
    ),
)

_NONLINEAR = "The nonlinearity between the two projections keeps it out of the backbone's weights."
_PROMPT_STAYS = "A prompt is input, not a weight: it takes positions of the sequence."
_PROMPT_ACTS = "New positions in the sequence change the output from the first step on."
_BOTTLENECK = (
    r"$h \in \mathbb{R}^{d}$: hidden state; $W_{\mathrm{down}} \in \mathbb{R}^{r \times d}$, "
    r"$W_{\mathrm{up}} \in \mathbb{R}^{d \times r}$: trained projections, with biases; $r$: bottleneck; "
)

METHODS = (
    # Adapters
    Entry(
        name="sequential_adapter",
        category="additive/adapters",
        title="Sequential adapter",
        cite="houlsby2019",
        arxiv="1902.00751",
        summary="A bottleneck network with a skip connection follows the attention block and the feed-forward block "
        "of every layer.",
        equation=r"h \leftarrow h + W_{\mathrm{up}}\, \sigma(W_{\mathrm{down}} h)",
        symbols=_BOTTLENECK + r"$\sigma$: nonlinearity.",
        sites=("attention.output", "ffn.down", "norms"),
        form="bottleneck + tensors",
        insertion="sequential + in place",
        composition="added + replaced",
        trains="Two bottlenecks a layer and, as in the paper, the layers' norms.",
        count="L * (2 if variant == 'houlsby' else 1) * "
        "(2 * d * bottleneck + bottleneck + d + (2 * d if train_norms else 0))",
        start="near",
        start_note="Both projections start from a normal distribution with standard deviation 0.01.",
        merge="no",
        merge_note=_NONLINEAR,
        original="google-research/adapter-bert",
    ),
    Entry(
        name="residual_adapter",
        category="additive/adapters",
        title="Residual adapter",
        cite="lin2020",
        arxiv="2004.03829",
        summary="One bottleneck at the end of each layer, with a norm of its own on its input.",
        equation=r"h \leftarrow h + W_{\mathrm{up}}\, \mathrm{ReLU}\bigl(W_{\mathrm{down}}\, \mathrm{LN}(h)\bigr)",
        symbols=_BOTTLENECK + r"$\mathrm{LN}$: a new, trained layer norm.",
        sites=("layers",),
        form="bottleneck",
        insertion="sequential",
        composition="added",
        trains="Bottleneck and norm of every layer.",
        count="L * (2 * d * bottleneck + bottleneck + d + 2 * d)",
        start="near",
        start_note="Both projections start from a normal distribution with standard deviation 0.02.",
        merge="no",
        merge_note=_NONLINEAR,
        original="zlinao/VGLM",
    ),
    Entry(
        name="coda",
        category="additive/adapters",
        title="CODA (conditional adapters)",
        cite="lei2023coda",
        arxiv="2304.04947",
        summary="A router sends only the k best of n tokens through each frozen layer, while a parallel adapter serves "
        "them all, which saves time as well as parameters.",
        equation=r"h \leftarrow h + \mathrm{Adapter}(h) + \lambda \odot "
        r"\bigl(\mathrm{Layer}(h_{\mathcal{S}}) - h_{\mathcal{S}}\bigr),"
        r"\qquad (\lambda, \mathcal{S}) = \operatorname{soft\,top}_{k}(h\, w)",
        symbols=r"$w \in \mathbb{R}^{d}$: the layer's router; $\mathcal{S}$: the $k$ chosen tokens; "
        r"$\lambda \in [0, 1]$: their gates, zero for all others.",
        sites=("layers", "norms"),
        form="bottleneck + tensors",
        insertion="parallel + in place",
        composition="added + gated + replaced",
        trains="Router and parallel adapter of every layer and, as in the paper, the layers' norms.",
        count="L * (d + 2 * d * bottleneck + bottleneck + d) + (4 * L * d if train_norms else 0)",
        start="changed",
        start_note="With k < n most tokens skip the layers; with k = n and gates of one it is a parallel adapter.",
        merge="no",
        merge_note="Routing depends on the input.",
        life=("before training: a phase on unlabelled text converts the dense backbone to a routed one, convert()",),
        below_head="Two of three tokens skip every layer, and the conversion is short: a thousand steps on sixteen "
        "sentences each, where the paper's is a phase of pre-training.",
        exceptions=dict.fromkeys(
            ("moves on bert", "moves on roberta", "moves on electra", "moves on distilbert", "trainer"),
            "Behind an encoder's last layer only its first token counts, which always passes with a gate of one: no "
            "gradient reaches that layer's router.",
        ),
    ),
    Entry(
        name="parallel_adapter",
        category="additive/adapters",
        title="Parallel adapter",
        cite="he2022unified",
        arxiv="2110.04366",
        summary="A scaled bottleneck runs beside the feed-forward block and reads the hidden state in front of it.",
        equation=r"y = \mathrm{FFN}(x) + s\, W_{\mathrm{up}}\, \mathrm{ReLU}(W_{\mathrm{down}} x)",
        symbols=r"$x \in \mathbb{R}^{d}$: the hidden state in front of the block and of a norm that stands there; "
        r"$W_{\mathrm{down}} \in \mathbb{R}^{r \times d}$, $W_{\mathrm{up}} \in \mathbb{R}^{d \times r}$: trained "
        r"projections, with biases; $s$: fixed scale, 4.",
        sites=("ffn.up", "ffn.down"),
        form="bottleneck",
        insertion="parallel",
        composition="scaled",
        trains="One bottleneck a layer.",
        count="L * (2 * d * bottleneck + bottleneck + d)",
        start="identity",
        start_note="The up-projection starts at zero.",
        merge="no",
        merge_note=_NONLINEAR,
        original="jxhe/unify-parameter-efficient-tuning",
    ),
    Entry(
        name="adapter_drop",
        category="additive/adapters",
        title="AdapterDrop",
        cite="ruckle2021",
        arxiv="2010.11918",
        summary="The lowest layers go without adapters, a fixed number of them or one drawn at each step, which makes "
        "training and inference faster.",
        equation=r"h_{\ell} \leftarrow h_{\ell} + \bigl[\,\ell > k\,\bigr]\, W_{\mathrm{up}}\, "
        r"\sigma(W_{\mathrm{down}} h_{\ell})",
        symbols=r"$\ell$: layer, counted from the input; $k$: layers without adapter, fixed (specialized) or drawn at "
        r"each step (robust) and free at inference.",
        sites=("ffn.down",),
        form="bottleneck",
        insertion="sequential",
        composition="added",
        trains="One bottleneck in every layer that has one.",
        count="(L if robust else L - dropped) * (2 * d * bottleneck + bottleneck + d)",
        start="near",
        start_note="Both projections start from a normal distribution with standard deviation 0.02.",
        merge="no",
        merge_note=_NONLINEAR,
        life=("on_step_start: in the robust form, draw how many layers go without", "inference: k is chosen freely"),
        tiny={"max_dropped": 1},  # every layer must have its adapter in one of three steps
    ),
    Entry(
        name="tiny_attention_adapter",
        category="additive/adapters",
        title="Tiny-attention adapter",
        cite="zhao2022tiny",
        arxiv="2211.01979",
        summary="An attention of size one over the whole context is added to the hidden state behind the attention.",
        equation=r"h_t \leftarrow h_t + W_2\, W_O \sum_{s} \operatorname{softmax}_s\bigl(q_t k_s\bigr)\, v_s,\qquad "
        r"(q, k, v) = W_{QKV}\, W_1 \operatorname{LN}(h)",
        symbols=r"$q, k, v$: query, key and value of size 1; $W_1 \in \mathbb{R}^{3 \times d}$, "
        r"$W_2 \in \mathbb{R}^{d \times 1}$; $W_{QKV}$, $W_O$: numbers; $s$ runs over all positions that are not "
        r"padding.",
        sites=("attention.output",),
        form="attention",
        insertion="sequential",
        composition="added",
        trains="A norm, the maps into and out of the tiny attention, and its own four maps, in every layer.",
        count="L * heads * (4 * d * head_dim + 3 * d + 4 * head_dim**2 + 7 * head_dim)",
        start="near",
        start_note="The last map starts at a hundredth of torch's usual start.",
        merge="no",
        merge_note="Its output depends on the context; heads can be averaged into one, which changes the output.",
        life=(
            "before training: several heads may start from one that is trained",
            "inference: the heads' parameters may be averaged into one head",
        ),
        original="cindermond/tiny-attn",
        tiny_rate=0.03,  # one head of size 1 is thrown about by more
    ),
    Entry(
        name="adapter_fusion",
        category="additive/adapters",
        title="AdapterFusion",
        cite="pfeiffer2021",
        arxiv="2005.00247",
        summary="Trained adapters of several tasks stay frozen, and an attention in every layer mixes their outputs "
        "for a new task.",
        equation=r"o = h + \sum_{n} \operatorname{softmax}_n\bigl((W_Q h)^{\top} W_K z_n\bigr)\, W_V z_n",
        symbols=r"$h \in \mathbb{R}^{d}$: what the adapters read; $z_n \in \mathbb{R}^{d}$: what the "
        r"adapter of task $n$ would add; $W_Q, W_K, W_V \in \mathbb{R}^{d \times d}$: trained.",
        sites=("ffn.down",),
        form="bottleneck + attention",
        insertion="sequential",
        composition="gated",
        trains="Query, key (with biases) and value matrices of the fusion in every layer.",
        count="L * (3 * d * d + 2 * d)",
        start="changed",
        start_note="It starts as a mix of the source adapters, with the identity as value matrix.",
        merge="no",
        merge_note="The mix depends on the input.",
        life=(
            "sources: saved adapters of other tasks, frozen",
            "penalty: distance of the value matrix to the identity",
        ),
        original="adapter-hub/adapters",
        tiny_rate=0.001,
        exceptions={
            "overfits on roberta": "The check's adapters are hardly trained. A fusion only weighs what they give, and "
            "on this tiny backbone seven of eight texts are as many as that tells apart.",
        },
    ),
    Entry(
        name="mera",
        category="additive/adapters",
        title="MerA",
        cite="he2023mera",
        arxiv="2308.15982",
        summary="Pretrained adapters are aligned neuron by neuron with optimal transport and merged into one, from "
        "which few-shot tuning starts.",
        equation=r"W_{\mathrm{down}} = \frac{1}{N} \sum_{n} T_n^{\top} W_{\mathrm{down}}^{(n)},\quad "
        r"W_{\mathrm{up}} = \frac{1}{N} \sum_{n} W_{\mathrm{up}}^{(n)} T_n,\qquad "
        r"T_n = \operatorname{OT}\bigl(\text{neurons of adapters } 1, n\bigr)",
        symbols=r"$T_n \in \mathbb{R}^{r \times r}$: transport plan, scaled to a (soft) permutation of the bottleneck "
        r"neurons, found on weights or on activations.",
        sites=("ffn.down",),
        form="bottleneck",
        insertion="sequential",
        composition="added",
        trains="The one merged adapter.",
        count="L * (2 * d * sources[0].config.bottleneck + sources[0].config.bottleneck + d)",
        start="changed",
        start_note="It starts as the merged source adapter.",
        merge="no",
        merge_note=_NONLINEAR,
        life=(
            "sources: saved adapters of tasks of the same kind, merged when attached",
            "calibrate: aligned by activations, they are merged after a look at the target's batches",
        ),
    ),
    Entry(
        name="hyperformer_pp",
        category="additive/adapters",
        title="Hyperformer++",
        cite="mahabadi2021hyperformer",
        arxiv="2106.04489",
        summary="One hypernetwork, shared by layers and tasks, makes the adapters' and their norms' weights from "
        "embeddings of task, layer and place.",
        equation=r"\bigl(W_{\mathrm{down}}, W_{\mathrm{up}}, \gamma, \beta\bigr)_{t, \ell, p} = "
        r"\mathcal{H}\bigl([\,e_t; e_{\ell}; e_p\,]\bigr)",
        symbols=r"$e_t, e_{\ell}, e_p$: trained embeddings of task, layer and place (after attention or after the "
        r"feed-forward block); $\mathcal{H}$: the hypernetwork; $\gamma, \beta$: norm after the adapter.",
        sites=("attention.output", "ffn.down", "norms"),
        form="bottleneck + tensors",
        insertion="sequential + in place",
        composition="added + replaced",
        trains="Hypernetwork, embeddings and the backbone's own norms.",
        count="(tasks + L + 2) * embedding + (3 * embedding * hidden + hidden) + (hidden * embedding + embedding) "
        "+ 2 * embedding + (embedding + 1) * (2 * d * (d // reduction) + d // reduction + 3 * d) "
        "+ (4 * L + 2) * d * train_norms",
        start="changed",
        start_note="The generators start at N(0, 0.01), but the norm behind an adapter gives its small output a scale.",
        merge="no",
        merge_note=_NONLINEAR,
        life=("every forward: generate the adapters of the batch's tasks (task_ids)",),
        original="rabeehk/hyperformer",
        tiny={"reduction": 4},  # 32 leaves a tiny model one unit
        tiny_rate=0.001,
    ),
    Entry(
        name="adapter_soup",
        category="additive/adapters",
        title="AdapterSoup",
        cite="chronopoulou2023",
        arxiv="2302.07027",
        summary="At test time the weights of the adapters whose domains are nearest are averaged into one adapter.",
        equation=r"\theta_{\mathrm{soup}} = \frac{1}{|\mathcal{N}|} \sum_{n \in \mathcal{N}} \theta_n",
        symbols=r"$\theta_n$: weights of the adapter of domain $n$; $\mathcal{N}$: the nearest domains, by similarity "
        r"of sentence embeddings or by clusters.",
        sites=("layers",),
        form="bottleneck",
        insertion="sequential",
        composition="added",
        trains="One adapter a domain, each on its own; the soup itself needs no training.",
        count="L * (2 * d * sources[0].config.bottleneck + sources[0].config.bottleneck + 3 * d)",
        start="changed",
        start_note="It starts as the average of the chosen adapters.",
        merge="no",
        merge_note=_NONLINEAR,
        life=("sources: saved adapters of other domains", "before: choose the nearest domains for the new text"),
    ),
    # Soft prompts
    Entry(
        name="warp",
        category="additive/soft_prompts",
        title="WARP",
        cite="hambardzumyan2021",
        arxiv="2101.00121",
        summary="Trained embeddings around the input and a mask token, with a trained vector a class that scores the "
        "mask's state.",
        equation=r"p(c \mid x) = \frac{\exp\bigl(v_c^{\top} f(T_P(x))_{\mathrm{mask}}\bigr)}"
        r"{\sum_{c'} \exp\bigl(v_{c'}^{\top} f(T_P(x))_{\mathrm{mask}}\bigr)}",
        symbols=r"$T_P(x)$: the input with trained embeddings $P \in \mathbb{R}^{m \times d}$ before, between and "
        r"after its segments and one [MASK]; $v_c \in \mathbb{R}^{d}$: trained vector of class $c$; $f$: frozen "
        r"network.",
        sites=("embeddings", "head"),
        form="vector",
        insertion="input",
        composition="joined",
        trains="Prompt embeddings and class vectors; the class vectors are the task head.",
        count="sum(template) * d",
        start="changed",
        start_note=_PROMPT_ACTS,
        merge="no",
        merge_note=_PROMPT_STAYS,
        life=("training: the backbone runs without dropout",),
        original="YerevaNN/WARP",
        exceptions={
            "overfits": "The check keeps the class vectors frozen. Prompts alone act through attention, which random "
            "weights spread evenly, and norms behind the blocks bound what is left.",
        },
    ),
    Entry(
        name="prompt_tuning",
        category="additive/soft_prompts",
        title="Prompt tuning",
        cite="lester2021",
        arxiv="2104.08691",
        summary="A few trained embeddings stand before the input.",
        equation=r"\hat{y} = f\bigl([\,P; E(x)\,]\bigr)",
        symbols=r"$P \in \mathbb{R}^{m \times d}$: trained prompt; $E(x) \in \mathbb{R}^{n \times d}$: embeddings of "
        r"the input; $f$: frozen network.",
        sites=("embeddings",),
        form="vector",
        insertion="input",
        composition="joined",
        trains="The prompt.",
        count="length * d",
        start="changed",
        start_note=_PROMPT_ACTS,
        merge="no",
        merge_note=_PROMPT_STAYS,
        original="google-research/prompt-tuning",
        below_head="Prompts learn slowly: the paper trains them for 30,000 steps at a rate of 0.3, the track has 80 "
        "steps, in which none of eight rates from 0.00002 to 1 learned; and the paper finds prompts behind other "
        "methods on small models.",
        tiny={"length": 32, "init": "random"},  # the first tokens' embeddings are those of the texts
        tiny_rate=0.01,
        exceptions={
            f"overfits on {family}": "A prompt acts through attention alone, which random weights spread evenly, and "
            "norms behind the blocks bound what is left: eight texts of a random backbone stay closer than it can pull "
            "them."
            for family in ("roberta", "electra", "distilbert", "bart")
        },
    ),
    Entry(
        name="prefix_tuning",
        category="additive/soft_prompts",
        title="Prefix tuning",
        cite="li2021prefix",
        arxiv="2101.00190",
        summary="Trained keys and values stand before those of every attention.",
        equation=r"\operatorname{Attn}\bigl(Q,\, [\,P_K; K\,],\, [\,P_V; V\,]\bigr),\qquad "
        r"[\,P_K; P_V\,] = \mathrm{MLP}(E_P)",
        symbols=r"$P_K, P_V \in \mathbb{R}^{m \times d}$: keys and values of each layer; $E_P$: embeddings from which "
        r"an MLP makes them while training; without the MLP they train themselves.",
        sites=("attention.key", "attention.value"),
        form="attention",
        insertion="parallel",
        composition="gated",
        trains="An MLP that makes the keys and values of every layer, or those themselves; stored are keys and values.",
        count="length * d + (d + 1) * hidden + 2 * L * d * (hidden + 1) if reparametrize else 2 * L * length * d",
        start="changed",
        start_note="The prefix draws attention from the first step on.",
        merge="no",
        merge_note="What a prefix adds depends on the query.",
        life=("saving stores the keys and values and drops the MLP; a loaded prefix trains on without it",),
        original="XiangLi1999/PrefixTuning",
        tiny_rate=0.003,
    ),
    Entry(
        name="p_tuning",
        category="additive/soft_prompts",
        title="P-tuning",
        cite="liu2021ptuning",
        arxiv="2103.10385",
        summary="Prompt embeddings come from a bidirectional LSTM with an MLP and are placed in a template.",
        equation=r"[\,P_1; \dots; P_m\,] = \mathrm{MLP}\bigl(\mathrm{BiLSTM}(E_1, \dots, E_m)\bigr)",
        symbols=r"$E_j \in \mathbb{R}^{d}$: trained inputs of the encoder; $P_j \in \mathbb{R}^{d}$: prompt "
        r"embeddings, stored as they are after training.",
        sites=("embeddings",),
        form="vector",
        insertion="input",
        composition="joined",
        trains="The encoder and its inputs; stored are the m embeddings that it makes.",
        count="length * d + (lambda h: 8 * h * (d + h + 2) + 8 * h * (3 * h + 2) + (2 * h + 1) * (2 * h + d))"
        "(hidden or d // 2)",
        start="changed",
        start_note=_PROMPT_ACTS,
        merge="no",
        merge_note=_PROMPT_STAYS,
        life=("on_train_end: the prompt becomes plain embeddings, and the encoder is gone",),
        original="THUDM/P-tuning",
        below_head="A prompt changes what the frozen network computes from the first step on, and 80 steps do not find "
        "one that helps; of the rates within the search's tie the largest had the lowest loss.",
        tiny={"length": 32},  # twenty vectors do not move a tiny random backbone enough
        tiny_rate=0.01,
        exceptions={
            f"overfits on {family}": "A prompt acts through attention alone, which random weights spread evenly, and "
            "norms behind the blocks bound what is left: eight texts of a random backbone stay closer than it can pull "
            "them."
            for family in ("bert", "roberta", "electra", "distilbert", "bart")
        },
    ),
    Entry(
        name="spot",
        category="additive/soft_prompts",
        title="SPoT",
        cite="vu2022spot",
        arxiv="2110.07904",
        summary="A prompt learned on a source task starts the target's prompt; similarity of prompts finds the source.",
        equation=r"P_{\mathrm{target}} \leftarrow P_{s^{*}},\qquad s^{*} = \arg\max_s "
        r"\cos\bigl(\bar{P}_{\mathrm{target}},\, \bar{P}_s\bigr)",
        symbols=r"$P \in \mathbb{R}^{m \times d}$: prompts; $\bar{P}$: mean over the positions of a prompt, the "
        r"task's embedding; $s$ runs over the sources.",
        sites=("embeddings",),
        form="vector",
        insertion="input",
        composition="joined",
        trains="The target's prompt.",
        count="sources[0].config.length * d",
        start="changed",
        start_note=_PROMPT_ACTS,
        merge="no",
        merge_note=_PROMPT_STAYS,
        life=(
            "sources: saved prompts of other tasks",
            "calibrate: train a probe on the target and copy the nearest source's prompt",
        ),
        original="google-research/prompt-tuning",
        below_head="A prompt of another task is where training starts, and from there on it learns as slowly as "
        "prompt tuning does: 80 steps at rates up to 0.01, of which the largest is the best.",
        tiny={"probe_steps": 2},  # it is attached hundreds of times
        tiny_rate=0.05,
        exceptions={
            f"overfits on {family}": "As prompt tuning: a prompt acts through attention alone, which random weights "
            "spread evenly, and norms behind the blocks bound what is left."
            for family in ("roberta", "electra", "distilbert", "bart")
        },
    ),
    Entry(
        name="attempt",
        category="additive/soft_prompts",
        title="ATTEMPT",
        cite="asai2022",
        arxiv="2205.11961",
        summary="A small attention network mixes frozen source prompts with a new target prompt for every instance.",
        equation=r"P(x) = P_{t} + \sum_{j=1}^{S+1} a_j(x)\, P_j,\qquad "
        r"a(x) = \operatorname{softmax}_j\Bigl(\tfrac{1}{T}\, \hat{P}_j^{\top}\, \mathrm{LN}\bigl(W_{\mathrm{up}}\, "
        r"\mathrm{SiLU}(W_{\mathrm{down}} \hat{X})\bigr)\Bigr)",
        symbols=r"$P_1, \dots, P_S$: frozen source prompts; $P_{S+1} = P_t \in \mathbb{R}^{m \times d}$: the target's; "
        r"$\hat{P}_j, \hat{X} \in \mathbb{R}^{d}$: maxima over the tokens; $T$: temperature; "
        r"$W_{\mathrm{down}}, W_{\mathrm{up}}$: trained, without biases.",
        sites=("embeddings",),
        form="vector + attention",
        insertion="input",
        composition="joined + gated",
        trains="The target's prompt, one for each task, and the two projections of the attention network.",
        count="tasks * sources[0].config.length * d + 2 * d * bottleneck",
        start="changed",
        start_note=_PROMPT_ACTS,
        merge="no",
        merge_note="The prompt depends on the input.",
        life=("sources: saved prompts of other tasks, frozen",),
        original="AkariAsai/ATTEMPT",
        exceptions={
            "overfits on bart": "As prompt tuning: a prompt acts through attention alone, which random weights spread "
            "evenly, and norms behind the blocks bound what is left.",
        },
    ),
    Entry(
        name="mpt",
        category="additive/soft_prompts",
        title="Multitask prompt tuning",
        cite="wang2023mpt",
        arxiv="2303.02861",
        summary="Task prompts are a shared prompt times a rank-one factor of the task, learned by distilling prompts "
        "of single tasks, and then adapted to a target.",
        equation=r"P_k = P^{*} \odot \bigl(u_k v_k^{\top}\bigr)",
        symbols=r"$P^{*} \in \mathbb{R}^{m \times d}$: shared prompt; $u_k \in \mathbb{R}^{m}$, "
        r"$v_k \in \mathbb{R}^{d}$: factors of task $k$.",
        sites=("embeddings",),
        form="vector",
        insertion="input",
        composition="joined",
        trains="The shared prompt and the factors of every task.",
        count="length * d + (tasks or max(1, len(sources))) * (length + d) * rank",
        start="changed",
        start_note=_PROMPT_ACTS,
        merge="no",
        merge_note=_PROMPT_STAYS,
        life=(
            "sources: teacher prompts of the tasks, or a saved multitask prompt to adapt",
            "penalty: distance to the teachers' logits and hidden states",
        ),
        original="huggingface/peft",
        below_head="The shared prompt and its task's change learn as slowly as prompt tuning does: 80 steps at rates "
        "up to 0.01, of which the largest is the best.",
        tiny={"length": 32},  # as its sources
        exceptions={
            f"overfits on {family}": "As prompt tuning: a prompt acts through attention alone, which random weights "
            "spread evenly, and norms behind the blocks bound what is left, of which the teachers' answers take their "
            "part."
            for family in ("bert", "roberta", "electra", "distilbert", "bart")
        },
    ),
    # Others
    Entry(
        name="ladder_side_tuning",
        category="additive/others",
        title="Ladder side-tuning",
        cite="sung2022lst",
        arxiv="2206.06522",
        summary="A slim transformer beside the backbone is fed by gated ladders from every layer; no gradient enters "
        "the backbone, which saves its activation memory.",
        equation=r"g_{\ell} = \sigma(\alpha_{\ell} / T),\qquad "
        r"s_{\ell} = \mathrm{Side}_{\ell}\bigl(g_{\ell}\, s_{\ell - 1} + (1 - g_{\ell})\, W_{\ell}\, h_{\ell}\bigr)",
        symbols=r"$h_{\ell} \in \mathbb{R}^{d}$: output of backbone layer $\ell$; $W_{\ell} \in \mathbb{R}^{d/r \times "
        r"d}$: ladder; $s_{\ell} \in \mathbb{R}^{d/r}$: side state; $\alpha_{\ell}$: gate, zero at first; $T = 0.1$.",
        sites=("embeddings", "layers", "head"),
        form="network",
        insertion="beside",
        composition="gated",
        trains="Side layers, ladders, gates and the last up-projection.",
        count="(L - len(dropped_layers)) * (4 * (d // reduction) * (d // reduction + 1) + 2 * (d // reduction) * "
        "(f // reduction) + f // reduction + 5 * (d // reduction) + (d + 1) * (d // reduction) + 1) "
        "+ (d + 1) * (d // reduction) + (d // reduction + 1) * d",
        start="changed",
        start_note="The head sees the side network's state, not the backbone's.",
        merge="no",
        merge_note="It is a network of its own beside the backbone.",
        life=(
            "calibrate: the side layers become a copy of the backbone's, pruned by squared gradients",
            "training: the backbone runs without a graph",
        ),
        original="ylsung/Ladder-Side-Tuning",
        tiny={"reduction": 4},  # an eighth of a head of eight leaves no pair for rotary positions
    ),
    Entry(
        name="ia3",
        category="additive/others",
        title="(IA)³",
        cite="liu2022ia3",
        arxiv="2205.05638",
        summary="Trained vectors scale keys, values and the inner activations of the feed-forward block.",
        equation=r"\operatorname{softmax}\Bigl(\frac{Q\, (l_k \odot K)^{\top}}{\sqrt{p}}\Bigr) (l_v \odot V),\qquad "
        r"W_2 \bigl(l_f \odot \gamma(W_1 x)\bigr)",
        symbols=r"$l_k, l_v \in \mathbb{R}^{d}$, $l_f \in \mathbb{R}^{f}$: trained vectors of each layer; $p$: head "
        r"size; $\gamma$: the block's nonlinearity.",
        sites=("attention.key", "attention.value", "ffn.down"),
        form="vector",
        insertion="sequential",
        composition="multiplied",
        trains="Three vectors a layer.",
        count="L * (2 * d + f)",
        start="identity",
        start_note="The vectors start at one.",
        merge="exact",
        merge_note="Key and value vectors scale the rows of their weights and biases, the inner vector the columns of "
        "the second feed-forward weight.",
        original="r-three/t-few",
    ),
    Entry(
        name="pasta",
        category="additive/others",
        title="PASTA",
        cite="yang2023pasta",
        arxiv="2210.04382",
        summary="Trained vectors are added to the hidden states of the special tokens at the input of every layer.",
        equation=r"h_{\ell, t} \leftarrow h_{\ell, t} + e\bigl(v_{\ell, p(t)}\bigr)\quad "
        r"\text{where } t \text{ is special}",
        symbols=r"$v_{\ell, p} \in \mathbb{R}^{d}$: vector of layer $\ell$ for the $p$-th special token ([CLS], first "
        r"[SEP] and so on); $e$: dropout.",
        sites=("layers",),
        form="vector",
        insertion="sequential",
        composition="added",
        trains="One vector a layer and special token.",
        count="L * d * tokens",
        start="near",
        start_note="The vectors start at N(0, 0.02), as in the reference code; zero is an option.",
        merge="no",
        merge_note="It depends on where the special tokens stand.",
        original="luka-group/PASTA",
        tiny={"dropout": 0.0},  # some checks compare two runs of the same steps
        tiny_rate=0.3,
        exceptions={
            "overfits on bart": "Only the encoder's special tokens move, and of that the cross-attention of a random "
            "decoder passes on too little to part the last of the eight texts.",
        },
    ),
    Entry(
        name="attention_fusion",
        category="additive/others",
        title="Attention fusion",
        cite="cao2022attentionfusion",
        arxiv="",
        summary="A trained query attends, token by token, over the representations of all layers of a frozen backbone.",
        equation=r"z_t = \sum_{\ell=1}^{L} a_{t, \ell}\, h_{\ell, t},\qquad "
        r"a_t = \operatorname{softmax}_{\ell}\bigl(q^{\top} h_{\ell, t}\bigr)",
        symbols=r"$q \in \mathbb{R}^{d}$: trained task query; $h_{\ell, t} \in \mathbb{R}^{d}$: output of layer "
        r"$\ell$ at token $t$.",
        sites=("layers", "head"),
        form="attention",
        insertion="beside",
        composition="joined",
        trains="The query.",
        count="d",
        start="changed",
        start_note="The head sees a mix of all layers instead of the last one.",
        merge="no",
        merge_note="The mix depends on the input.",
        life=("training: the backbone runs without a graph",),
        exceptions={
            "overfits": "The check keeps the head frozen. A query alone only weighs states that the frozen layers "
            "give, and between them a random head has no room for eight texts; the method trains query and head "
            "together.",
        },
    ),
    Entry(
        name="hadamard_adapter",
        category="additive/others",
        title="Hadamard adapter",
        cite="chen2023hadamard",
        arxiv="2407.11033",
        summary="A trained vector scales the attention output and another shifts it; the norm behind them trains too.",
        equation=r"a \leftarrow w \odot a + b",
        symbols=r"$a \in \mathbb{R}^{d}$: output of the attention block before the residual sum; $w, b \in "
        r"\mathbb{R}^{d}$: trained vectors.",
        sites=("attention.output", "norms"),
        form="vector + tensors",
        insertion="sequential + in place",
        composition="multiplied + added + replaced",
        trains="Two vectors and one norm a layer.",
        count="L * d * (1 + shift + 2 * train_norms)",
        start="identity",
        start_note="The scale starts at one, the shift at zero.",
        merge="exact",
        merge_note="Scale and shift fold into the output projection, which needs a bias for the shift; the norm is the "
        "backbone's own.",
        life=(
            "on_gradients: the head trains alone in the first stage, then vectors and norms without it",
            "stages: each has the learning-rate schedule for itself",
        ),
        tiny={"head_stage": 0.34},  # one step of three: half of them leave too few for the rest
        tiny_rate=0.05,
        exceptions={
            f"merge on {family}": "The output projection has no bias for the shift; with shift=False it merges."
            for family in ("llama", "mistral", "qwen2", "t5", "mt5")
        },
    ),
)
