"""LoRA: its equation, parity with HF peft, the survey's counts, its merge and its layout in memory."""

import copy
import math
import warnings

import peft
import pytest
import torch

import peftlib
from peftlib import backbones
from peftlib.errors import ConfigError, TargetError
from peftlib.mechanisms.low_rank import LowRank
from tests.methods.facts import Count, Default, Facts, Holds, Start, Trains, kaiming_uniform, tiny, zeros
from tests.methods.helpers import Spy, backbone, inputs, perturb


def lora(x, weight, bias, a, b, alpha, rank):
    """Hu et al. 2022: h = W x + (alpha / r) B A x for x (tokens, in), in float64."""
    x, W, A, B = (tensor.double() for tensor in (x, weight, a, b))
    return (x @ W.T + bias.double() + alpha / rank * x @ A.T @ B.T).float()


# family: (our sites, HF peft's target_modules, its fan_in_fan_out). GPT-2's queries, keys and values are one module,
# which HF peft adapts as one and peftlib by part, so the other three are compared.
PARITY = {
    "bert": (("attention.query", "attention.value"), ["query", "value"], False),
    "gpt2": (
        ("attention.output", "ffn.up", "ffn.down"),
        ["attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
        True,
    ),
    "t5": (("*attention.query", "*attention.value"), ["q", "v"], False),
    "llama": (
        "all-linear",
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        False,
    ),
}


@torch.no_grad()
def test_equation_on_one_site():
    model = backbone("bert")
    adapted = peftlib.attach(model, "lora", rank=4, alpha=6.0)
    perturb(adapted)
    site = adapted.host.anatomy.layers[1].sites["attention.value"]
    spy = Spy(site.module)
    model(**inputs("bert"))
    x, y = spy[site.module]
    a, b = site.module.lora.A, site.module.lora.B
    expected = lora(x[1, :5], site.weight, site.bias, a, b, alpha=6.0, rank=4)
    torch.testing.assert_close(y[1, :5], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_parts_of_a_fused_projection_are_adapted_alone():
    model = backbone("gpt2")
    adapted = peftlib.attach(model, "lora", targets=("attention.query", "attention.value"))
    perturb(adapted)
    fused = adapted.host.anatomy.layers[0].sites["attention.query"].module
    spy = Spy(fused)
    model(**inputs("gpt2"))
    x, y = spy[fused]
    sites = adapted.host.anatomy.layers[0].sites
    frozen = [x @ sites[f"attention.{n}"].weight.T + sites[f"attention.{n}"].bias for n in ("query", "key", "value")]
    query, key, value = y.chunk(3, dim=-1)
    torch.testing.assert_close(key, frozen[1], atol=1e-5, rtol=1e-5)
    for part, base, update in ((query, frozen[0], fused.lora_0), (value, frozen[2], fused.lora_2)):
        torch.testing.assert_close(part, base + 2.0 * x @ update.A.T @ update.B.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank_stabilized", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("family", list(PARITY))
def test_parity_with_hf_peft(family, rank_stabilized):
    """The same weights give the same logits and the same gradients as HF peft's, and the same count."""
    targets, theirs, transposed = PARITY[family]
    head, task_type, data = "classification", "SEQ_CLS", inputs(family)
    if family == "t5":
        head, task_type, data = "seq2seq", None, data | {"labels": data["input_ids"]}
    options = {"rank": 4, "alpha": 12.0, "targets": targets, "rank_stabilized": rank_stabilized}
    adapted = peftlib.attach(backbone(family, head), "lora", **options)
    perturb(adapted)
    config = peft.LoraConfig(
        task_type=task_type,
        r=4,
        lora_alpha=12,
        target_modules=theirs,
        fan_in_fan_out=transposed,
        use_rslora=rank_stabilized,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = peft.get_peft_model(backbone(family, head), config).eval()
    left = {n: p for n, p in oracle.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in left.values()) == adapted.count().trained
    pairs = []
    for name, parameter in adapted.trainable().items():
        if name in adapted.head_names:
            owner, _, last = name.partition(".")
            their_name = f"{owner}.modules_to_save.default.{last}"
        else:
            their_name = name.replace("lora.A", "lora_A.default.weight").replace("lora.B", "lora_B.default.weight")
        pairs.append((parameter, left.pop(f"base_model.model.{their_name}")))
    assert not left
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    ours, reference = adapted.model(**data).logits, oracle(**data).logits
    # Of the largest logit: the perturbed update is large, and float32 products round alike on no two processors.
    torch.testing.assert_close(ours, reference, atol=1e-5 * max(1.0, float(reference.abs().max())), rtol=1e-5)
    assert not torch.allclose(ours, backbone(family, head)(**data).logits, atol=1e-3)
    # Gradients in float64, where rounding does not hide a difference.
    for model in (adapted.model.double(), oracle.double()):
        model(**data).logits.square().sum().backward()
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-9 * float(other.grad.abs().max()), rtol=1e-7)


@pytest.mark.parametrize(
    ("name", "head", "options", "trained"),
    [
        ("roberta-base", "classification", {}, 887_042),
        ("t5-base", "seq2seq", {}, 884_736),
        ("llama-7b", "causal_lm", {"rank": 64, "targets": "all-linear"}, 159_907_840),
        ("llama-13b", "causal_lm", {"rank": 64, "targets": "all-linear"}, 250_347_520),
    ],
)
def test_counts_of_the_surveys_table(name, head, options, trained):
    assert peftlib.attach(backbones.shapes(name, head=head), "lora", **options).count().trained == trained


# The merge tolerances that the card states: the largest difference of logits, as a share of the largest logit.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str
)
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "llama"])
@torch.no_grad()
def test_merge_within_the_stated_tolerance(family, dtype, tolerance):
    """Once, and again on what was merged before."""
    model, data = backbone(family).to(dtype), inputs(family)
    plain = model(**data).logits
    for seed in (1, 2):
        adapted = peftlib.attach(model, "lora", targets="all-linear", seed=seed)
        if dtype == torch.float64:
            model.double()
        perturb(adapted, std=0.05, seed=seed)
        before = model(**data).logits
        assert float((before - plain).abs().max() / plain.abs().max()) > 3 * tolerance
        adapted.merge()
        after = model(**data).logits
        assert after.dtype == dtype
        assert float((after - before).abs().max() / before.abs().max()) < tolerance
        plain = after


