"""S4: which layer is in which group, what each group has, and that every layer costs the same."""

from collections import Counter

import pytest
import torch

import peftlib
from peftlib import backbones
from peftlib.errors import MergeError, TargetError
from peftlib.methods.base import ConfigError
from peftlib.methods.hybrid.automatic.s4 import SETS
from tests.methods.facts import Count, Default, Facts, Holds, Start, normal, zeros
from tests.methods.helpers import backbone, inputs, perturb

G1, G2 = {"lora", "sequential_adapter"}, {"prefix", "sequential_adapter"}
G3, G4 = {"prefix", "sequential_adapter", "bitfit"}, {"prefix", "lora", "bitfit"}


def by_layer(adapted):
    """What each layer has, and how many parameters of it train."""
    kinds, sizes = [], []
    for layer in adapted.host.anatomy.layers:
        names = {n for n, _ in layer.module.named_modules()}
        kind = {k for k in ("lora", "prefix", "sequential_adapter") if any(n.endswith(k) for n in names)}
        own = [p for n, p in layer.module.named_parameters() if n.endswith(".bias") and "sequential" not in n]
        trained = sum(p.requires_grad for p in own)
        assert trained in (0, len(own))
        kinds.append(kind | ({"bitfit"} if trained else set()))
        sizes.append(sum(p.numel() for p in layer.module.parameters() if p.requires_grad))
    return kinds, sizes


@pytest.mark.parametrize(
    ("name", "groups"),
    [("roberta-base", (2, 4, 4, 2)), ("roberta-large", (4, 8, 8, 4)), ("distilbert-base-uncased", (1, 2, 2, 1))],
)
def test_a_spindle_of_four_groups_with_their_sets(name, groups):
    kinds, _ = by_layer(peftlib.attach(backbones.shapes(name), "s4"))
    assert kinds == [kind for kind, size in zip((G1, G2, G3, G4), groups) for _ in range(size)]


@pytest.mark.parametrize("budget", [0.003, 0.005, 0.02])
def test_every_layer_takes_its_equal_share_of_the_budget(budget):
    adapted = peftlib.attach(backbones.shapes("roberta-base"), "s4", budget=budget, train_head=False)
    total = adapted.count().total - sum(p.numel() for p in adapted.host.anatomy.head.values())
    share, d = budget * total / 12, 768
    _, sizes = by_layer(adapted)
    for size, units in zip(sizes, [(2 * d + 1, 4 * d)] * 2 + [(2 * d + 1, 2 * d)] * 8 + [(2 * d, 4 * d)] * 2):
        assert share - sum(units) < size <= share
    assert sum(sizes) == adapted.count().method <= budget * total


def test_both_stacks_of_an_encoder_decoder_have_four_groups():
    adapted = peftlib.attach(backbones.shapes("t5-base"), "s4")
    kinds, sizes = by_layer(adapted)
    without = [kind - {"bitfit"} for kind in (G1, G2, G3, G4)]  # T5 has no biases
    assert kinds == 2 * [kind for kind, size in zip(without, (2, 4, 4, 2)) for _ in range(size)]
    total = sum(p.numel() for p in adapted.host.anatomy.named_parameters().values()) - sum(sizes)
    assert max(sizes) <= 0.005 * total / 24


def test_a_part_stays_in_its_layers():
    adapted = peftlib.attach(backbone("bert"), "s4", budget=0.1, groups=(1, 0, 0, 1), train_head=False)
    first, second = adapted.host.anatomy.layers
    where = Counter("first" if ".layer.0." in n else "second" if ".layer.1." in n else n for n in adapted.trainable())
    assert set(where) == {"first", "second"}
    assert not any(p.requires_grad for n, p in first.module.named_parameters() if n.endswith("query.bias"))
    assert second.sites["attention.query"].bias.requires_grad
    lora = [first.sites[n].module.lora for n in ("attention.query", "attention.value")]
    assert {u.scale for u in lora} == {2.0}


def test_a_saved_one_computes_the_same(tmp_path):
    adapted = peftlib.attach(backbone("bert"), "s4", budget=0.1, groups=(1, 1, 1, 1))
    perturb(adapted)
    loaded = peftlib.load(backbone("bert"), adapted.save(tmp_path / "a"))
    assert loaded.config.groups == (1, 1, 1, 1)
    assert torch.equal(loaded.model(**inputs("bert")).logits, adapted.model(**inputs("bert")).logits)


def test_what_cannot_be_is_refused():
    with pytest.raises(TargetError, match=r"budget=0\.005 leaves 43 parameters a layer .* too few for adapter"):
        peftlib.attach(backbone("bert"), "s4", budget=0.005)
    with pytest.raises(ConfigError, match=r"groups=\(1, 2\)"):
        peftlib.config("s4", groups=(1, 2))
    with pytest.raises(ConfigError, match=r"budget=1\.5"):
        peftlib.config("s4", budget=1.5)
    with pytest.raises(MergeError, match="s4 has no merge"):
        peftlib.attach(backbone("bert"), "s4", budget=0.1).merge()


def _the_sets():
    expected = (
        {"adapter", "lora"},
        {"adapter", "prefix"},
        {"adapter", "prefix", "bitfit"},
        {"prefix", "bitfit", "lora"},
    )
    assert tuple(set(names) for names in SETS) == expected


def _a_spindle():
    sizes = peftlib.config("s4").sizes(12)
    assert sizes[0] < sizes[1] == sizes[2] > sizes[3]
    assert sum(sizes) == 12


FACTS = Facts(
    "s4",
    Default("budget", 0.005, "arXiv:2301.01821: 0.5 % of the parameters of T5-base"),
    Default("groups", (1, 2, 2, 1), "chosen here; the paper says a spindle, few layers at both ends"),
    Default("activation", "relu", "amazon-science/peft-design-spaces, configuration.py, PfeifferConfig"),
    Start("*.sequential_adapter.down.weight", normal(0.02), "amazon-science/peft-design-spaces, modeling.py: bert"),
    Start("*.lora.B", zeros(), "amazon-science/peft-design-spaces, lora.py"),
    Count("roberta-base", 605_332, "at most 0.5 %: whole units of each module"),
    Count("t5-base", 1_050_904, "at most 0.5 %; T5 has no biases"),
    Count("llama-7b", 32_839_306, "at most 0.5 %; LLaMA has no biases"),
    Holds("the sets of the four groups", _the_sets, "arXiv:2301.01821, the S4-model of T5-base"),
    Holds("the groups are a spindle", _a_spindle, "arXiv:2301.01821, design pattern i"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
