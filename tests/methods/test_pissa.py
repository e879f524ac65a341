"""PiSSA: its start against a decomposition in float64, parity with HF peft, its files on another machine and in HF
peft's form, the published count, the way back."""

import json
import warnings

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peftlib
from peftlib import backbones
from peftlib.conformance.case import batch, logits, train
from peftlib.errors import StateError, TargetError, UnsupportedError
from tests.methods.facts import Count, Default, Facts, Holds, Trains, tiny
from tests.methods.helpers import Spy, backbone, data, inputs, model, perturb, reload, task

# family: (our sites, HF peft's target_modules). GPT-2's queries, keys and values are one module, which HF peft adapts
# as one and peftlib by part, so the others are compared.
PARITY = {
    "bert": (("attention.*", "ffn.down"), ["query", "key", "value", "attention.output.dense", "output.dense"]),
    "gpt2": (("attention.output", "ffn.up", "ffn.down"), ["attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "t5": (("*attention.query", "*attention.value", "ffn.up"), ["q", "v", "wi"]),
    "llama": ("all-linear", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
}


def same(mine: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(mine, other, atol=1e-5 * max(1.0, float(other.abs().max())), rtol=0)


# The start


@pytest.mark.parametrize("family", list(PARITY))
def test_the_factors_are_the_principal_components_and_the_weight_the_others(family):
    """Against numpy in float64, at a scale that is not 1: the singular values' roots, over s, are in each factor. The
    singular values of random matrices lie close, which makes rounding errors of their vectors larger."""
    plain = peftlib.anatomy.of(model(family)).sites()
    adapted = peftlib.attach(model(family), "pissa", rank=4, alpha=6.0)
    for before, (site, update) in zip(plain, adapted.method.updates.items(), strict=True):
        W = before.weight.detach().double().numpy()
        U, S, Vh = np.linalg.svd(W, full_matrices=False)
        A, B = (t.detach().double().numpy() for t in (update.A, update.B))
        np.testing.assert_allclose(1.5 * B @ A, (U[:, :4] * S[:4]) @ Vh[:4], atol=1e-4)
        np.testing.assert_allclose(A @ A.T, np.diag(S[:4] / 1.5), atol=1e-4)
        np.testing.assert_allclose(B.T @ B, np.diag(S[:4] / 1.5), atol=1e-4)
        np.testing.assert_allclose(site.weight.detach().numpy(), (U[:, 4:] * S[4:]) @ Vh[4:], atol=1e-4)
        assert torch.equal(update.A, update.A_0) and torch.equal(update.B, update.B_0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize("niter", [None, 4])
@torch.no_grad()
def test_the_start_is_the_backbone_s_up_to_rounding(niter, dtype, tolerance):
    """The fast decomposition is random, the start it gives is not: what the factors hold is off the weight."""
    plain = model("llama").to(dtype)
    before = plain(**data("llama")).logits
    adapted = peftlib.attach(plain, "pissa", rank=8, niter=niter)
    after = plain(**data("llama")).logits
    assert float((after - before).abs().max()) < tolerance * float(before.abs().max())
    assert {p.dtype for p in adapted.trainable().values()} == {torch.float32}
    assert {site.weight.dtype for site in adapted.method.updates} == {dtype}


def test_with_dropout_training_does_not_begin_at_the_backbone():
    torch.manual_seed(0)
    plain = model("bert")
    before = logits(plain, **data("bert"))
    peftlib.attach(plain, "pissa", rank=8, dropout=0.5)
    same(logits(plain, **data("bert")), before)
    assert not torch.allclose(plain.train()(**data("bert")).logits, before, atol=1e-2)


def test_the_fast_decomposition_is_near_the_exact_one_and_repeatable():
    """What it leaves in the weight is hardly more than the least that can be left."""

    def left(**options) -> list[torch.Tensor]:
        adapted = peftlib.attach(model("bert"), "pissa", rank=8, **options)
        return [site.weight.detach() for site in adapted.method.updates]

    for exact, fast, again, rough in zip(left(), left(niter=16), left(niter=16), left(niter=0)):
        assert torch.equal(fast, again) and not torch.equal(fast, exact)
        assert float(exact.norm()) < float(fast.norm()) < 1.01 * float(exact.norm()) < float(rough.norm())


# The equation


@torch.no_grad()
def test_equation_on_one_site():
    plain = backbone("bert").double()
    adapted = peftlib.attach(plain, "pissa", rank=4, alpha=6.0)
    W = {site: adapted.method.originals[site].clone() for site in adapted.method.updates}
    adapted.model.double()
    perturb(adapted)
    site = adapted.host.anatomy.layers[1].sites["ffn.up"]
    spy, update = Spy(site.module), site.module.pissa
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    site.module(x)
    _, y = spy[site.module]
    s = 6.0 / 4
    expected = x @ (W[site] - s * update.B_0 @ update.A_0).T + s * x @ update.A.T @ update.B.T + site.bias
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6)  # the factors were float32 when W was rewritten


@pytest.mark.parametrize("rank_stabilized", [False, True], ids=["plain", "rank_stabilized"])
@pytest.mark.parametrize("family", list(PARITY))
def test_parity_with_hf_peft(family, rank_stabilized):
    """The same start, and from the same factors the same logits, gradients and merged weights as HF peft's. The signs
    of singular vectors are free, so the start is compared by the products."""
    targets, theirs = PARITY[family]
    options = {"rank": 4, "alpha": 6.0, "targets": targets, "rank_stabilized": rank_stabilized}
    adapted = peftlib.attach(model(family), "pissa", train_head=False, **options)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=theirs, init_lora_weights="pissa", use_rslora=rank_stabilized
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = peft.get_peft_model(model(family), config).eval()
    left = {n: p for n, p in oracle.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in left.values()) == adapted.count().trained
    for site, update in adapted.method.updates.items():
        other = oracle.base_model.model.get_submodule(site.path)
        product = (other.lora_B["default"].weight @ other.lora_A["default"].weight).detach()
        torch.testing.assert_close((update.B @ update.A).detach(), product, atol=2e-6, rtol=0)
        kept = other.base_layer.weight.T if site.transposed else other.base_layer.weight
        torch.testing.assert_close(site.weight, kept, atol=2e-6, rtol=0)
    perturb(adapted)
    pairs = []
    for name, parameter in adapted.trainable().items():
        path, _, attribute = name.rpartition(".pissa.")
        pairs.append((parameter, left.pop(f"base_model.model.{path}.lora_{attribute}.default.weight")))
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
        for site in adapted.method.updates:  # they differ by rounding
            base = oracle.base_model.model.get_submodule(site.path).base_layer.weight
            base.copy_(site.module.weight)
    for each in (adapted.model.double(), oracle.double()):
        each(**data(family)).logits.square().sum().backward()
    ours, reference = logits(adapted.model, **data(family)), logits(oracle, **data(family))
    torch.testing.assert_close(ours, reference, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(ours, logits(model(family).double(), **data(family)), atol=1e-3)
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-9 * float(other.grad.abs().max()), rtol=1e-7)
    mine, other = adapted.merge().state_dict(), oracle.merge_and_unload().state_dict()
    assert mine.keys() == other.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], other[name], atol=1e-9, rtol=1e-9)


# The files


@pytest.mark.parametrize("keep_original", [True, False])
def test_a_file_brings_its_base_along(keep_original, monkeypatch, tmp_path):
    """On a machine whose decomposition gives something else, and also without a copy of the originals."""
    adapted = peftlib.attach(backbone("bert"), "pissa", rank=4)
    train(adapted, batch("bert"))
    before = logits(adapted.model, **inputs("bert"))
    size = adapted.count()
    assert size.stored - size.head == 2 * size.method
    folder = adapted.save(tmp_path / "adapter")
    svd = torch.linalg.svd

    def other_machine(W, full_matrices):
        U, S, Vh = svd(W, full_matrices=full_matrices)
        return U.flip(1), S.flip(0), Vh.flip(0)

    monkeypatch.setattr(torch.linalg, "svd", other_machine)
    loaded = peftlib.load(backbone("bert"), folder, keep_original=keep_original)
    after = logits(loaded.model, **inputs("bert"))
    assert torch.equal(after, before) if keep_original else torch.allclose(after, before, atol=1e-5)
    if keep_original:
        plain = backbone("bert").state_dict()
        assert all(torch.equal(t, plain[n]) for n, t in loaded.detach().state_dict().items())
    else:
        with pytest.raises(StateError, match="keep_original=False"):
            loaded.detach()


def test_of_a_fused_map_only_the_adapted_parts_are_rewritten():
    plain = backbone("gpt2")
    before = plain.transformer.h[0].attn.c_attn.weight.clone()
    peftlib.attach(plain, "pissa", rank=4, targets=("attention.query", "attention.value"))
    changed = (plain.transformer.h[0].attn.c_attn.weight != before).chunk(3, dim=1)
    assert [float(part.float().mean()) > 0.9 for part in changed] == [True, False, True]
    assert not changed[1].any()


@pytest.mark.parametrize(
    ("name", "options", "trained"),
    [
        ("llama-7b", {}, 32 * 128 * (4 * 2 * 4096 + 3 * (4096 + 11008))),
        ("roberta-base", {"rank": 8, "targets": ("attention.query", "attention.value")}, 294_912),
    ],
)
def test_counts(name, options, trained):
    """LoRA's, here with the rank and targets of the authors' scripts (32 layers of four d x d and three d x f maps) and
    with those of LoRA's GLUE runs; a file holds the start beside it."""
    head = "causal_lm" if name == "llama-7b" else "classification"
    count = peftlib.attach(backbones.shapes(name, head=head), "pissa", **options).count()
    assert count.method == trained
    assert count.stored - count.head == 2 * trained


def _theirs(family: str, folder, **options) -> tuple[nn.Module, torch.Tensor]:
    """A saved PiSSA adapter of HF peft's with all trained parameters moved, and its logits; its start is saved beside
    it, as its conversion wants it."""
    config = {"r": 4, "lora_alpha": 6, "init_lora_weights": "pissa"} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model(family), peft.LoraConfig(task_type=task(family), **config)).eval()
    start = made.peft_config["default"].init_lora_weights
    made.peft_config["default"].init_lora_weights = True
    made.save_pretrained(folder / "start")
    made.peft_config["default"].init_lora_weights = start
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    made.save_pretrained(folder / "pissa")
    return made, logits(made, **data(family))


THEIRS = PARITY | {"gpt2": ((), ["c_attn", "c_fc"])}


@pytest.mark.parametrize("family", list(THEIRS))
def test_their_files_are_read_on_the_original_backbone_and_written_as_lora(family, tmp_path):
    made, expected = _theirs(family, tmp_path, target_modules=THEIRS[family][1], use_rslora=family == "t5")
    adapted = peftlib.from_hf_peft(model(family), tmp_path / "pissa")
    assert (adapted.name, adapted.config.rank, adapted.config.alpha) == ("pissa", 4, 6.0)
    got = logits(adapted.model, **data(family))
    same(got, expected)
    assert not torch.allclose(got, logits(model(family), **data(family)), atol=1e-2)
    loaded = peftlib.load(model(family), adapted.save(tmp_path / "ours"))
    assert torch.equal(logits(loaded.model, **data(family)), got)

    peftlib.to_hf_peft(loaded, tmp_path / "back")
    settings = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert "init_lora_weights" not in settings
    same(logits(reload(family, tmp_path / "back"), **data(family)), got)
    if family != "gpt2":  # HF peft's factors of a fused map are written beside each other, with zeros between
        assert settings["r"] == 8
        again = peftlib.from_hf_peft(model(family), tmp_path / "back")
        assert again.name == "lora"
        same(logits(again.model, **data(family)), got)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.save_pretrained(
                tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
            )
        ours, theirs = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("back", "converted"))
        assert {n: t.shape for n, t in ours.items() if ".lora_" in n} == {n: t.shape for n, t in theirs.items()}
        for name in (n for n in ours if n.endswith("lora_A.weight")):
            mine, other = (f[name.replace("lora_A", "lora_B")] @ f[name] for f in (ours, theirs))
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'.*weight_conversion"),
        ({"use_dora": True}, "use_dora|pissa"),
    ],
    ids=["niter", "dora"],
)
def test_files_that_cannot_be_read_exactly_are_refused(options, match, tmp_path):
    _theirs("bert", tmp_path, target_modules=["query"], **options)
    plain = model("bert")
    with pytest.raises(UnsupportedError, match=match):
        peftlib.from_hf_peft(plain, tmp_path / "pissa")
    assert all(torch.equal(t, model("bert").state_dict()[n]) for n, t in plain.state_dict().items())


