"""DoRA: its equation and gradients, parity with HF peft, its files, the published counts, its start and its merge."""

import json
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peftlib
from peftlib import backbones
from peftlib.conformance.case import logits
from peftlib.errors import LoadError, TargetError, UnsupportedError
from tests.methods.facts import Count, Default, Facts, Holds, Start, Trains, kaiming_uniform, tiny, zeros
from tests.methods.helpers import Spy, backbone, data, inputs, model, perturb, reload, task, theirs

ALL = ("attention.query", "attention.key", "attention.value", "attention.output", "ffn.up", "ffn.down")
# family: (our sites, HF peft's target_modules). GPT-2's queries, keys and values are one module, which HF peft adapts
# as one and peftlib by part, so the others are compared.
PARITY = {
    "bert": (ALL[:3], ["query", "key", "value"]),
    "gpt2": (ALL[3:], ["attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "t5": (("*attention.query", "*attention.value", "ffn.up"), ["q", "v", "wi"]),
    "llama": ("all-linear", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
}


def equation(x, W, b, A, B, m, scale):
    """Equation 5 of the paper with the norm of the code: each row of W + s B A at unit length, times its m."""
    V = W + scale * B @ A
    rows = [m[j] * V[j] / V[j].square().sum().sqrt() for j in range(len(m))]
    return x @ torch.stack(rows).T + b


@pytest.fixture
def site():
    """One adapted map in float64, away from its start."""
    adapted = peftlib.attach(backbone("bert"), "dora", rank=4, alpha=6.0)
    adapted.model.double()
    perturb(adapted)
    return adapted.host.anatomy.layers[1].sites["ffn.up"]


@torch.no_grad()
def test_equation_on_one_site(site):
    spy = Spy(site.module)
    layer, x = site.module.dora, torch.randn(2, 5, 32, dtype=torch.float64)
    site.module(x)
    _, y = spy[site.module]
    expected = equation(x, site.weight, site.bias, layer.A, layer.B, layer.m, 6.0 / 4)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
    assert not torch.allclose(y, F.linear(x, site.weight, site.bias), atol=1e-2)


@pytest.mark.parametrize("detached", [True, False])
def test_the_norm_is_a_constant_of_the_backward_pass(site, detached):
    """Section 4.3: the gradients are those of m / n (W + s B A) x with a number n; the whole gradient is an option."""
    layer, x = site.module.dora, torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    layer.detach_norm = detached
    direction = torch.randn(2, 5, site.out_features, dtype=torch.float64)
    mine = torch.autograd.grad((site.module(x) * direction).sum(), (x, layer.A, layer.B, layer.m))

    V = site.weight + 1.5 * layer.B @ layer.A
    whole = equation(x, site.weight, site.bias, layer.A, layer.B, layer.m, 1.5)
    constant = x @ ((layer.m / V.norm(dim=1).detach())[:, None] * V).T + site.bias
    leaves = (x, layer.A, layer.B, layer.m)
    both = [torch.autograd.grad((y * direction).sum(), leaves, retain_graph=True) for y in (constant, whole)]
    for gradient, with_constant, of_whole in zip(mine, *both):
        torch.testing.assert_close(gradient, with_constant if detached else of_whole, atol=1e-10, rtol=1e-10)
    assert not torch.allclose(both[0][1], both[1][1], atol=1e-3)


def test_what_trains_sees_the_dropped_input(site):
    """As in the authors' code: x is whole in W x itself and dropped where m / n - 1 and B A multiply it."""
    layer, x = site.module.dora, torch.randn(2, 5, 32, dtype=torch.float64)
    layer.dropout = nn.Dropout(0.5)
    site.module.train()
    torch.manual_seed(0)
    y = site.module(x)
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)
    V = site.weight + 1.5 * layer.B @ layer.A
    g = layer.m / V.norm(dim=1)
    update = 1.5 * dropped @ layer.A.T @ layer.B.T
    expected = F.linear(x, site.weight, site.bias) + (g - 1) * (dropped @ site.weight.T) + g * update
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
    site.module.eval()
    whole = equation(x, site.weight, site.bias, layer.A, layer.B, layer.m, 1.5)
    torch.testing.assert_close(site.module(x), whole, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", list(PARITY))
@torch.no_grad()
def test_the_lengths_start_as_those_of_an_output_s_weights(family, dtype):
    """Rows of the (out, in) weight, also where a Conv1D stores it transposed and where it holds three maps."""
    adapted = peftlib.attach(model(family).to(dtype), "dora", targets="all-linear", rank=4)
    for site, layer in adapted.method.updates.items():
        assert layer.m.dtype == torch.float32
        torch.testing.assert_close(layer.m, site.weight.float().square().sum(dim=1).sqrt(), atol=1e-6, rtol=1e-6)
        assert not layer.B.any()


def test_a_row_of_zeros_stays_as_it_is():
    plain = backbone("bert")
    weight = plain.bert.encoder.layer[0].attention.self.value.weight
    with torch.no_grad():
        weight[3] = 0
    before = plain(**inputs("bert")).logits
    adapted = peftlib.attach(plain, "dora", rank=4)
    assert torch.equal(plain(**inputs("bert")).logits, before)
    plain(**inputs("bert")).logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in adapted.trainable().values())
    adapted.merge()
    assert not weight[3].any()
    torch.testing.assert_close(plain(**inputs("bert")).logits, before)


@pytest.mark.parametrize(
    ("name", "head", "options", "trained"),
    [
        ("roberta-base", "classification", {"rank": 8, "targets": ("attention.query", "attention.value")}, 313_344),
        ("llama-7b", "causal_lm", {}, 56_975_360),
        ("llama-7b", "causal_lm", {"rank": 16, "alpha": 32.0}, 28_925_952),
    ],
)
def test_published_counts(name, head, options, trained):
    """Table 1: 0.84 % of LLaMA-7B with its adapters at rank 32, 0.43 % at 16."""
    count = peftlib.attach(backbones.shapes(name, head=head), "dora", **options).count()
    assert count.method == trained
    if name == "llama-7b":
        share = 100 * trained / (count.total + trained)
        assert round(share, 2) == {56_975_360: 0.84, 28_925_952: 0.43}[trained]


@pytest.mark.parametrize("rank_stabilized", [False, True], ids=["plain", "rank_stabilized"])
@pytest.mark.parametrize("family", list(PARITY))
def test_parity_with_hf_peft(family, rank_stabilized):
    """The same weights give the same logits, gradients, merged weights and count as HF peft's."""
    targets, theirs = PARITY[family]
    options = {"rank": 4, "alpha": 12.0, "targets": targets, "rank_stabilized": rank_stabilized}
    adapted = peftlib.attach(model(family), "dora", train_head=False, **options)
    perturb(adapted)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=theirs, use_dora=True, use_rslora=rank_stabilized)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = peft.get_peft_model(model(family), config).eval()
    left = {n: p for n, p in oracle.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in left.values()) == adapted.count().trained
    pairs = []
    for name, parameter in adapted.trainable().items():
        path, _, attribute = name.rpartition(".dora.")
        end = {"m": "lora_magnitude_vector"}.get(attribute, f"lora_{attribute}")
        pairs.append((parameter, left.pop(f"base_model.model.{path}.{end}.default.weight")))
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    batch = data(family)
    for each in (adapted.model.double(), oracle.double()):
        each(**batch).logits.square().sum().backward()
    ours, reference = logits(adapted.model, **batch), logits(oracle, **batch)
    torch.testing.assert_close(ours, reference, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(ours, logits(model(family).double(), **batch), atol=1e-3)
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-9 * float(other.grad.abs().max()), rtol=1e-7)
    mine, other = adapted.merge().state_dict(), oracle.merge_and_unload().state_dict()
    assert mine.keys() == other.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], other[name], atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_the_merged_rows_have_the_trained_lengths():
    """Twice in sequence, the second time from the lengths that the first one left."""
    plain = backbone("llama")
    for seed in (1, 2):
        adapted = peftlib.attach(plain, "dora", rank=4, seed=seed)
        perturb(adapted, seed=seed)
        lengths = {site: layer.m.abs() for site, layer in adapted.method.updates.items()}
        adapted.merge()
        for site, m in lengths.items():
            torch.testing.assert_close(site.weight.norm(dim=1), m, atol=1e-5, rtol=1e-5)


