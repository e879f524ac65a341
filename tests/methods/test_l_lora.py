"""L-LoRA: layers exactly linear in their parameters, LoRA-FA's where B starts at zero; task arithmetic over modules."""

from dataclasses import replace

import pytest
import torch

import peftlib
from peftlib.conformance.case import batch, inputs, logits, train
from peftlib.errors import StateError
from peftlib.methods.reparameterized.lora.multitask.l_lora import Tangent
from tests.methods.facts import Count, Default, Facts, Start, Trains, kaiming_uniform, zeros
from tests.methods.helpers import backbone, perturb

BOTH = pytest.mark.parametrize("std_B", [0.0, 0.5])


def source(seed, start=0, **options):
    adapted = peftlib.attach(backbone("bert"), "l_lora", seed=start, **{"dropout": 0.0, "rank": 4} | options)
    perturb(adapted, std=0.5, seed=seed)
    return replace(adapted.snapshot(), name=f"source {seed}")


def fused(sources, **options):
    return peftlib.attach(backbone("bert"), "l_lora", sources=sources, **{"dropout": 0.0, "rank": 4} | options)


# The tangent space


@BOTH
def test_a_layer_is_the_jvp_of_lora_at_its_start(std_B):
    torch.manual_seed(0)
    layer = Tangent(7, 5, 3, scale=1.5, std_B=std_B).double()
    x, y = torch.randn(2, 4, 7, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    start = {name: tensor.detach().clone() for name, tensor in layer.start().items()}
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=float(parameter.requires_grad))
    change = tuple(getattr(layer, name).detach() - start[name] for name in "AB")
    value, tangent = torch.func.jvp(lambda A, B: y + 1.5 * x @ A.T @ B.T, (start["A"], start["B"]), change)
    torch.testing.assert_close(layer(x, y), value + tangent)
    torch.testing.assert_close(y + x @ layer.delta().T, value + tangent)


