"""VeRA: its equation, the pair that all maps share, parity with HF peft, files with and without the pair, the published
counts."""

import json
import math
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peftlib
from peftlib import backbones
from peftlib.conformance.case import batch, logits, train
from peftlib.errors import LoadError, TargetError, UnsupportedError
from tests.methods.facts import Count, Default, Facts, Start, Trains, constant, zeros
from tests.methods.helpers import Spy, backbone, data, inputs, model, perturb, reload, task, theirs

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


@pytest.mark.parametrize("name", ["attention.key", "ffn.up", "ffn.down"])
@torch.no_grad()
def test_equation_on_one_site(name):
    """The diagonal matrices written out, on maps of 16 x 32, 64 x 32 and 32 x 64 that share a pair of 64 x 64."""
    adapted = peftlib.attach(backbone("llama"), "vera", rank=40, targets="all-linear")
    adapted.model.double()
    perturb(adapted)
    site = adapted.host.anatomy.layers[1].sites[name]
    spy, layer, pair = Spy(site.module), site.module.vera, adapted.model.model.vera
    assert (tuple(pair.A.shape), tuple(pair.B.shape)) == ((40, 64), (64, 40))
    x = torch.randn(2, 5, site.in_features, dtype=torch.float64)
    site.module(x)
    _, y = spy[site.module]
    A, B = pair.A[:, : site.in_features], pair.B[: site.out_features]
    update = torch.diag(layer.b) @ B @ torch.diag(layer.d) @ A
    torch.testing.assert_close(y, x @ (site.weight + update).T, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(layer.delta(), update, atol=1e-12, rtol=1e-12)


def test_one_pair_serves_the_whole_model():
    """It is frozen, counted nowhere as trained, and moves with the model once for all maps."""
    adapted = peftlib.attach(backbone("bert"), "vera", rank=48)
    pair = adapted.model.bert.vera
    assert all(layer.pair[0] is pair for layer in adapted.method.updates.values())
    found = [n for n, _ in adapted.model.named_buffers(remove_duplicate=False) if n.endswith((".A", ".B"))]
    assert found == ["bert.vera.A", "bert.vera.B"]
    assert all(name.rpartition(".")[2] in ("b", "d") for name in set(adapted.trainable()) - set(adapted.head_names))
    before = pair.A.clone(), pair.B.clone()
    train(adapted, batch("bert"))
    assert torch.equal(pair.A, before[0]) and torch.equal(pair.B, before[1])


def test_the_pair_is_drawn_kaiming_uniform_from_its_own_seed():
    """As HF peft draws it, number by number, whatever attach() is seeded with."""
    adapted = peftlib.attach(backbone("bert"), "vera", rank=64, projection_seed=5, targets=("attention.query",), seed=1)
    pair = adapted.method.pair
    for matrix, fan_in in ((pair.A, 32), (pair.B, 64)):
        bound = math.sqrt(6 / fan_in)
        assert 0.95 * bound < float(matrix.abs().max()) <= bound
        assert float(matrix.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    config = peft.VeraConfig(r=64, target_modules=["query"], projection_prng_key=5)
    oracle = peft.get_peft_model(backbone("bert"), config).base_model
    assert torch.equal(pair.A, oracle.vera_A["default"]) and torch.equal(pair.B, oracle.vera_B["default"])
    again = peftlib.attach(backbone("bert"), "vera", rank=64, projection_seed=5, targets=("attention.query",), seed=2)
    assert torch.equal(again.method.pair.A, pair.A)
    other = peftlib.attach(backbone("bert"), "vera", rank=64, projection_seed=6, targets=("attention.query",), seed=1)
    assert not torch.equal(other.method.pair.A, pair.A)


def test_the_vectors_start_at_zero_and_a_tenth():
    adapted = peftlib.attach(backbone("bert"), "vera", rank=64, d_initial=0.1)
    for layer in adapted.method.updates.values():
        assert not layer.b.any()
        assert torch.equal(layer.d, torch.full((64,), 0.1))


@pytest.mark.parametrize(
    ("name", "head", "options", "trained"),
    [
        ("roberta-base", "classification", {}, 43_008),
        ("roberta-large", "classification", {"rank": 256}, 61_440),
        ("llama-7b", "causal_lm", {"targets": "all-linear"}, 1_589_248),
    ],
)
def test_published_counts(name, head, options, trained):
    """0.043M, 0.061M and 1.6M in the paper; a file holds eight numbers more, or the pair."""
    count = peftlib.attach(backbones.shapes(name, head=head), "vera", **options).count()
    assert count.method == trained
    assert count.stored - count.head == trained + 8
    with_pair = peftlib.attach(backbones.shapes(name, head=head), "vera", **options, save_projection=True)
    pair = with_pair.method.pair
    assert with_pair.count().stored - count.head == trained + pair.A.numel() + pair.B.numel()


@pytest.mark.parametrize("family", list(PARITY))
def test_parity_with_hf_peft(family):
    """The same vectors give the same logits, gradients, merged weights and count as HF peft's, which draws the pair."""
    targets, theirs = PARITY[family]
    options = {"rank": 20, "targets": targets, "d_initial": 0.3, "projection_seed": 3}
    adapted = peftlib.attach(model(family), "vera", train_head=False, **options)
    perturb(adapted)
    config = peft.VeraConfig(r=20, target_modules=theirs, d_initial=0.3, projection_prng_key=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = peft.get_peft_model(model(family), config).eval()
    left = {n: p for n, p in oracle.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in left.values()) == adapted.count().trained
    pairs = []
    for name, parameter in adapted.trainable().items():
        path, _, attribute = name.rpartition(".vera.")
        pairs.append((parameter, left.pop(f"base_model.model.{path}.vera_lambda_{attribute}.default")))
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
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


@pytest.mark.parametrize("save_projection", [False, True])
def test_files_where_the_seed_draws_something_else(save_projection, monkeypatch, tmp_path):
    """Another version of torch: with the pair in the file it loads, without it is refused."""
    adapted = peftlib.attach(backbone("bert"), "vera", rank=16, save_projection=save_projection)
    train(adapted, batch("bert"))
    before = logits(adapted.model, **inputs("bert"))
    folder = adapted.save(tmp_path / "adapter")
    names = set(load_file(folder / "adapter.safetensors")) - set(adapted.trainable())
    assert names == {f"bert.vera.{name}" for name in (("A", "B") if save_projection else ("last",))}
    plain = backbone("bert")
    draw = nn.init.kaiming_uniform_
    with monkeypatch.context() as patch:
        patch.setattr(nn.init, "kaiming_uniform_", lambda *args, **options: draw(*args, **options).roll(1, 0))
        if save_projection:
            assert torch.equal(logits(peftlib.load(plain, folder).model, **inputs("bert")), before)
            return
        with pytest.raises(LoadError, match="projection_seed=0 draws other factors here"):
            peftlib.load(plain, folder)
    assert not hasattr(plain.bert, "vera")
    assert torch.equal(logits(peftlib.load(plain, folder).model, **inputs("bert")), before)


def _theirs(family: str, folder, **options) -> torch.Tensor:
    """A saved VeRA adapter of HF peft's, and its logits."""
    return theirs(family, peft.VeraConfig(task_type=task(family), **{"r": 12} | options), folder)


@pytest.mark.parametrize("save_projection", [True, False], ids=["pair", "seed"])
@pytest.mark.parametrize("family", list(PARITY))
def test_their_files_are_read_and_written(family, save_projection, tmp_path):
    options = {"target_modules": PARITY[family][1], "save_projection": save_projection, "projection_prng_key": 7}
    expected = _theirs(family, tmp_path / "theirs", **options)
    adapted = peftlib.from_hf_peft(model(family), tmp_path / "theirs")
    c = adapted.config
    assert (adapted.name, c.rank, c.projection_seed, c.save_projection) == ("vera", 12, 7, save_projection)
    got = logits(adapted.model, **data(family))
    same(got, expected)
    assert not torch.allclose(got, logits(model(family), **data(family)), atol=1e-2)
    loaded = peftlib.load(model(family), adapted.save(tmp_path / "ours"))
    assert torch.equal(logits(loaded.model, **data(family)), got)
    peftlib.to_hf_peft(loaded, tmp_path / "back")
    same(logits(reload(family, tmp_path / "back"), **data(family)), got)
    mine, other = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("back", "theirs"))
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert mine.keys() == {n for n in other if "score" not in n}


def test_what_theirs_or_ours_lacks_is_refused(tmp_path):
    _theirs("gpt2", tmp_path / "fused", target_modules=["c_attn"])
    with pytest.raises(UnsupportedError, match=r"c_attn\[0/3\] as a whole, with one vector d"):
        peftlib.from_hf_peft(model("gpt2"), tmp_path / "fused")
    adapted = peftlib.attach(model("gpt2"), "vera", rank=8)
    with pytest.raises(UnsupportedError, match="c_attn is one map of which peftlib adapts parts"):
        peftlib.to_hf_peft(adapted, tmp_path / "ours")

    _theirs("bert", tmp_path / "bert", target_modules=["query"], save_projection=False)
    path = tmp_path / "bert" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"save_projection": True}))
    with pytest.raises(LoadError, match=r"holds no base_model\.vera_A"):
        peftlib.from_hf_peft(model("bert"), tmp_path / "bert")
    path.write_text(json.dumps(settings | {"bias": "vera_only"}))
    with pytest.raises(UnsupportedError, match="bias='vera_only'"):
        peftlib.from_hf_peft(model("bert"), tmp_path / "bert")


