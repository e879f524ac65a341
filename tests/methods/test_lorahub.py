"""LoraHub: the search finds a known mixture, leaves the random state alone, and gives one LoRA."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import peftlib
from peftlib.conformance.case import batch, inputs, logits
from peftlib.errors import DataError
from peftlib.methods.reparameterized.lora.multitask.lorahub import minimize
from tests.methods.facts import Count, Default, Facts, Holds
from tests.methods.helpers import backbone, perturb


def source(seed, family="bert", head="classification", **options):
    adapted = peftlib.attach(backbone(family, head), "lora", seed=seed, **options)
    perturb(adapted, seed=seed)
    return replace(adapted.snapshot(), name=f"source {seed}")


def mixture(sources, weights):
    """A LoRA adapter: factors mixed one after the other, the head as a mixture of changes of the backbone's."""
    state = {}
    for name, tensor in sources[0].state.items():
        start = backbone("bert").get_parameter(name).detach() if name in sources[0].head else torch.zeros_like(tensor)
        state[name] = start + sum(float(w) * (s.state[name] - start) for w, s in zip(weights, sources))
    return replace(sources[0], state=state)


def test_the_search_finds_the_smallest_value_in_a_box():
    np.random.seed(5)  # noqa: NPY002 - the global state is what is looked at
    expected = np.random.RandomState(5).rand()
    target = np.array([0.8, -0.5, 2.0, 0.0])
    for optimizer, evaluations in (("NGOpt", 80), ("CMA", 400)):
        options = {"bound": 1.5, "seed": 3, "optimizer": optimizer}
        found = minimize(lambda p: float(np.square(p - target).sum()), 4, evaluations=evaluations, **options)
        assert np.allclose(found.point, [0.8, -0.5, 1.5, 0.0], atol=5e-2), optimizer
        assert len(found.history) == evaluations
        if optimizer == "NGOpt":
            assert found.history[0] == pytest.approx(np.square(target).sum()), "the search starts at zero"
        assert list(found.history) == sorted(found.history, reverse=True)
        again = minimize(lambda p: float(np.square(p - target).sum()), 4, evaluations=evaluations, **options)
        assert again.history == found.history and np.array_equal(again.point, found.point)
        assert np.abs(found.point).max() <= 1.5
    assert np.random.rand() == expected  # noqa: NPY002
    with pytest.raises(peftlib.ConfigError, match=r"optimizer='NGOpd' is none of nevergrad's; near are .*'NGOpt"):
        minimize(lambda p: 0.0, 2, bound=1.5, evaluations=4, optimizer="NGOpd")


@pytest.mark.parametrize(("size", "left"), [(3, 1e-4), (8, 0.05), (20, 0.15)])
def test_the_default_budget_finds_most_of_a_mixture(size, left):
    """By 40 evaluations NGOpt leaves this share of the squared error; CMA-ES leaves 0.1 to 0.7."""
    shares = []
    for seed in range(5):
        target = np.random.default_rng(seed).uniform(-1, 1, size)
        found = minimize(lambda p: float(np.square(p - target).sum()), size, bound=1.5, evaluations=40)  # noqa: B023
        shares.append(np.square(found.point - target).sum() / np.square(target).sum())
    assert np.mean(shares) < left


def test_a_known_mixture_is_found():
    sources = [source(seed) for seed in range(3)]
    true = torch.tensor([0.7, -0.4, 0.1])
    labels = logits(peftlib.load(backbone("bert"), mixture(sources, true)).model, **inputs("bert"))
    model = backbone("bert")
    model.config.problem_type = "regression"  # the loss is the squared distance of the logits from the labels
    adapted = peftlib.attach(model, "lorahub", sources=sources, price=0.0, examples=64)
    adapted.calibrate([{**inputs("bert"), "labels": labels}])
    assert adapted.config.evaluations == 40
    torch.testing.assert_close(adapted.method.weights, true, atol=0.05, rtol=0)
    torch.testing.assert_close(logits(adapted.model, **inputs("bert")), labels, atol=0.05, rtol=0)
    assert adapted.method.history[-1] < 0.01 < adapted.method.history[0]


def test_opposite_weights_are_the_same_update():
    sources = [source(seed) for seed in range(2)]
    answers = []
    for sign in (1, -1):
        mixed = mixture(sources, [0.7 * sign, -0.4 * sign])
        for name in mixed.head:
            mixed.state[name] = sources[0].state[name]
        answers.append(logits(peftlib.load(backbone("bert"), mixed).model, **inputs("bert")))
    assert torch.equal(*answers)


def test_factors_and_head_are_mixed_with_the_same_weights():
    sources = [source(seed) for seed in range(3)]
    adapted = peftlib.attach(backbone("bert"), "lorahub", sources=sources)
    adapted.calibrate([batch("bert")])
    expected = mixture(sources, adapted.method.weights.tolist()).state
    state = adapted.state()
    assert state.keys() == {*expected, "bert.lorahub.weights"}
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor)
    assert adapted.method.weights.abs().max() <= 1.5
    assert set(adapted.trainable()) == set(adapted.head_names)