# Files of HF peft


def _same(mine: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(mine, other, atol=1e-5 * max(1.0, float(other.abs().max())), rtol=0)


def _theirs(family: str, folder, **options) -> torch.Tensor:
    """A saved DoRA adapter of HF peft's, and its logits."""
    settings = {"r": 4, "lora_alpha": 6} | options
    return theirs(family, peft.LoraConfig(task_type=task(family), use_dora=True, **settings), folder)


THEIRS = PARITY | {"gpt2": ((), ["c_attn", "c_fc"])}


@pytest.mark.parametrize("family", list(THEIRS))
def test_their_files_are_read_and_written(family, tmp_path):
    expected = _theirs(family, tmp_path / "theirs", target_modules=THEIRS[family][1], use_rslora=family == "t5")
    adapted = peftlib.from_hf_peft(model(family), tmp_path / "theirs")
    assert (adapted.name, adapted.config.rank, adapted.config.alpha) == ("dora", 4, 6.0)
    got = logits(adapted.model, **data(family))
    _same(got, expected)
    assert not torch.allclose(got, logits(model(family), **data(family)), atol=1e-2)
    loaded = peftlib.load(model(family), adapted.save(tmp_path / "ours"))
    assert torch.equal(logits(loaded.model, **data(family)), got)
    peftlib.to_hf_peft(loaded, tmp_path / "back")
    _same(logits(reload(family, tmp_path / "back"), **data(family)), got)


@pytest.mark.parametrize("targets", ["all-linear", ("attention.query", "attention.value"), ("attention.value",)])
def test_parts_of_a_fused_map_are_written(targets, tmp_path):
    """Rows of it that no part adapts keep their own length."""
    adapted = peftlib.attach(model("gpt2"), "dora", rank=3, alpha=6.0, targets=targets)
    perturb(adapted)
    before = logits(adapted.model, **data("gpt2"))
    peftlib.to_hf_peft(adapted, tmp_path / "theirs")
    _same(logits(reload("gpt2", tmp_path / "theirs"), **data("gpt2")), before)


def test_what_theirs_or_ours_lacks_is_refused(tmp_path):
    adapted = peftlib.attach(model("bert"), "dora", rank=4, detach_norm=False)
    with pytest.raises(UnsupportedError, match="detach_norm=False"):
        peftlib.to_hf_peft(adapted, tmp_path / "ours")
    _theirs("bert", tmp_path / "theirs", target_modules=["query"])
    path = tmp_path / "theirs" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"alpha_pattern": {"0.attention.self.query": 3}}))
    with pytest.raises(UnsupportedError, match="alpha_pattern"):
        peftlib.from_hf_peft(model("bert"), tmp_path / "theirs")
    path.write_text(json.dumps(settings | {"use_dora": False}))
    with pytest.raises(UnsupportedError, match="lora_magnitude_vector"):
        peftlib.from_hf_peft(model("bert"), tmp_path / "theirs")
    peftlib.to_hf_peft(peftlib.attach(model("bert"), "lora"), tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(LoadError, match="lora_magnitude_vector"):
        peftlib.from_hf_peft(model("bert"), tmp_path / "lora")


def test_targets_that_cannot_be():
    with pytest.raises(TargetError, match=r"rank 20 .*k_proj \(16 x 32\).*1 to 16"):
        peftlib.attach(backbone("llama"), "dora", rank=20)
    with pytest.raises(ValueError, match="rank=0"):
        peftlib.config("dora", rank=0)
    coded = backbone("bert")
    value = coded.bert.encoder.layer[1].attention.self.value
    value.weight = nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UnsupportedError, match=r"kept as uint8, which peftlib cannot read"):
        peftlib.attach(coded, "dora", rank=4)


