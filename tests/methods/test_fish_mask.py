"""FISH mask: which entries are chosen, how many, and that only they live on."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import peftlib
from peftlib import backbones
from peftlib.conformance.case import backbone, batch, logits, train
from peftlib.errors import ConfigError, StateError, TargetError, UnsupportedError
from tests.methods.facts import Count, Default, Facts, Trains, calibrated

CODE = "varunnair18/FISH, transformers/examples/text-classification/run_glue_sparse_update.py"
SCRIPTS = "varunnair18/FISH, transformers/examples/text-classification/scripts"


FACTS = Facts(
    "fish_mask",
    Default("density", 0.005, f"{CODE}: --keep_ratio"),
    Default("samples", 1024, f"{CODE}: --num_samples; run_table_1.sh gives it too"),
    Default("fisher", "empirical", f"{SCRIPTS}: label-square, the true labels"),
    Default("absolute", False, f"{SCRIPTS}: label-square (the argument's default is label-absolute)"),
    Default("charge_head", True, f"{CODE}, create_mask_gradient: keep_num = int(all * keep_ratio) - classifier_size"),
    Trains(
        ("*.parametrizations.*.0.values",),
        f"{CODE}, create_mask_gradient",
        attach=calibrated("fish_mask", density=0.05),
    ),
    Count("roberta-base", int(0.005 * 124_647_170) - 592_130, "0.5 % of all parameters, less the head's"),
    Count("bert-base-uncased", int(0.005 * 109_483_778) - 1_538, "0.5 % of all parameters, less the head's"),
    Count("t5-base", 1_114_517, "0.5 % of 222,903,552; a language model's head is no new one"),
    Count("llama-7b", 33_692_078, "0.5 % of 6,738,415,616"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()


def attached(family: str = "bert", head: str = "classification", **options) -> peftlib.Adapted:
    adapted = peftlib.attach(backbone(family, head), "fish_mask", **{"density": 0.1, **options})
    adapted.calibrate([batch(family, head)])
    return adapted


def chosen(adapted: peftlib.Adapted) -> set[tuple[str, int]]:
    return {(name, int(i)) for name, child in adapted.method.children.items() for i in child.indices}


def largest(family: str, k: int, score=torch.square, samples: int = 8) -> set[tuple[str, int]]:
    """The k largest of the summed scores of single rows' gradients, by a sort over everything but the head."""
    model, data = backbone(family), batch(family)
    names = [n for n, _ in model.named_parameters() if not n.startswith("classifier")]
    sums = dict.fromkeys(names, 0)
    for i in range(samples):
        model.zero_grad()
        model(**{k: v[i : i + 1] for k, v in data.items()}).loss.backward()
        for n in names:
            sums[n] = sums[n] + score(model.get_parameter(n).grad)
    places = [(n, i) for n in names for i in range(sums[n].numel())]
    order = torch.cat([sums[n].flatten() for n in names]).sort(descending=True, stable=True).indices
    return {places[int(i)] for i in order[:k]}


@pytest.mark.parametrize(
    ("options", "reference"),
    [({}, {}), ({"absolute": True}, {"score": torch.abs}), ({"samples": 3}, {"samples": 3})],
)
def test_the_entries_are_the_largest_of_a_plain_loop(options, reference):
    adapted = attached(**options)
    k = adapted.count().method
    assert chosen(adapted) == largest("bert", k, **reference)
    assert chosen(adapted) != chosen(attached(fisher="expected"))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("density", [0.05, 0.3])
def test_the_head_is_charged_and_the_budget_met_to_the_entry(family, density):
    model = backbone(family)
    total = sum(p.numel() for p in model.parameters())
    count = attached(family, density=density).count()
    assert count.trained == int(density * total)
    free = attached(family, density=density, charge_head=False).count()
    assert free.trained == int(density * total) + free.head


def test_a_language_model_has_no_head_to_charge():
    adapted = attached("gpt2", "causal_lm")
    assert adapted.count().trained == int(0.1 * adapted.count().total)