def test_the_loss_has_its_price():
    sources = [source(0), source(1)]
    adapted = peftlib.attach(backbone("bert"), "lorahub", sources=sources, evaluations=30, examples=8, price=0.5)
    data = batch("bert")
    adapted.calibrate([{k: v[:3] for k, v in data.items()}, {k: v[3:] for k, v in data.items()}])
    loss = torch.nn.functional.cross_entropy(logits(adapted.model, **inputs("bert")), data["labels"])
    assert adapted.method.history[-1] == pytest.approx(
        float(loss + 0.5 * adapted.method.weights.abs().mean()), abs=1e-5
    )
    assert len(adapted.method.history) == 30
    dear = peftlib.attach(backbone("bert"), "lorahub", sources=sources, price=1e3)
    dear.calibrate([data])
    assert not dear.method.weights.any()


def test_only_the_first_examples_are_looked_at():
    rows = []
    adapted = peftlib.attach(backbone("bert"), "lorahub", sources=[source(0), source(1)], examples=11, evaluations=1)
    adapted.model.register_forward_pre_hook(lambda m, a, k: rows.append(len(k["labels"])), with_kwargs=True)
    adapted.calibrate(batch("bert") for _ in range(3))
    assert rows == [8, 3]


def test_a_language_model_is_searched_and_nothing_else_trains():
    sources = [source(seed, "t5", "seq2seq") for seed in range(2)]
    adapted = peftlib.attach(backbone("t5", "seq2seq"), "lorahub", sources=sources)
    adapted.calibrate([batch("t5", "seq2seq")])
    assert not adapted.trainable()
    assert adapted.count().trained == 2
    assert len(adapted.method.history) == 40


def test_fit_searches_and_stops_where_no_head_trains():
    adapted = peftlib.attach(backbone("bert"), "lorahub", sources=[source(0), source(1)], train_head=False)
    task, tokenizer = peftlib.tasks.load("smoke"), peftlib.backbones.load("tiny-bert").tokenizer
    result = peftlib.fit(adapted, task, tokenizer=tokenizer, progress=False)
    assert result.steps == 0 and "accuracy" in result.metrics
    assert len(adapted.method.history) > 1


def test_the_search_is_repeatable():
    def searched(seed, optimizer="NGOpt"):
        sources = [source(0), source(1), source(2)]
        adapted = peftlib.attach(backbone("bert"), "lorahub", sources=sources, seed=seed, optimizer=optimizer)
        adapted.calibrate([batch("bert")])
        return adapted.method.weights

    assert torch.equal(searched(1), searched(2)), "nothing in NGOpt's choice for 40 evaluations is random"
    assert torch.equal(searched(1, "CMA"), searched(1, "CMA"))
    assert not torch.equal(searched(1, "CMA"), searched(2, "CMA"))


def test_what_cannot_be_is_refused():
    model = backbone("bert")
    with pytest.raises(peftlib.ConfigError, match=r"source 'source 1' is LoRAConfig\(rank=4.*need the same rank"):
        peftlib.attach(model, "lorahub", sources=[source(0), source(1, rank=4)])
    peftlib.attach(model, "lorahub", sources=[source(0), source(1, dropout=0.3)]).detach()
    with pytest.raises(peftlib.ConfigError, match="at least 2 saved adapters of lora, and 0 were given"):
        peftlib.attach(model, "lorahub")
    with pytest.raises(peftlib.ConfigError, match="evaluations=0"):
        peftlib.config("lorahub", evaluations=0)
    other = peftlib.attach(model, "lorahub", sources=[source(0), source(1)], optimizer="none")
    with pytest.raises(peftlib.ConfigError, match="optimizer='none' is none of nevergrad's"):
        other.calibrate([batch("bert")])
    other.detach()
    with pytest.raises(DataError, match="given none"):
        peftlib.attach(model, "lorahub", sources=[source(0), source(1)]).calibrate([])


# What is published

EXAMPLE = "sail-sg/lorahub, example.py and reproduce_bbh.py"
ALGORITHM = "sail-sg/lorahub, lorahub/algorithm.py"


def check_start_at_zero():
    """``init=[0] * number_of_loras``, ``upper`` and ``lower`` of 1.5."""
    seen = []
    minimize(lambda p: float(seen.append(p.copy()) or np.square(p - 9).sum()), 3, bound=1.5, evaluations=40)
    assert not seen[0].any() and len(seen) == 40
    assert max(float(np.abs(p).max()) for p in seen) <= 1.5


FACTS = Facts(
    "lorahub",
    Default("evaluations", 40, f"{EXAMPLE}: max_inference_step"),
    Default("examples", 5, f"{EXAMPLE}: five examples"),
    Default("price", 0.05, f"{ALGORITHM}, default_l1_regularization, a mean over the modules"),
    Default("bound", 1.5, f"{ALGORITHM}, lorahub_learning"),
    Default("optimizer", "NGOpt", f"{ALGORITHM}, lorahub_learning"),
    Holds("the search starts at zero and stays in its box", check_start_at_zero, f"{ALGORITHM}, lorahub_learning"),
    Count("roberta-base", 2, f"{ALGORITHM}, lorahub_learning: a number for each of the modules, two here"),
    Count("t5-base", 2, f"{ALGORITHM}, lorahub_learning"),
    Count("llama-7b", 2, f"{ALGORITHM}, lorahub_learning"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