@torch.no_grad()
def test_merges_in_sequence_add_up():
    """Two updates merged one after the other are the sum of both."""
    model = backbone("bert")
    original, sites = copy.deepcopy(model), None
    deltas = []
    for seed in (1, 2):
        adapted = peftlib.attach(model, "lora", seed=seed)
        perturb(adapted, seed=seed)
        sites = list(adapted.method.updates)
        deltas.append([u.delta() for u in adapted.method.updates.values()])
        adapted.merge()
    for site, first, second in zip(sites, *deltas):
        before = original.get_submodule(site.path).weight
        torch.testing.assert_close(site.weight, before + first + second, atol=1e-6, rtol=1e-5)


def test_switching_modes_merges_nothing():
    model = backbone("bert")
    adapted = peftlib.attach(model, "lora")
    perturb(adapted)
    site = adapted.host.anatomy.layers[0].sites["attention.query"]
    before = site.weight.clone()
    for _ in range(3):
        model.train()
        model.eval()
        model(**inputs("bert"))
    assert torch.equal(site.weight, before)


def test_dropout_is_on_the_updates_input_and_only_in_training():
    update = LowRank(16, 8, rank=4, scale=1.0, dropout=0.5)
    torch.nn.init.normal_(update.B)
    x, y = torch.randn(5, 16), torch.zeros(5, 8)
    assert torch.equal(update.eval()(x, y), update(x, y))
    torch.manual_seed(0)
    dropped = update.train()(x, y)
    torch.manual_seed(0)
    expected = torch.nn.functional.dropout(x, 0.5) @ update.A.T @ update.B.T
    torch.testing.assert_close(dropped, expected)
    assert not torch.allclose(dropped, update.eval()(x, y))


