"""Specifications: complete, hashable, strict about names."""

import pytest

from peftlib import experiments
from peftlib.errors import UnknownNameError


def test_key_depends_on_everything_and_on_nothing_else():
    a = experiments.run_spec("smoke", "smoke", "lora", seed=0)
    assert a.key == experiments.run_spec("smoke", "smoke", "lora", seed=0, options={"rank": 8}).key
    others = [
        experiments.run_spec("smoke", "smoke", "lora", seed=1),
        experiments.run_spec("smoke", "smoke", "lora", learning_rate=0.123),
        experiments.run_spec("smoke", "smoke", "lora", options={"rank": 4}),
        experiments.run_spec("smoke", "smoke", "lora", changes={"epochs": 2}),
        experiments.run_spec("smoke", "smoke", "head"),
    ]
    assert len({a.key, *(o.key for o in others)}) == 6


@pytest.mark.parametrize(
    ("arguments", "wrong", "way_out"),
    [
        (("embeded", "few-shot", "lora", {}), "embeded", "'embedded'"),
        (("embedded", "few-shots", "lora", {}), "few-shots", "'few-shot'"),
        (("embedded", "few-shot", "lara", {}), "lara", "'lora'"),
        (("embedded", "few-shot", "lora", {"options": {"rnk": 4}}), "rnk", "'rank'"),
        (("embedded", "few-shot", "lora", {"changes": {"epoch": 4}}), "epoch", "'epochs'"),
    ],
)
def test_wrong_names_are_named_with_the_nearest(arguments, wrong, way_out):
    *names, more = arguments
    with pytest.raises(UnknownNameError, match=wrong) as error:
        experiments.run_spec(*names, **more)
    assert way_out in str(error.value)
