"""Compacter: Kronecker sums with shared factors, in the sequential adapter's places."""

import pytest
import torch

import peftlib
from peftlib import backbones
from peftlib.errors import TargetError
from peftlib.methods.base import ConfigError
from peftlib.methods.hybrid.manual.compacter import KroneckerSum, Shared
from tests.methods.facts import Count, Default, Facts, Start, Trains, glorot_uniform, normal, zeros
from tests.methods.helpers import Spy, backbone, inputs, linear, perturb


def sequential_adapter(y, W_down, b_down, W_up, b_up, activation="gelu"):
    """Houlsby et al. 2019: h + W_up act(W_down h + b_down) + b_up for a block's output h (tokens, d), in float64."""
    act = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "swish": torch.nn.functional.silu}[activation]
    h, down, up = y.double(), W_down.double(), W_up.double()
    return (h + act(h @ down.T + b_down.double()) @ up.T + b_up.double()).to(y.dtype)


def kronecker_sum(A, s, t):
    """``sum_i A_i kron (s_i t_i^T)`` as the paper writes it, entry by entry, for A (n, n, n), s (n, out / n, rank),
    t (n, in / n, rank)."""
    n, p, q = len(A), s.shape[1], t.shape[1]
    W = torch.zeros(n * p, n * q, dtype=A.dtype)
    for i in range(n):
        B = [[sum(a * b for a, b in zip(row, column)) for column in t[i].tolist()] for row in s[i].tolist()]
        for row in range(n * p):
            for column in range(n * q):
                W[row, column] += A[i, row // p, column // q] * B[row % p][column % q]
    return W


@pytest.mark.parametrize(("rank", "formed"), [(1, False), (2, True)])
def test_the_map_is_that_of_the_formed_kronecker_sum(rank, formed):
    torch.manual_seed(0)
    layer = KroneckerSum(Shared(4, std=1.0), 20, 12, rank).double()
    with torch.no_grad():
        layer.bias.normal_()
    expected = kronecker_sum(*(t.detach() for t in (layer.rules.A, layer.s, layer.t)))
    assert layer.formed == formed
    assert torch.allclose(layer.weight(), expected, atol=1e-12)
    x = torch.randn(2, 5, 20, dtype=torch.float64)
    for way in (False, True):
        layer.formed = way
        assert torch.allclose(layer(x), x @ expected.T + layer.bias, atol=1e-12)


def test_the_product_is_not_formed_at_the_paper_s_size():
    with torch.device("meta"):
        shared = Shared(4, 1e-4)
        assert not any(KroneckerSum(shared, *sizes, 1).formed for sizes in ((768, 24), (24, 768)))


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("plus_plus", [False, True])
def test_stands_where_the_sequential_adapter_does(family, plus_plus):
    adapted = peftlib.attach(backbone(family), "compacter", bottleneck=8, plus_plus=plus_plus, activation="gelu")
    perturb(adapted)
    sites = [
        layer.sites[name]
        for layer in adapted.host.anatomy.layers
        for name in ("attention.output", "ffn.down")
        if name == "ffn.down" or not plus_plus
    ]
    assert len(adapted.host.paths()) == len(sites)
    spy = Spy(*(site.module for site in sites))
    with torch.no_grad():
        adapted.model(**inputs(family, 2))
    for site in sites:
        a = site.module.compacter
        x, y = spy[site.module]
        own = linear(site, x).reshape(-1, y.shape[-1])
        parts = [t.detach() for t in (a.down.weight(), a.down.bias, a.up.weight(), a.up.bias)]
        expected = sequential_adapter(own, *parts, activation="gelu")
        torch.testing.assert_close(y.reshape(expected.shape), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_every_layer_shares_the_matrices_and_the_file_holds_them_once(family, tmp_path):
    adapted = peftlib.attach(backbone(family), "compacter", bottleneck=8)
    children = list(adapted.host.paths().values())
    assert len({id(w.rules.A) for child in children for w in (child.down, child.up)}) == 1
    assert sum(name.endswith("rules.A") for name in adapted.state()) == 1
    count = adapted.count()
    assert count.stored == count.trained


@pytest.mark.parametrize("options", [{}, {"plus_plus": True}, {"rank": 4, "divisions": 8}, {"train_norms": False}])
def test_count_on_roberta_base(options):
    adapted = peftlib.attach(backbones.shapes("roberta-base"), "compacter", **options)
    c, places = adapted.config, 1 if options.get("plus_plus") else 2
    adapters = 12 * places * (2 * (768 + 24) * c.rank + 24 + 768) + c.divisions**3
    assert adapted.count().method == adapters + (12 * 4 * 768 if c.train_norms else 0)


@pytest.mark.parametrize(("options", "trained"), [({"plus_plus": True}, 104_704), ({}, 161_728)])
def test_count_on_t5_base(options, trained):
    """With ``plus_plus`` the abstract's 0.047 %. modify_model_after_init of seq2seq/utils/utils.py unfreezes every
    T5LayerNorm, those at the stacks' ends too."""
    adapted = peftlib.attach(backbones.shapes("t5-base", head="seq2seq"), "compacter", **options)
    assert adapted.count().method == trained
    assert sum(name.endswith("final_layer_norm.weight") for name in adapted.trainable()) == 2


def test_a_trained_one_trains_on_after_loading(tmp_path):
    adapted = peftlib.attach(backbone("bert"), "compacter", bottleneck=8)
    perturb(adapted)
    loaded = peftlib.load(backbone("bert"), adapted.save(tmp_path / "a"))
    rules = {id(w.rules.A) for child in loaded.host.paths().values() for w in (child.down, child.up)}
    assert len(rules) == 1
    assert torch.equal(loaded.model(**inputs("bert")).logits, adapted.model(**inputs("bert")).logits)


def test_sizes_that_do_not_divide_are_named():
    with pytest.raises(TargetError, match="divisions=5 does not divide 32"):
        peftlib.attach(backbone("bert"), "compacter", divisions=5)
    with pytest.raises(TargetError, match="divisions=4 does not divide 6"):
        peftlib.attach(backbone("bert"), "compacter", bottleneck=6)
    with pytest.raises(ConfigError, match="rank=0"):
        peftlib.config("compacter", rank=0)
    with pytest.raises(ConfigError, match="std=0"):
        peftlib.config("compacter", std=0.0)


CODE = "rabeehk/compacter, seq2seq"
FACTS = Facts(
    "compacter",
    Default("bottleneck", 24, f"{CODE}/configs/compacter.json: task_reduction_factor 32 of 768"),
    Default("divisions", 4, f"{CODE}/configs/compacter.json: hypercomplex_division"),
    Default("rank", 1, f"{CODE}/adapters/adapter_configuration.py: phm_rank"),
    Default("activation", "gelu_new", f"{CODE}/configs/compacter.json"),
    Default("std", 1e-4, f"{CODE}/configs/compacter.json: phm_init_range"),
    Default("train_norms", True, f"{CODE}/configs/compacter.json: unfreeze_layer_norms"),
    Default("dropout", 0.0, f"{CODE}/adapters/adapter_modeling.py: none"),
    Start("*.rules.A", normal(1e-4), f"{CODE}/third_party/models/t5/modeling_t5.py: phm_rule", {"divisions": 8}),
    Start("*.down.s", glorot_uniform(2**0.5), f"{CODE}/hypercomplex/inits.py: xavier_uniform_, gain sqrt(2)"),
    Start("*.down.t", glorot_uniform(2**0.5), f"{CODE}/hypercomplex/inits.py: xavier_uniform_, gain sqrt(2)"),
    Start("*.up.s", glorot_uniform(2**0.5), f"{CODE}/hypercomplex/inits.py: xavier_uniform_, gain sqrt(2)"),
    Start("*.up.t", glorot_uniform(2**0.5), f"{CODE}/hypercomplex/inits.py: xavier_uniform_, gain sqrt(2)"),
    Start("*.compacter.*.bias", zeros(), f"{CODE}/hypercomplex/layers.py, reset_parameters"),
    Trains(
        ("*.compacter.*", "*.layer_norm.weight", "*.final_layer_norm.weight"),
        f"{CODE}/utils/utils.py, modify_model_after_init: adapters, phm_rule and every T5LayerNorm",
        family="t5",
    ),
    Count("t5-base", 104_704, "abstract: 0.047 % for Compacter++", {"plus_plus": True}, "0.047"),
    Count("t5-base", 161_728, f"{CODE}: the same modules behind both blocks"),
    Count("roberta-base", 93_952, "its formula; the paper is on T5"),
    Count("llama-7b", 1_057_344, "its formula"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
