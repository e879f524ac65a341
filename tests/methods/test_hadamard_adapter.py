"""The Hadamard adapter: its equation, its norm, its two stages, where it merges."""

import pytest
import torch

import peftlib
from peftlib import backbones
from peftlib.errors import MergeError
from peftlib.methods.base import ConfigError
from tests.methods.facts import Count, Default, Facts, Start, Trains, ones, zeros
from tests.methods.helpers import Spy, backbone, inputs, linear, perturb

FACTS = Facts(
    "hadamard_adapter",
    Start("*.hadamard_adapter.scale", ones(), "arXiv:2407.11033, section 4: the start is the identity"),
    Start("*.hadamard_adapter.shift", zeros(), "arXiv:2407.11033, section 4: the start is the identity"),
    Trains(
        ("*.hadamard_adapter.scale", "*.hadamard_adapter.shift", "*.attention.output.LayerNorm.*"),
        "arXiv:2407.11033, abstract: 0.033 % of BERT-base is two vectors and one norm a layer",
    ),
    Default("head_stage", 0.5, "the paper trains the classifier first (figure 3); how long is chosen here"),
    Count("bert-base-uncased", 36_864, "arXiv:2407.11033, abstract: 0.033 % of 110 M", percent="0.034"),
    Count("roberta-base", 36_864, "as on BERT-base: 12 layers of 768"),
    Count("t5-base", 55_296, "24 layers of scale, shift and a norm without bias, 3 x 768"),
    Count("llama-7b", 393_216, "32 layers of scale, shift and a norm without bias, 3 x 4096"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()


FAMILIES = list(backbones.tiny.FAMILIES)
WITHOUT_BIAS = ("llama", "mistral", "qwen2", "t5", "mt5")


def hadamard(a, w, b):
    """Chen et al. 2023: w * a + b of one token a (d)."""
    return torch.stack([wi * ai + bi for wi, ai, bi in zip(w, a, b)])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_scales_and_shifts_the_attention_output(family):
    model = backbone(family)
    adapted = peftlib.attach(model, "hadamard_adapter")
    perturb(adapted)
    model.double()
    sites = adapted.host.anatomy.sites("attention.output")
    spy = Spy(*(site.module for site in sites))
    model(**inputs(family))
    for site in sites:
        child = site.module.hadamard_adapter
        x, output = (t.reshape(-1, t.shape[-1]) for t in spy[site.module])
        for token in (0, -1):
            expected = hadamard(linear(site, x[token]), child.scale, child.shift)
            torch.testing.assert_close(output[token], expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("bert", "attention.output.LayerNorm"),
        ("distilbert", "sa_layer_norm"),
        ("bart", "self_attn_layer_norm"),
        ("gpt2", "ln_2"),
        ("llama", "post_attention_layernorm"),
        ("t5", "layer.1.layer_norm"),
    ],
)
def test_trains_the_norm_that_the_attention_output_meets_first(name, norm):
    adapted = peftlib.attach(backbone(name), "hadamard_adapter", train_head=False)
    norms = [n for n in adapted.trainable() if "hadamard" not in n]
    assert len({n.rpartition(".")[0] for n in norms}) == adapted.host.anatomy.num_layers
    assert all(f".{norm}." in n for n in norms)


def test_count_is_that_of_the_abstract():
    adapted = peftlib.attach(backbones.shapes("bert-base-uncased"), "hadamard_adapter")
    count = adapted.count()
    assert count.method == 36_864
    assert round(100 * count.method / count.total, 3) == 0.034  # of 109.5 M; the abstract rounds from 110 M


def _changed(adapted, step):
    before = {n: p.detach().clone() for n, p in adapted.trainable().items()}
    step()
    return {n for n, p in adapted.trainable().items() if not torch.equal(p, before[n])}


def test_the_head_trains_first_then_everything_else():
    model = backbone("bert")
    adapted = peftlib.attach(model, "hadamard_adapter", head_stage=0.5)
    # Momentum and weight decay move a parameter for as long as it has a gradient, and no longer.
    optimizer = torch.optim.AdamW(adapted.trainable().values(), lr=1e-2, weight_decay=0.1)
    data = inputs("bert") | {"labels": torch.tensor([0, 1, 0])}
    head = set(adapted.head_names)
    model.train()
    with adapted.lifecycle(4) as life:

        def step():
            life.step_start()
            model(**data).loss.backward()
            life.gradients()
            optimizer.step()
            optimizer.zero_grad()
            life.step_end()

        changes = [_changed(adapted, step) for _ in range(4)]
    rest = adapted.trainable().keys() - head
    assert changes == [head, head, rest, rest]


def test_each_stage_has_the_schedule_for_itself():
    """The paper trains twice (section 3: the classifier, then adapter and norm): no stage is left with the end of the
    other's decay."""
    adapted = peftlib.attach(backbone("bert"), "hadamard_adapter", head_stage=0.4)
    optimizer = torch.optim.SGD(adapted.trainable().values(), lr=2.0)
    life = adapted.lifecycle(10)
    assert [(s.title, s.steps) for s in life.stages] == [("task head", 4), ("adapter and norms", 6)]
    scheduler, rates = life.scheduler(optimizer, peftlib.Schedule("linear", warmup=0.25)), []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    first, second = [0, 1, 2 / 3, 1 / 3], [0, 1 / 2, 1, 3 / 4, 1 / 2, 1 / 4]
    assert rates == pytest.approx([2 * factor for factor in first + second])


def test_without_a_head_there_is_one_stage():
    model = backbone("gpt2", head="causal_lm")
    adapted = peftlib.attach(model, "hadamard_adapter", head_stage=0.5)
    data = inputs("gpt2")
    model.train()
    with adapted.lifecycle(4) as life:
        assert [stage.title for stage in life.stages] == ["adapter and norms"]
        life.step_start()
        model(**data, labels=data["input_ids"]).loss.backward()
        life.gradients()
        assert all(p.grad is not None for p in adapted.trainable().values())


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_is_exact_or_refused(family):
    model, data = backbone(family).double(), inputs(family)
    adapted = peftlib.attach(model, "hadamard_adapter")
    if family in WITHOUT_BIAS:
        with pytest.raises(MergeError, match=r"has none.*shift=False"):
            adapted.merge()
        adapted.detach()
        adapted = peftlib.attach(model, "hadamard_adapter", shift=False)
    perturb(adapted)
    before = model(**data).logits
    torch.testing.assert_close(adapted.merge()(**data).logits, before, atol=1e-12, rtol=1e-10)


def test_bad_stage():
    with pytest.raises(ConfigError, match=r"head_stage=1\.5"):
        peftlib.config("hadamard_adapter", head_stage=1.5)