@BOTH
def test_a_layer_is_exactly_linear_in_its_parameters(std_B):
    torch.manual_seed(0)
    layer = Tangent(7, 5, 3, scale=2.0, std_B=std_B).double()
    x, y = torch.randn(2, 4, 7, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    trained = [p for p in layer.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    changes = [[torch.randn_like(p) for p in trained] for _ in range(2)]

    @torch.no_grad()
    def at(*weights):
        for i, parameter in enumerate(trained):
            parameter.copy_(start[i] + sum(w * change[i] for w, change in zip(weights, changes)))
        return layer(x, y)

    expected = at(0, 0) + 3 * (at(1, 0) - at(0, 0)) - 2 * (at(0, 1) - at(0, 0))
    torch.testing.assert_close(at(3, -2), expected)


def test_a_model_is_lora_fa_with_the_same_factors():
    models = {}
    for method in ("l_lora", "lora_fa"):
        options = {"dropout": 0.0} if method == "l_lora" else {}
        adapted = peftlib.attach(backbone("bert"), method, rank=4, alpha=12.0, seed=3, **options)
        train(adapted, batch("bert"), steps=4, weight_decay=0.1)
        models[method] = adapted
    ours, theirs = (models[m].state() for m in ("l_lora", "lora_fa"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(*(logits(a.model, **inputs("bert")) for a in models.values()))


def test_with_a_start_of_b_both_factors_train_and_the_file_keeps_the_start(tmp_path):
    adapted = peftlib.attach(backbone("bert"), "l_lora", std_B=0.1, dropout=0.0)
    assert adapted.count().method == 2 * 2 * 2 * 32 * 16
    train(adapted, batch("bert"))
    before = logits(adapted.model, **inputs("bert"))
    loaded = peftlib.load(backbone("bert"), adapted.save(tmp_path / "a"))
    assert torch.equal(logits(loaded.model, **inputs("bert")), before)
    torch.testing.assert_close(logits(adapted.merge(), **inputs("bert")), before, atol=1e-5, rtol=1e-5)


# Task arithmetic


@BOTH
def test_sources_are_added_from_their_common_start(std_B, tmp_path):
    sources = [source(seed, start=7, std_B=std_B) for seed in range(3)]
    adapted = fused(sources, std_B=std_B, scaling=0.4)
    start = peftlib.attach(backbone("bert"), "l_lora", seed=7, rank=4, std_B=std_B).state()
    own = backbone("bert")
    for name, tensor in adapted.state().items():
        if name in adapted.head_names:
            assert torch.equal(tensor, own.get_parameter(name))
        else:
            expected = start[name] + 0.4 * sum(s.state[name] - start[name] for s in sources)
            torch.testing.assert_close(tensor, expected)
    loaded = peftlib.load(backbone("bert"), adapted.save(tmp_path / "fused"))
    assert [s.name for s in loaded.method.sources] == ["source 0", "source 1", "source 2"]
    assert torch.equal(logits(loaded.model, **inputs("bert")), logits(adapted.model, **inputs("bert")))
    with pytest.raises(StateError, match="no sources to fuse"):
        loaded.method.fuse()


def test_the_update_of_a_fused_module_is_the_sum_of_the_updates():
    sources = [source(seed) for seed in range(2)]
    alone = [peftlib.load(backbone("bert"), s) for s in sources]
    adapted = fused(sources)
    adapted.method.fuse([0.25, -0.5])
    for updates in zip(*(a.method.updates.values() for a in (adapted, *alone))):
        mixed, first, second = (update.delta() for update in updates)
        torch.testing.assert_close(mixed, 0.25 * first - 0.5 * second)


def test_the_error_counts_the_predictions_that_other_tasks_turn():
    sources = [source(seed) for seed in range(2)]
    adapted = fused(sources)
    batches = [inputs("bert"), {k: v[:5] for k, v in inputs("bert").items()}]
    head = {name: p.clone() for name, p in adapted.host.anatomy.head.items()}
    expected, weights = 0.0, [1.0, -0.8]
    for task in range(2):
        answers = []
        for others in (False, True):
            model = fused(sources)
            model.method.fuse([w if others or i == task else 0.0 for i, w in enumerate(weights)])
            for name, parameter in model.host.anatomy.head.items():
                parameter.data.copy_(sources[task].state[name])
            answers.append(logits(model.model, **batches[task]).argmax(-1))
        expected += float((answers[0] != answers[1]).float().mean())
    assert expected > 0
    assert adapted.method.disentanglement_error(batches, weights) == pytest.approx(expected)
    assert all(torch.equal(p, head[name]) for name, p in adapted.host.anatomy.head.items())
    assert adapted.method.disentanglement_error(batches, [0.0, 0.0]) == 0


def test_what_cannot_be_is_refused():
    with pytest.raises(peftlib.ConfigError, match="source 'source 1' was trained from another start than 'source 0'"):
        fused([source(0), source(1, start=1)])
    with pytest.raises(peftlib.ConfigError, match=r"source 'source 0' is LLoRAConfig\(rank=4.*attach with its rank"):
        fused([source(0)], rank=8)
    with pytest.raises(peftlib.ConfigError, match="1 weights were given for 2 sources"):
        fused([source(0), source(1)]).method.fuse([0.5])
    with pytest.raises(StateError, match="l_lora has no sources to fuse"):
        fused([]).method.fuse()
    with pytest.raises(peftlib.ConfigError, match="std_B=-1"):
        peftlib.config("l_lora", std_B=-1.0)


# What is published

CONFIG = "tanganke/peta, config/finetune_clip_l_lora.yaml and config/peft/lora-16.yaml"

FACTS = Facts(
    "l_lora",
    Default("rank", 16, CONFIG),
    Default("alpha", 32.0, CONFIG),
    Default("dropout", 0.1, CONFIG),
    Default("targets", ("*attention.query", "*attention.value"), f"{CONFIG}; the former writes v_porj for v_proj"),
    Default("scaling", 0.3, "chosen here"),
    Default("std_B", 0.0, "HF peft's LoraConfig, which peta linearizes as it starts"),
    Start("*.lora.A", kaiming_uniform(), "HF peft's LoraConfig, in tanganke/peta"),
    Start("*.lora.B", zeros(), "HF peft's LoraConfig, in tanganke/peta"),
    Trains(("*.lora.B",), "at B_0 = 0 the expansion does not depend on A: its gradient is zero, in peta too"),
    Count("roberta-base", 294_912, "r out a map"),
    Count("t5-base", 884_736, "r out a map"),
    Count("llama-7b", 4_194_304, "r out a map"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