# What is refused


def test_weights_that_cannot_be_rewritten():
    coded = backbone("bert")
    value = coded.bert.encoder.layer[1].attention.self.value
    value.weight = nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UnsupportedError, match=r"attention\.self\.value is quantized \(uint8\)"):
        peftlib.attach(coded, "pissa", rank=4)

    pissa = peftlib.config("pissa", rank=4)
    plain = backbone("bert")
    before = {n: t.clone() for n, t in plain.state_dict().items()}
    for other in (peftlib.config("qlora", rank=4), "delta_lora"):
        with pytest.raises(UnsupportedError, match=r"is quantized|pissa wants a place that is taken"):
            peftlib.attach(plain, peftlib.combine(other, pissa))
        assert all(torch.equal(t, before[n]) for n, t in plain.state_dict().items())


def test_values_that_cannot_be():
    with pytest.raises(TargetError, match=r"rank 129 does not fit .* choose a rank from 1 to 32"):
        peftlib.attach(backbone("bert"), "pissa", rank=129)
    with pytest.raises(ValueError, match="niter=-1"):
        peftlib.config("pissa", niter=-1)


# What is published

SCRIPT = "GraphPKU/PiSSA, scripts/metamath_llama2_7b/run_pissa.sh"


def check_principal_components():
    """B A is the best approximation of the weight of its rank, with the singular values' roots in each factor."""
    original = {site: site.weight.detach().clone() for site in tiny("lora", targets="all-linear").method.updates}
    adapted = tiny("pissa")
    by_path = {str(site): weight for site, weight in original.items()}
    for site, update in adapted.method.updates.items():
        U, S, V = torch.linalg.svd(by_path[str(site)].double(), full_matrices=False)
        r = len(update.A)
        delta = update.scale * update.B.double() @ update.A.double()
        torch.testing.assert_close(delta, (U[:, :r] * S[:r]) @ V[:r], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(update.A.double().norm(dim=1) ** 2, S[:r] / update.scale, atol=1e-5, rtol=1e-4)


FACTS = Facts(
    "pissa",
    Default("rank", 128, SCRIPT),
    Default("alpha", None, f"{SCRIPT}: lora_alpha 128, as the rank"),
    Default("dropout", 0.0, SCRIPT),
    Default("targets", "all-linear", f"{SCRIPT}: all seven kinds of maps"),
    Default("niter", None, "GraphPKU/PiSSA, utils/init_pissa.py: init_weights pissa; the scripts take pissa_niter_16"),
    Holds("the factors are the principal components", check_principal_components, "HF peft's pissa, in init_pissa.py"),
    Trains(("*.pissa.A", "*.pissa.B"), "GraphPKU/PiSSA, utils/init_pissa.py"),
    Count("llama-7b", 319_815_680, "LoRA's of rank 128 on all maps"),
    Count("roberta-base", 21_233_664, "LoRA's of rank 128 on all maps"),
    Count("t5-base", 51_904_512, "LoRA's of rank 128 on all maps"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
