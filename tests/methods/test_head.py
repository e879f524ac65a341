"""The task head alone: nothing of the backbone trains."""

import pytest

import peftlib
from peftlib.errors import UnsupportedError
from tests.methods.facts import Count, Facts, Holds, Trains
from tests.methods.helpers import backbone


def _only_the_head():
    adapted = peftlib.attach(backbone("bert"), "head")
    assert set(adapted.trainable()) == {"classifier.weight", "classifier.bias"}


FACTS = Facts(
    "head",
    Trains((), "chosen here: the lower baseline trains nothing of the backbone"),
    Holds("the classifier alone trains", _only_the_head, "chosen here: the lower baseline"),
    Count("roberta-base", 0, "chosen here: the lower baseline"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()


def test_a_language_model_has_no_new_head():
    with pytest.raises(UnsupportedError, match="head needs a new task head"):
        peftlib.attach(backbone("llama", "causal_lm"), "head")
