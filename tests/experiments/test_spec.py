"""Specifications: complete, hashable, strict about names."""

import pytest

from peftlib import experiments
from peftlib.errors import UnknownNameError
from peftlib.experiments.spec import source_specs
from peftlib.methods.registry import find


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


def test_methods_that_build_on_adapters_name_the_tasks_of_these_in_their_runs(monkeypatch):
    plain = experiments.run_spec("smoke", None, "lora")
    assert "sources" not in plain.settings and source_specs(plain) == []
    monkeypatch.setattr(find("lora"), "source_methods", ("prompt_tuning",))
    spec = experiments.run_spec("smoke", None, "lora", seed=2)
    assert spec.settings["sources"] == ["smoke", "smoke-pair"]
    sources = source_specs(spec)
    assert [(s.method, s.track, s.settings["task"], s.seed) for s in sources] == [
        ("prompt_tuning", "smoke", "smoke", 2),
        ("prompt_tuning", "smoke-pair", "smoke-pair", 2),
    ]
    assert {s.learning_rate for s in sources} == {find("prompt_tuning").learning_rate}
    assert all("sources" not in s.settings for s in sources)


def test_the_search_goes_on_where_its_best_rate_is_the_lowest_or_the_highest():
    tried = [2e-3, 1e-4, 5e-4, 1e-2]
    assert experiments.next_rate(tried, 1e-2) == 5e-2
    assert experiments.next_rate(tried, 1e-4) == 2e-5
    assert experiments.next_rate(tried, 5e-4) is None
    assert experiments.next_rate([*tried, 5e-2], 1e-2) is None
    assert experiments.next_rate([*tried, 5e-2, 0.2, 1.0], 1.0) is None  # there is none beyond


def test_the_search_goes_up_while_its_rates_differ_by_noise_alone():
    tried = [2e-3, 1e-4, 5e-4, 1e-2]
    assert experiments.next_rate(tried, 1e-4, decided=False) == 5e-2
    assert experiments.next_rate([*tried, 5e-2, 0.2, 1.0], 1e-4, decided=False) == 2e-5
