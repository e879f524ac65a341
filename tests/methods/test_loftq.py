"""LoftQ: the alternation and its error, HF peft's start, bits over the layers, files, merge."""

import itertools
from functools import partial

import bitsandbytes.functional as bnb
import peft.utils.loftq_utils as theirs
import pytest
import safetensors
import torch
from torch import nn

import peftlib
from peftlib import backbones, report
from peftlib.conformance.case import batch, train
from peftlib.errors import PeftlibError
from peftlib.mechanisms.quantized import NormalFloatWeight, UniformWeight
from peftlib.methods.reparameterized.lora.quantization.loftq import alternate, factors
from tests.mechanisms import test_quantized as reference
from tests.methods.facts import Count, Default, Facts, Holds, Trains
from tests.methods.helpers import backbone, inputs, perturb

FAMILIES = ["bert", "t5", "llama", "gpt2"]
KINDS = ["normal", "heavy-tailed", "low rank and noise"]


def _weight(kind: str = "normal", rows: int = 96, columns: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    if kind == "heavy-tailed":
        weight *= torch.randn(rows, columns, generator=generator).exp()
    if kind == "low rank and noise":
        weight += torch.randn(rows, 4, generator=generator) @ torch.randn(4, columns, generator=generator)
    return 0.05 * weight


def _alternate(weight, rank, bits=4, iterations=10, double=False, parts=None):
    quantize = partial(NormalFloatWeight, bits=bits, double=double)
    return alternate(weight, parts or {"": slice(None)}, rank, quantize, iterations)


# Even levels


@pytest.mark.parametrize("bits", [2, 4])
def test_uniform_levels_are_the_originals(bits):
    """yxli2123/LoftQ, glue/utils_qaunt.py, weight_quant_fn: cut at two standard deviations, then 2^bits even levels."""
    weight = _weight("heavy-tailed").double()
    cut = weight.clamp(weight.mean() - 2 * weight.std(), weight.mean() + 2 * weight.std())
    unit = (cut - cut.min()) / (cut.max() - cut.min())
    expected = (unit * (2**bits - 1)).round() / (2**bits - 1) * (cut.max() - cut.min()) + cut.min()
    found = UniformWeight(weight, bits=bits)
    torch.testing.assert_close(found(torch.float64), expected, atol=1e-7, rtol=1e-6)
    assert len(found(torch.float64).unique()) == 2**bits
    assert found.nbytes == weight.numel() * bits // 8 + 8


def test_uniform_levels_start_nearer_than_plain_ones_and_load_again(tmp_path):
    adapted = peftlib.attach(backbone("bert"), "loftq", rank=4, alpha=4.0, bits=2, quantizer="uniform")
    assert all(min(errors[1:]) < errors[0] for errors in adapted.method.errors.values())
    perturb(adapted)
    with torch.no_grad():
        expected = adapted.model(**inputs("bert")).logits
        loaded = peftlib.load(backbone("bert"), adapted.save(tmp_path / "a"))
        assert torch.equal(loaded.model(**inputs("bert")).logits, expected)
        torch.testing.assert_close(adapted.merge()(**inputs("bert")).logits, expected, atol=1e-5, rtol=1e-5)
    for options in ({"quantizer": "int8"}, {"quantizer": "uniform", "double_quantization": True}):
        with pytest.raises(PeftlibError, match=r"quantizer='int8'|a uniform quantizer has one scale"):
            peftlib.config("loftq", **options)


# Tables of embeddings


def test_the_glue_scripts_tables_are_decomposed_trained_and_merged(tmp_path):
    """yxli2123/LoftQ, glue/utils.py with --quant_embedding: each nn.Embedding whose name has no "token" in it."""
    options = {"rank": 4, "alpha": 4.0, "embeddings": ("word_embeddings", "position_embeddings")}
    model = backbone("bert")
    original = model.bert.embeddings.word_embeddings.weight.detach().clone()
    adapted = peftlib.attach(model, "loftq", **options)
    errors = adapted.method.errors["bert.embeddings.word_embeddings"]
    assert min(errors[1:]) < errors[0]
    table, update = adapted.method.tables["bert.embeddings.word_embeddings"]
    error = (table.weight + update.delta() - original).norm() / original.norm()
    assert float(error) == pytest.approx(min(errors[1:]), rel=1e-4)
    assert {f"bert.embeddings.{name}.lora.{factor}" for name in options["embeddings"] for factor in "AB"} < set(
        adapted.trainable()
    )
    perturb(adapted)
    with torch.no_grad():
        expected = adapted.model(**inputs("bert")).logits
        loaded = peftlib.load(backbone("bert"), adapted.save(tmp_path / "a"))
        assert torch.equal(loaded.model(**inputs("bert")).logits, expected)
        torch.testing.assert_close(adapted.merge()(**inputs("bert")).logits, expected, atol=1e-5, rtol=1e-5)
    assert type(adapted.model.bert.embeddings.word_embeddings) is nn.Embedding
    bare = backbone("bert")
    peftlib.attach(bare, "loftq", **options).detach()
    assert torch.equal(bare.bert.embeddings.word_embeddings.weight, original)


@pytest.mark.parametrize(
    ("family", "head", "name", "said"),
    [
        ("bert", "classification", "wpe", "it has position_embeddings"),
        ("t5", "seq2seq", "shared", "shared with other"),
        ("gpt2", "causal_lm", "wte", "shared with other"),
    ],
)
def test_tables_that_cannot_be_decomposed_are_named(family, head, name, said):
    model = backbone(family, head)
    with pytest.raises(PeftlibError, match=said):
        peftlib.attach(model, "loftq", rank=4, alpha=4.0, embeddings=(name,))
    assert not any(hasattr(module, "quantized") for module in model.modules())


# The alternation


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)], ids=str)
def test_factors_are_the_truncated_decomposition(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    B, A = factors(matrix, 5)
    U, S, V = torch.linalg.svd(matrix.double(), full_matrices=False)
    torch.testing.assert_close(B @ A, (U[:, :5] * S[:5]) @ V[:5])
    torch.testing.assert_close(B.T @ B, torch.diag(S[:5]), atol=1e-9, rtol=0)
    torch.testing.assert_close(A @ A.T, torch.diag(S[:5]), atol=1e-9, rtol=0)


def test_factors_of_a_matrix_of_lower_rank_are_finite():
    matrix = torch.outer(torch.arange(6.0), torch.arange(8.0))
    B, A = factors(matrix, 3)
    torch.testing.assert_close((B @ A).float(), matrix, atol=1e-6, rtol=1e-5)
    assert not any(t.any() for t in factors(torch.zeros(6, 8), 3))


@pytest.mark.parametrize("rank", [8, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_at_4_bits_the_error_falls_with_every_iteration(kind, rank):
    *_, errors = _alternate(_weight(kind, 256, 384), rank, iterations=5)
    assert len(errors) == 6
    assert all(later < earlier for earlier, later in itertools.pairwise(errors)), errors


@pytest.mark.parametrize("rank", [8, 32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4])
def test_after_every_iteration_the_error_is_below_plain_quantization(bits, kind, rank):
    weight = _weight(kind)
    *_, errors = _alternate(weight, rank, bits)
    plain = NormalFloatWeight(weight, bits, double=False)(torch.float32)
    assert errors[0] == pytest.approx(float((weight - plain).norm() / weight.norm()), rel=1e-5)
    assert max(errors[1:]) < errors[0]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["normal", "low rank and noise"])
def test_the_best_iterate_is_kept(kind, double):
    """At 2 bits the error rises again; what is kept has the smallest of all."""
    weight = _weight(kind)
    Q, found, errors = _alternate(weight, 8, bits=2, iterations=12, double=double)
    assert errors[-1] > min(errors)
    B, A = found[""]
    left = weight - Q(torch.float32) - (B @ A).float()
    assert float(left.norm() / weight.norm()) == pytest.approx(min(errors), rel=1e-5)


def test_the_parts_of_a_fused_weight_have_factors_of_their_own():
    weight = _weight(rows=96)
    parts = {"query": slice(0, 32), "value": slice(64, 96)}
    Q, found, errors = _alternate(weight, 4, iterations=1, parts=parts)
    lost = weight.double() - Q(torch.float64)
    for name, rows in parts.items():
        U, S, V = torch.linalg.svd(lost[rows], full_matrices=False)
        torch.testing.assert_close(found[name][0] @ found[name][1], (U[:, :4] * S[:4]) @ V[:4])
        lost[rows] -= found[name][0] @ found[name][1]
    assert errors[1] == pytest.approx(float(lost.norm() / weight.norm()), rel=1e-6)


class _Params4bit:
    """bitsandbytes' class, without its way to the device."""

    def __init__(self, data, requires_grad, compress_statistics, quant_type):
        self.data, self.quant_state = bnb.quantize_4bit(
            data, quant_type=quant_type, compress_statistics=compress_statistics
        )

    def to(self, device):
        return self


def _theirs(weight, rank, iterations, monkeypatch):
    """HF peft's own function, which computes on CUDA or XPU only, on the CPU."""
    move = torch.Tensor.to

    def stay(tensor, *args, **kwargs):
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return move(tensor, *("cpu" if a == "cuda" else a for a in args), **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", stay)
        patch.setattr("bitsandbytes.nn.Params4bit", _Params4bit)
        patch.setattr(theirs, "clear_device_cache", lambda: None)
        return theirs.loftq_init(weight, num_bits=4, reduced_rank=rank, num_iter=iterations)


@pytest.mark.parametrize("iterations", [1, 5])
def test_the_start_is_hf_pefts(iterations, monkeypatch):
    """Equal codes but for a few that lie between two levels, and the same product."""
    weight = _weight()
    Q, A, B = _theirs(weight, 8, iterations, monkeypatch)
    mine, found, _ = _alternate(weight, 8, iterations=iterations)
    assert float(((mine(torch.float32) - Q).abs() > 1e-5).double().mean()) < 1e-3
    mine_B, mine_A = found[""]
    product = B @ A
    assert float((product - (mine_B @ mine_A)).norm() / product.norm()) < 1e-2
    assert mine_B.norm(dim=0).tolist() == pytest.approx(B.norm(dim=0).tolist(), rel=1e-2)
    assert mine_A.norm(dim=1).tolist() == pytest.approx(A.norm(dim=1).tolist(), rel=1e-2)


def test_2_bit_levels_follow_the_rule_of_the_4_bit_ones():
    weight = _weight(rows=3, columns=64)
    levels = reference.normal_float_levels(bits=2)
    codes, scales = reference.quantize(weight.flatten().tolist(), levels, 64)
    expected = torch.tensor([levels[c] * scales[i // 64] for i, c in enumerate(codes)]).view(3, 64)
    mine = NormalFloatWeight(weight, bits=2, double=False)
    torch.testing.assert_close(mine(torch.float32), expected, atol=1e-7, rtol=1e-5)
    assert mine.nbytes * 8 / weight.numel() == 2 + 32 / 64


# On backbones


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_starts_nearer_the_weights_than_qlora(family):
    plain = backbone(family)
    adapted = peftlib.attach(backbone(family), "loftq", rank=4, alpha=6.0)
    for site, update in adapted.method.updates.items():
        original = plain.get_submodule(site.path).weight
        original = (original.T if type(plain.get_submodule(site.path)).__name__ == "Conv1D" else original)[site.rows]
        quantized = adapted.method.quantized[site.path].weight[site.rows]
        assert (original - quantized - update.delta()).norm() < (original - quantized).norm(), site
    assert adapted.method.errors.keys() == adapted.method.quantized.keys()
    before = plain(**inputs(family)).logits
    distance = float((adapted.model(**inputs(family)).logits - before).norm())
    qlora = peftlib.attach(backbone(family), "qlora", rank=4)
    assert distance < float((qlora.model(**inputs(family)).logits - before).norm())


def test_a_scale_leaves_the_start_as_it_is():
    one, other = (peftlib.attach(backbone("bert"), "loftq", rank=4, alpha=alpha) for alpha in (4.0, 32.0))
    with torch.no_grad():
        torch.testing.assert_close(one.model(**inputs("bert")).logits, other.model(**inputs("bert")).logits)


@pytest.mark.parametrize(("bits", "expected"), [(2, [2, 2]), (3, [4, 2]), (4, [4, 4])])
def test_the_first_layers_take_four_bits(bits, expected):
    adapted = peftlib.attach(backbone("bert"), "loftq", rank=4, alpha=4.0, bits=bits, iterations=1)
    layers = adapted.host.anatomy.layers
    assert [layer.sites["ffn.up"].module.quantized.bits for layer in layers] == expected


@torch.no_grad()
def test_maps_that_are_only_quantized_or_only_adapted():
    options = {"targets": ("attention.query", "ffn.down"), "quantize": ("attention.*",), "rank": 4, "alpha": 4.0}
    adapted = peftlib.attach(backbone("bert"), "loftq", **options)
    assert len(adapted.method.quantized) == 2 * 4
    assert {path.rpartition(".")[2] for path in adapted.method.errors} == {"query"}
    assert all(update.B.any() == ("query" in site.path) for site, update in adapted.method.updates.items())
    perturb(adapted)
    before = adapted.model(**inputs("bert")).logits
    torch.testing.assert_close(adapted.merge()(**inputs("bert")).logits, before, atol=1e-5, rtol=1e-5)


def test_files_hold_the_factors_alone_and_the_codes_come_out_the_same(tmp_path):
    adapted = peftlib.attach(backbone("llama"), "loftq", rank=4, alpha=4.0)
    train(adapted, batch("llama"), steps=3)
    before = adapted.model(**inputs("llama")).logits
    folder = adapted.save(tmp_path / "adapter")
    with safetensors.safe_open(folder / "adapter.safetensors", "pt") as file:
        names = set(file.keys())
    assert all(n.endswith((".lora.A", ".lora.B")) for n in names - set(adapted.head_names))
    loaded = peftlib.load(backbone("llama"), folder)
    assert torch.equal(loaded.model(**inputs("llama")).logits, before)
    for path, module in adapted.method.quantized.items():
        assert torch.equal(module.quantized.codes, loaded.method.quantized[path].quantized.codes)


def test_a_backbone_in_bfloat16_keeps_its_dtype():
    adapted = peftlib.attach(backbone("llama").to(torch.bfloat16), "loftq", rank=4, alpha=4.0, iterations=1)
    assert {m.weight.dtype for m in adapted.method.quantized.values()} == {torch.bfloat16}
    assert {m.weight.dtype for m in adapted.merge().modules() if isinstance(m, nn.Linear)} == {torch.bfloat16}


def test_counts():
    adapted = peftlib.attach(backbones.shapes("llama-7b", head="causal_lm"), "loftq")
    assert adapted.count().trained == 159_907_840


def test_errors_as_a_table_and_a_figure():
    adapted = peftlib.attach(backbone("bert"), "loftq", rank=4, alpha=4.0, iterations=3)
    table = report.quantization_errors(adapted)
    assert list(table.columns) == [0, 1, 2, 3]
    assert table.index.tolist() == list(adapted.method.errors)
    assert table.loc["bert.encoder.layer.1.output.dense"].tolist() == list(adapted.method.errors.values())[-1]
    (axes,) = report.quantization_error_figure(adapted).axes
    drawn = axes.lines[-1]
    assert drawn.get_ydata().tolist() == pytest.approx(table.mean().tolist())
    with pytest.raises(PeftlibError, match="lora"):
        report.quantization_errors(peftlib.attach(backbone("bert"), "lora"))


@pytest.mark.parametrize(
    "options",
    [{"rank": 0}, {"rank": 48}, {"iterations": 0}, {"bits": 1}, {"bits": 8}, {"compute": "int8"}, {"alpha": 0}],
    ids=str,
)
def test_bad_values(options):
    with pytest.raises(PeftlibError, match=str(next(iter(options.values())))):
        peftlib.attach(backbone("bert"), "loftq", **options)


# What is published

GLUE = "yxli2123/LoftQ, glue/train_glue.sh"


def check_scale_of_one():
    """``LinearQuantLoRA.forward`` adds left(right(x)) without a scale."""
    config = peftlib.config("loftq")
    assert config.alpha / config.rank == 1


FACTS = Facts(
    "loftq",
    Default("rank", 64, "yxli2123/LoftQ, README.md: the published 4-bit models are of rank 64 (glue: 32)"),
    Default("iterations", 5, f"{GLUE}: num_iter; README.md: five alternating steps"),
    Default("bits", 4, "yxli2123/LoftQ, quantize_save.py, arg_parse (glue: 2)"),
    Default("quantizer", "normal_float", "yxli2123/LoftQ, README.md: NF4 models (glue: uniform)"),
    Default("double_quantization", False, "yxli2123/LoftQ, glue/utils_qaunt.py, quant_nf4_block: scales as they are"),
    Default("targets", "all-linear", "yxli2123/LoftQ, glue/utils.py, replace_module: query, key, value and all dense"),
    Default("dropout", 0.0, "yxli2123/LoftQ, glue/utils.py, LinearQuantLoRA.forward"),
    Holds("the scale is one", check_scale_of_one, "yxli2123/LoftQ, glue/utils.py, LinearQuantLoRA.forward"),
    Trains(("*.lora.A", "*.lora.B"), "yxli2123/LoftQ, glue/utils.py, show_model_stats"),
    Count("llama-7b", 159_907_840, "LoRA's of rank 64 on all maps"),
    Count("roberta-base", 10_616_832, "LoRA's of rank 64 on all maps"),
    Count("t5-base", 25_952_256, "LoRA's of rank 64 on all maps"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
