"""AdapterFusion: its equation at every kind of place, frozen sources, what it starts from."""

from dataclasses import replace

import pytest
import torch

import peftlib
from peftlib import backbones
from peftlib.conformance.case import backbone, batch, inputs, logits, train
from peftlib.methods.base import ConfigError
from peftlib.methods.registry import resolve
from tests.methods.facts import Count, Default, Facts, Holds, Start, Trains, normal, zeros
from tests.methods.helpers import perturb

KINDS = {
    "adapter_drop": {"robust": False},
    "sequential_adapter": {"train_norms": False},
    "parallel_adapter": {},
    "residual_adapter": {},
}


def adapter(seed, method="adapter_drop", family="bert", **options):
    adapted = peftlib.attach(backbone(family), method, seed=seed, **{"bottleneck": 4 + seed} | KINDS[method] | options)
    perturb(adapted, seed=seed)
    return replace(adapted.snapshot(), name=f"task{seed}")


def attached(method="adapter_drop", family="bert", **options):
    sources = [adapter(seed, method, family) for seed in range(3)]
    return peftlib.attach(backbone(family), "adapter_fusion", sources=sources, **options), sources


@pytest.mark.parametrize("method", KINDS)
@torch.no_grad()
def test_each_place_mixes_what_its_adapters_add(method):
    adapted, sources = attached(method)
    perturb(adapted, std=0.1)
    adapted.model.double()
    names = {id(m): n for n, m in adapted.model.named_modules()}
    for fused in adapted.method.fused:
        place = names[id(fused)]
        h = torch.randn(2, 3, 32).double()
        q = h @ fused.query.weight.T + fused.query.bias
        outputs, scores = [], []
        for source in sources:
            w = {n.removeprefix(f"{place}."): t.double() for n, t in source.own.items() if n.startswith(f"{place}.")}
            x = torch.nn.functional.layer_norm(h, (32,), w["norm.weight"], w["norm.bias"]) if "norm.weight" in w else h
            act = {"sequential_adapter": torch.nn.functional.gelu}.get(method, torch.relu)
            z = act(x @ w["down.weight"].T + w["down.bias"]) @ w["up.weight"].T + w["up.bias"]
            z = z * {"parallel_adapter": 4.0}.get(method, 1.0)
            outputs.append(z @ fused.value.weight.T)
            scores.append((q * (z @ fused.key.weight.T + fused.key.bias)).sum(-1))
        weights = torch.stack(scores, -1).softmax(-1)
        expected = sum(weights[..., n, None] * outputs[n] for n in range(3))
        torch.testing.assert_close(fused.delta(h), expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(("method", "family"), [(m, "bert") for m in KINDS] + [("adapter_drop", "gpt2")])
def test_equal_adapters_fuse_to_that_adapter(method, family):
    one = adapter(1, method, family)
    adapted = peftlib.attach(backbone(family), "adapter_fusion", sources=[one, replace(one, name="again")])
    alone = peftlib.load(backbone(family), one)
    for name in adapted.head_names:
        adapted.trainable()[name].data.copy_(one.state[name])
    got, expected = (logits(a.model, **inputs(family)) for a in (adapted, alone))
    # The value matrix starts with 1e-6 beside its diagonal.
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_stage_two_leaves_the_adapters_bit_identical():
    adapted, sources = attached()
    value = adapted.method.fused[0].value.weight
    assert torch.equal(value.detach().diagonal(), torch.ones(32))
    assert float((value.detach() - torch.eye(32)).abs().max()) == pytest.approx(1e-6)
    train(adapted, batch("bert"), steps=3)
    names = {id(m): n for n, m in adapted.model.named_modules()}
    for fused in adapted.method.fused:
        for source, child in zip(sources, fused.adapters, strict=True):
            for name, tensor in child.state_dict().items():
                assert torch.equal(tensor, source.state[f"{names[id(fused)]}.{name}"])
    trained = {n.rpartition("adapter_drop.")[2] for n in adapted.trainable() if n not in adapted.head_names}
    assert trained == {"query.weight", "query.bias", "key.weight", "key.bias", "value.weight"}


def test_the_value_matrix_is_kept_near_the_identity():
    adapted, _ = attached(regularization=0.5)
    plain, _ = attached(regularization=0.0)
    for a in (adapted, plain):
        perturb(a, std=0.1)
        a.model.train()
    assert plain.method.hooks() == ()
    expected = 0.5 * sum(float((f.value.weight.detach() - torch.eye(32)).square().sum()) for f in adapted.method.fused)
    with adapted.lifecycle(1):
        more = adapted.model(**batch("bert")).loss - plain.model(**batch("bert")).loss
    assert float(more.detach()) == pytest.approx(expected, rel=1e-4)


def test_a_dry_run_leaves_the_model_alone():
    adapted = peftlib.attach(backbone("bert"), "head")
    before = logits(adapted.model, **inputs("bert"))
    host, keys = adapted.host.dry_run(), list(adapted.model.state_dict())
    part = resolve(adapter(0, "sequential_adapter", train_norms=True).config)
    part.host = host
    part.attach(host)
    assert len(host.children) == 4
    assert host.unfrozen
    assert list(adapted.model.state_dict()) == keys
    assert torch.equal(logits(adapted.model, **inputs("bert")), before)
    assert not adapted.host.anatomy.layers[0].norms["ffn"].weight.requires_grad
    with pytest.raises(peftlib.errors.StateError, match="changes weights of the backbone itself"):
        host.parametrize(adapted.model.classifier.weight, torch.nn.Identity())


def test_what_cannot_stand_side_by_side_is_refused():
    mixed = [adapter(0), adapter(1, "parallel_adapter")]
    with pytest.raises(ConfigError, match="'task0' and 'task1' are of different methods or stand at different places"):
        peftlib.attach(backbone("bert"), "adapter_fusion", sources=mixed)
    with pytest.raises(ConfigError, match="different places"):
        peftlib.attach(backbone("bert"), "adapter_fusion", sources=[adapter(0), adapter(1, dropped=1)])
    normed = [adapter(seed, "sequential_adapter", train_norms=True) for seed in range(2)]
    with pytest.raises(ConfigError, match="train_norms=False"):
        peftlib.attach(backbone("bert"), "adapter_fusion", sources=normed)
    with pytest.raises(ConfigError, match="at least 2 saved adapters of adapter_drop or"):
        peftlib.attach(backbone("bert"), "adapter_fusion", sources=mixed[:1])


# The published facts

HUB = "adapter-hub/adapters, src/adapters"


def check_penalty():
    adapted, _ = attached()
    data = batch("bert")
    with torch.no_grad():
        for fused in adapted.method.fused:
            fused.value.weight.copy_(3.0 * torch.eye(32))
    plain = adapted.model.eval()(**data).loss
    adapted.model.train()
    with adapted.lifecycle(1):
        loss = adapted.model(**data).loss
    torch.testing.assert_close(loss - plain, torch.tensor(0.01 * 2 * 32 * 2.0**2), atol=1e-4, rtol=0)


def check_value_start():
    adapted, _ = attached()
    for fused in adapted.method.fused:
        wanted = torch.full((32, 32), 1e-6).fill_diagonal_(1.0)
        assert torch.equal(fused.value.weight, wanted) and fused.value.bias is None


def check_dropout():
    model = backbones.load("tiny-bert").model  # with the config's dropout
    sources = [adapter(seed) for seed in range(2)]
    fused = peftlib.attach(model, "adapter_fusion", sources=sources).method.fused
    assert model.config.attention_probs_dropout_prob > 0
    assert {f.dropout.p for f in fused} == {model.config.attention_probs_dropout_prob}


def fused():
    return attached()[0]


FACTS = Facts(
    "adapter_fusion",
    Default("regularization", 0.01, f"{HUB}/model_mixin.py, get_fusion_regularization_loss"),
    Default("dropout", None, f"{HUB}/methods/bottleneck.py: attention_probs_dropout_prob of the backbone"),
    *(
        Start(
            f"*.adapter_drop.{names}", start, f"{HUB}/methods/modeling.py, BertFusion: init_bert_weights", attach=fused
        )
        for names, start in (
            ("query.weight", normal(0.02)),
            ("key.weight", normal(0.02)),
            ("query.bias", zeros()),
            ("key.bias", zeros()),
        )
    ),
    Holds("the value map starts near the identity", check_value_start, f"{HUB}/methods/modeling.py, BertFusion"),
    Holds("the value map is kept near the identity", check_penalty, f"{HUB}/trainer.py, on_step_end"),
    Holds("the scores have the dropout of the backbone", check_dropout, f"{HUB}/methods/bottleneck.py"),
    Trains(
        ("*.adapter_drop.query.*", "*.adapter_drop.key.*", "*.adapter_drop.value.weight"),
        "section 3.2: the second stage trains Q, K and V",
    ),
    Count("roberta-base", 12 * (3 * 768**2 + 2 * 768), "section 3.2, with the library's biases of Q and K"),
    Count("t5-base", 24 * (3 * 768**2 + 2 * 768), "section 3.2, both stacks"),
    Count("llama-7b", 32 * (3 * 4096**2 + 2 * 4096), "section 3.2"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