def test_starts_as_the_original_code_does():
    update = LowRank(64, 32, rank=16, scale=1.0)
    bound = 1 / math.sqrt(64)
    assert not update.B.any()
    assert float(update.A.detach().abs().max()) <= bound
    assert float(update.A.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_b_keeps_its_layout_in_memory():
    """B lies column by column, through copies, dtypes, saving and the optimizer's state: its products are fast so."""
    model = backbone("bert")
    adapted = peftlib.attach(model, "lora")
    update = next(iter(adapted.method.updates.values()))
    optimizer = torch.optim.AdamW(adapted.trainable().values())
    model(**inputs("bert")).logits.sum().backward()
    optimizer.step()
    copied = next(m for m in copy.deepcopy(model).double().modules() if isinstance(m, LowRank))
    for matrix in (update.B, update.B.grad, optimizer.state[update.B]["exp_avg"], copied.B):
        assert matrix.T.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_formula(dtype):
    """Through the fused path (float32) and the one that casts (a bf16 backbone under float32 factors)."""
    torch.manual_seed(0)
    update = LowRank(12, 20, rank=3, scale=0.5)
    torch.nn.init.normal_(update.B)
    x = torch.randn(2, 7, 12, dtype=dtype, requires_grad=True)
    y = torch.randn(2, 7, 20, dtype=dtype, requires_grad=True)
    direction = torch.randn(2, 7, 20)
    inputs = (x, y, update.A, update.B)
    mine = torch.autograd.grad((update(x, y).float() * direction).sum(), inputs)
    formula = y.float() + 0.5 * (x.float() @ update.A.T @ update.B.T)
    theirs = torch.autograd.grad((formula * direction).sum(), inputs)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
@torch.no_grad()
def test_ranks_and_alphas_by_pattern(family, stabilized, tmp_path):
    """The first pattern that matches a name or a path counts; the scale follows a map's own rank."""
    layer = peftlib.anatomy.of(backbone(family)).layers[1].path
    options = {
        "targets": ("attention.query", "attention.value", "ffn.up"),
        "rank_pattern": {f"{layer}.*": 3, "ffn.*": 2, "attention.*": 5},
        "alpha_pattern": {"attention.value": 7.0},
        "rank_stabilized": stabilized,
    }
    adapted = peftlib.attach(backbone(family), "lora", rank=4, alpha=8.0, **options)
    perturb(adapted)
    deltas = {}
    for site, update in adapted.method.updates.items():
        rank = 3 if site.layer else {"ffn.up": 2}.get(site.name, 5)
        alpha = 7.0 if site.name == "attention.value" else 8.0
        assert update.A.shape == (rank, site.in_features)
        deltas[str(site)] = alpha / (math.sqrt(rank) if stabilized else rank) * update.B @ update.A
        torch.testing.assert_close(update.delta(), deltas[str(site)])
    before = adapted.model(**inputs(family)).logits
    loaded = peftlib.load(backbone(family), adapted.save(tmp_path / "adapter"))
    assert loaded.config == adapted.config
    assert torch.equal(loaded.model(**inputs(family)).logits, before)
    assert torch.allclose(adapted.merge()(**inputs(family)).logits, before, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rank_pattern": {"ffn.*": 2}}, TargetError, "'ffn.*' of rank_pattern or alpha_pattern matches none"),
        ({"alpha_pattern": {"nothing": 2}}, TargetError, "'nothing' matches nothing"),
        ({"rank_pattern": {"attention.query": 33}}, TargetError, "rank 33 does not fit"),
        ({"rank_pattern": {"attention.query": 0}}, ConfigError, "rank_pattern.*=0 is too small"),
    ],
)
def test_patterns_that_cannot_be(options, error, match):
    with pytest.raises(error, match=match):
        peftlib.attach(backbone("bert"), "lora", **options)


@pytest.mark.parametrize("rank", [0, 33])
def test_a_rank_that_no_matrix_has(rank):
    with pytest.raises(ValueError, match=str(rank)):
        peftlib.attach(backbone("bert"), "lora", rank=rank)


def test_a_rank_larger_than_one_of_the_targets():
    with pytest.raises(TargetError, match=r"rank 20 .*k_proj \(16 x 32\).*1 to 16"):
        peftlib.attach(backbone("llama"), "lora", rank=20, targets=("attention.query", "attention.key"))


# What is published

NLU = "microsoft/LoRA, examples/NLU/roberta_base_*.sh"
LAYERS = "microsoft/LoRA, loralib/layers.py, Linear"


def check_scale():
    update = next(iter(tiny("lora").method.updates.values()))
    assert update.scale == 16 / 8
    rank_stabilized = next(iter(tiny("lora", rank_stabilized=True).method.updates.values()))
    assert rank_stabilized.scale == pytest.approx(16 / math.sqrt(8))


FACTS = Facts(
    "lora",
    Default("rank", 8, NLU),
    Default("alpha", 16.0, NLU),
    Default("dropout", 0.0, "microsoft/LoRA, modeling_roberta.py, RobertaSelfAttention: no dropout"),
    Default(
        "targets", ("*attention.query", "*attention.value"), "microsoft/LoRA, modeling_roberta.py, RobertaSelfAttention"
    ),
    Start("*.lora.A", kaiming_uniform(), f"{LAYERS}.reset_parameters"),
    Start("*.lora.B", zeros(), f"{LAYERS}.reset_parameters"),
    Trains(("*.lora.A", "*.lora.B"), f"{LAYERS}: the weight requires no gradient"),
    Holds("the scale is alpha / r", check_scale, f"{LAYERS}: self.scaling; Kalajdzievski 2023 for sqrt(r)"),
    Count("roberta-base", 294_912, "the paper's table 2: 0.3 M"),
    Count("t5-base", 884_736, "r (in + out) a map: 72 maps of 768 x 768"),
    Count("llama-7b", 4_194_304, "r (in + out) a map: 64 maps of 4096 x 4096"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
