"""Every method has its table of published facts, and a table can fail."""

import importlib

import pytest
import torch

from peftlib import taxonomy
from tests.methods import facts
from tests.methods.facts import Count, Default, Facts, Start, Trains, kaiming_uniform, normal, ones, uniform, zeros


@pytest.mark.parametrize("method", taxonomy.methods())
def test_every_method_has_a_table(method):
    module = importlib.import_module(f"tests.methods.test_{method}")
    table = module.FACTS
    assert table.method == method
    assert len(table.facts) >= 3
    assert module.test_published_facts.pytestmark[0].args[0] == "fact"
    backbones = {fact.backbone for fact in table.facts if isinstance(fact, Count)}
    missing = {"roberta-base", "t5-base", "llama-7b"} - backbones
    hosts = [b for b in missing if "unsupported" not in facts.counts.count(method, b)]
    assert not hosts, f"{method} has no count on {hosts}"


@pytest.mark.parametrize(
    "wrong",
    [
        Default("rank", 9, "nowhere"),
        Start("*.B", ones(), "nowhere"),
        Start("*.A", zeros(), "nowhere"),
        Start("*.A", normal(0.1), "nowhere"),
        Start("*.A", uniform(lambda fan_in: 1.1 * fan_in**-0.5), "nowhere"),
        Start("*.nothing", zeros(), "nowhere"),
        Trains(("*.A",), "nowhere"),
        Trains(("*.A", "*.B", "*.C"), "nowhere"),
        Count("roberta-base", 294_911, "nowhere"),
        Count("roberta-base", 294_912, "nowhere", percent="0.3"),
    ],
    ids=str,
)
def test_a_wrong_fact_fails(wrong):
    with pytest.raises(AssertionError):
        wrong.check("lora")


def test_a_right_one_passes():
    for right in (
        Default("rank", 8, "here"),
        Start("*.A", kaiming_uniform(), "here"),
        Start("*.B", zeros(), "here"),
        Trains(("*.A", "*.B"), "here"),
        Count("roberta-base", 294_912, "here", percent="0.24"),
    ):
        right.check("lora")


def test_a_fact_without_a_source_is_refused():
    with pytest.raises(AssertionError, match="source"):
        Facts("lora", Default("rank", 8, ""))


def test_a_distribution_is_told_from_one_of_the_same_spread():
    class Method:
        def __init__(self):
            self.model = torch.nn.Linear(100, 100)

    same = Start("weight", normal(0.1 / 3**0.5), "here", attach=Method)
    with pytest.raises(AssertionError, match="Kolmogorov"):
        same.check("lora")
    Start("weight", uniform(0.1), "here", attach=Method).check("lora")