@torch.no_grad()
def test_beside_another_method_on_the_same_maps():
    """In front of it, it merges exactly; behind it, it would measure what the other one gives."""
    dora, lora = peftlib.config("dora", rank=4), peftlib.config("lora")
    adapted = peftlib.attach(backbone("bert"), peftlib.combine(dora, lora))
    perturb(adapted)
    before = logits(adapted.model, **inputs("bert"))
    _same(logits(adapted.merge(), **inputs("bert")), before)
    with pytest.raises(UnsupportedError, match=r"another method changes the output of .*query.*name dora before it"):
        peftlib.attach(backbone("bert"), peftlib.combine(lora, dora))


# What is published

SCRIPT = "NVlabs/DoRA, commonsense_reasoning/llama_7B_Dora.sh"
LAYER = "NVlabs/DoRA, commonsense_reasoning/peft/src/peft/tuners/dora.py"
TARGETS = ("*attention.query", "*attention.key", "*attention.value", "ffn.up", "ffn.down")


def check_lengths_start_as_the_rows():
    for site, update in tiny("dora").method.updates.items():
        torch.testing.assert_close(update.m.detach(), site.weight.norm(dim=1))


FACTS = Facts(
    "dora",
    Default("rank", 32, "NVlabs/DoRA, commonsense_reasoning/README.md: llama_7B_Dora.sh 32 64"),
    Default("alpha", 64.0, "NVlabs/DoRA, commonsense_reasoning/README.md: llama_7B_Dora.sh 32 64"),
    Default("dropout", 0.05, "NVlabs/DoRA, commonsense_reasoning/finetune.py, train"),
    Default("targets", TARGETS, f"{SCRIPT}: q_proj, k_proj, v_proj, up_proj, down_proj"),
    Default("detach_norm", True, f"{LAYER}, Linear.forward with dora_simple, which finetune.py has on"),
    Start("*.dora.A", kaiming_uniform(), f"{LAYER}, reset_parameters"),
    Start("*.dora.B", zeros(), f"{LAYER}, reset_parameters"),
    Trains(("*.dora.A", "*.dora.B", "*.dora.m"), LAYER),
    Holds("the lengths start as those of the rows", check_lengths_start_as_the_rows, f"{LAYER}, _find_and_replace"),
    Count("llama-7b", 56_975_360, "table 1: 0.84 %, of all parameters with DoRA's"),
    Count("llama-7b", 28_925_952, "table 1: 0.43 %, at half the rank", {"rank": 16}),
    Count("roberta-base", 4_792_320, "r (in + out) + out a map"),
    Count("t5-base", 11_381_760, "r (in + out) + out a map"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