def test_the_count_is_known_before_the_data():
    adapted = peftlib.attach(backbone("bert"), "fish_mask", density=0.1)
    before = adapted.count()
    assert set(adapted.trainable()) == set(adapted.head_names)
    adapted.calibrate([batch("bert")])
    after = adapted.count()
    assert before.trained == after.trained == sum(p.numel() for p in adapted.trainable().values())
    assert before.stored_bytes >= after.stored_bytes


def test_a_head_larger_than_the_budget_is_an_error():
    with pytest.raises(TargetError, match=r"density=0\.005 of 34,754.*charge_head=False"):
        attached("roberta", density=0.005)
    with pytest.raises(TargetError, match="charge_head"):
        peftlib.attach(backbones.shapes("distilbert-base-uncased"), "fish_mask").count()
    count = peftlib.attach(backbones.shapes("distilbert-base-uncased"), "fish_mask", charge_head=False).count()
    assert count.method == int(0.005 * count.total)


def test_the_order_of_the_data_does_not_matter_and_its_batches_neither():
    data = batch("bert")
    one = attached()
    other = peftlib.attach(backbone("bert"), "fish_mask", density=0.1)
    other.calibrate({k: v[i : i + 3] for k, v in data.items()} for i in (6, 0, 3))
    assert len(chosen(one) ^ chosen(other)) <= 4, "beyond rounding"


def test_calibration_comes_first_and_once():
    adapted = peftlib.attach(backbone("bert"), "fish_mask", density=0.1)
    with pytest.raises(StateError, match=r"adapted\.calibrate"):
        train(adapted, batch("bert"))
    adapted.calibrate([batch("bert")])
    with pytest.raises(StateError, match="calibrated already"):
        adapted.calibrate([batch("bert")])


def test_bad_settings():
    for options in ({"density": 0}, {"density": 1.5}, {"samples": 0}, {"fisher": "true"}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            peftlib.attach(backbone("bert"), "fish_mask", **options)
    with pytest.raises(UnsupportedError, match="expected Fisher"):
        attached("gpt2", "causal_lm", fisher="expected")


def test_the_file_holds_the_changed_entries_only(tmp_path):
    adapted = attached(density=0.02)
    train(adapted, batch("bert"))
    folder = adapted.save(tmp_path / "fish")
    tensors = load_file(folder / "adapter.safetensors")
    k, head = adapted.count().method, adapted.count().head
    assert sum(t.numel() for n, t in tensors.items() if n.endswith(".values")) == k
    assert sum(t.numel() * t.element_size() for t in tensors.values()) <= 8 * k + 4 * head
    assert json.loads((folder / "config.json").read_text())["config"]["density"] == 0.02


def test_a_loaded_one_trains_on_as_if_it_had_not_been_saved(tmp_path):
    adapted = attached()
    train(adapted, batch("bert"))
    loaded = peftlib.load(backbone("bert"), adapted.save(tmp_path / "fish"))
    assert chosen(loaded) == chosen(adapted)
    assert train(loaded, batch("bert")) == train(adapted, batch("bert"))
    assert torch.equal(logits(loaded.model, **batch("bert")), logits(adapted.model, **batch("bert")))
    plain = backbone("bert").state_dict()
    assert all(torch.equal(t, plain[n]) for n, t in loaded.detach().state_dict().items())


def test_it_combines_with_a_method_that_adds(tmp_path):
    config = peftlib.combine(peftlib.config("fish_mask", density=0.1), "lora")
    adapted = peftlib.attach(backbone("bert"), config)
    adapted.calibrate([batch("bert")])
    assert not any("lora" in name for name in adapted.method.parts[0].children)
    train(adapted, batch("bert"))
    loaded = peftlib.load(backbone("bert"), adapted.save(tmp_path / "both"))
    assert torch.equal(logits(loaded.model, **batch("bert")), logits(adapted.model, **batch("bert")))