def test_values_that_cannot_be():
    """A rank above the maps' sizes can be: the pair is not trained."""
    assert peftlib.attach(backbone("bert"), "vera").config.rank == 1024
    with pytest.raises(ValueError, match="rank=0"):
        peftlib.config("vera", rank=0)
    with pytest.raises(ValueError, match="projection_seed=-1"):
        peftlib.config("vera", projection_seed=-1)
    with pytest.raises(TargetError, match="'attention_query' matches nothing"):
        peftlib.attach(backbone("bert"), "vera", targets=("attention_query",))


# What is published

PAPER = "arXiv:2310.11454; read when the method was written"
COUNT = "L_tuned (d + r), as in the paper"

FACTS = Facts(
    "vera",
    Default("rank", 1024, f"{PAPER}: base models"),
    Default("d_initial", 0.1, f"{PAPER}; also HF peft's VeraConfig"),
    Default("targets", ("*attention.query", "*attention.value"), PAPER),
    Default("dropout", 0.0, "HF peft's VeraConfig: vera_dropout"),
    Default("projection_seed", 0, "HF peft's VeraConfig: projection_prng_key"),
    Default("save_projection", False, f"{PAPER}: the pair is made from its seed"),
    Start("*.vera.b", zeros(), f"{PAPER}; HF peft, tuners/vera/layer.py, reset_vera_parameters"),
    Start("*.vera.d", constant(0.1), f"{PAPER}; HF peft, tuners/vera/layer.py, reset_vera_parameters"),
    Trains(("*.vera.b", "*.vera.d"), f"{PAPER}; HF peft, tuners/vera"),
    Count("roberta-base", 24 * (768 + 1024), f"{COUNT}, table 2: 0.043 M"),
    Count("roberta-large", 48 * (1024 + 256), f"{COUNT}, table 2: 0.061 M", {"rank": 256}),
    Count("t5-base", 72 * (768 + 1024), COUNT),
    Count("llama-7b", 64 * (4096 + 1024), COUNT),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
