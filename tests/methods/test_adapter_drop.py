"""AdapterDrop: its formula, both forms, k chosen at inference, and what the dropped adapters save."""

import copy
from collections import Counter
from itertools import pairwise

import pytest
import torch

import peftlib
from peftlib import backbones
from peftlib.efficiency.speed import count_flops
from peftlib.errors import TargetError
from peftlib.methods.base import ConfigError, TrainingState
from tests.methods.facts import Count, Default, Facts, Holds, Start, Trains, normal, zeros
from tests.methods.helpers import backbone, inputs, perturb


def sequential_adapter(y, W_down, b_down, W_up, b_up, activation="gelu"):
    """Houlsby et al. 2019: h + W_up act(W_down h + b_down) + b_up for a block's output h (tokens, d), in float64."""
    act = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "swish": torch.nn.functional.silu}[activation]
    h, down, up = y.double(), W_down.double(), W_up.double()
    return (h + act(h @ down.T + b_down.double()) @ up.T + b_up.double()).to(y.dtype)


FAMILIES = list(backbones.tiny.FAMILIES)


def deep(family="bert", layers=6):
    """A tiny encoder of several layers."""
    model = backbone(family)
    stack = peftlib.anatomy.of(model).holder("encoder").layer
    for _ in range(layers - len(stack)):
        stack.append(copy.deepcopy(stack[0]))
    model.config.num_hidden_layers = layers
    return model


def logits(model, data):
    model.eval()
    with torch.no_grad():
        return model(**data).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_adds_its_bottleneck_behind_the_feed_forward_block_of_the_upper_layers(family):
    model = backbone(family)
    before, after = {}, {}

    def see(where, place):
        def hook(module, args, output=None):
            value = args if output is None else output
            where[place] = (value[0] if isinstance(value, tuple) else value).detach()

        return hook

    layers = peftlib.anatomy.of(model).layers

    def watch(where):
        for place, layer in enumerate(layers):
            if layer.pre_norm:
                layer.module.register_forward_hook(see(where, place))
            else:
                layer.norms["ffn"].register_forward_pre_hook(see(where, place))

    watch(before)
    adapted = peftlib.attach(model, "adapter_drop", bottleneck=4)
    watch(after)
    perturb(adapted)
    model.double()
    adapted.method.drop(1)
    logits(model, inputs(family, 2))
    assert torch.equal(after[0], before[0])
    for place, layer in list(enumerate(layers))[1:]:
        a = layer.module.adapter_drop
        z = before[place].reshape(-1, adapted.host.anatomy.d)
        parts = [t.detach() for t in (a.down.weight, a.down.bias, a.up.weight, a.up.bias)]
        with torch.no_grad():
            read = z if layer.pre_norm else layer.norms["ffn"].forward(z)
        expected = z + sequential_adapter(read, *parts, activation="relu") - read
        torch.testing.assert_close(after[place].reshape(expected.shape), expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("k", [0, 2, 5])
def test_the_robust_form_with_k_dropped_is_the_specialized_one(k):
    model, data = deep(), inputs("bert")
    robust = peftlib.attach(model, "adapter_drop", bottleneck=4)
    perturb(robust)
    robust.method.drop(k)
    answer, state = logits(model, data), {n: p.detach().clone() for n, p in robust.trainable().items()}
    robust.detach()
    special = peftlib.attach(model, "adapter_drop", bottleneck=4, robust=False, dropped=k)
    mine = special.trainable()
    assert {int(n.split(".layer.")[1].split(".")[0]) for n in mine if "adapter_drop" in n} == set(range(k, 6))
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(state[name])
    assert torch.equal(logits(model, data), answer)


def test_all_dropped_at_inference_is_the_backbone():
    model, data = deep(), inputs("bert")
    before = logits(model, data)
    adapted = peftlib.attach(model, "adapter_drop")
    assert not torch.equal(logits(model, data), before)
    adapted.method.drop(6)
    assert torch.equal(logits(model, data), before)


def test_flops_fall_by_one_adapter_with_each_layer_dropped():
    model, data = deep(), inputs("bert")
    adapted = peftlib.attach(model, "adapter_drop", bottleneck=4)
    tokens, found = data["input_ids"].numel(), []
    for k in range(7):
        adapted.method.drop(k)
        found.append(count_flops(lambda: logits(model, data)))
    assert {a - b for a, b in pairwise(found)} == {2 * 2 * adapted.host.anatomy.d * 4 * tokens}
    adapted.detach()
    assert found[-1] == count_flops(lambda: logits(model, data))


def test_training_computes_nothing_backwards_below_the_first_adapter():
    data = inputs("bert") | {"labels": torch.tensor([0, 1, 0])}
    flops, graphs = [], []
    for k in range(6):
        model = deep()
        adapted = peftlib.attach(model, "adapter_drop", bottleneck=4, robust=False, dropped=k)
        inside: list[bool] = []
        for layer in adapted.host.anatomy.layers:
            layer.module.register_forward_hook(lambda m, a, out, inside=inside: inside.append(out.requires_grad))
        model.train()
        loss = model(**data).loss
        graphs.append(inside)
        flops.append(count_flops(loss.backward))
    assert graphs == [[False] * k + [True] * (6 - k) for k in range(6)]
    assert flops == sorted(flops, reverse=True)
    # From one k to the next the backward pass loses an adapter and the whole of a frozen layer.
    assert min(a - b for a, b in pairwise(flops)) > (flops[0] - flops[-1]) / 8


def test_a_robust_step_drops_what_was_drawn_and_evaluation_does_not():
    model, data = deep(), inputs("bert") | {"labels": torch.tensor([0, 1, 0])}
    adapted = peftlib.attach(model, "adapter_drop", bottleneck=4)
    with adapted.lifecycle(8) as life:
        for step in range(8):
            k = adapted.method.drawn(step)
            life.step_start()
            model.train()
            model(**data).loss.backward()
            with_gradient = {i for i, a in adapted.method.adapters.items() if a.up.weight.grad is not None}
            assert with_gradient == set(range(k, 6))
            model.zero_grad()
            model.eval()
            assert all(a.active for a in adapted.method.adapters.values())
            life.step_end()


def test_k_is_uniform_anew_at_each_step_and_the_same_for_the_same_seed():
    draws = []
    for seed in (0, 0, 1):
        method = peftlib.attach(deep(), "adapter_drop", bottleneck=4, seed=seed).method
        draws.append([method.drawn(step) for step in range(3000)])
    assert draws[0] == draws[1] != draws[2]
    counts = Counter(draws[0])
    assert sorted(counts) == [0, 1, 2, 3, 4, 5]
    # A share of 1/6 of 3000 draws has a standard deviation of 20.
    assert all(abs(count - 500) < 100 for count in counts.values())
    limited = peftlib.attach(deep(), "adapter_drop", max_dropped=2).method
    assert {limited.drawn(step) for step in range(100)} == {0, 1, 2}


def test_only_the_robust_form_acts_during_training():
    model = deep()
    special = peftlib.attach(model, "adapter_drop", robust=False, dropped=3)
    assert special.method.hooks() == ()
    special.method.on_step_start(TrainingState(0, 1))
    model.train()
    assert all(adapter.active for adapter in special.method.adapters.values())


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_layers_are_counted_through_both_stacks(family):
    adapted = peftlib.attach(backbone(family), "adapter_drop", robust=False, dropped=3)
    (owner,) = {n.partition(".adapter_drop")[0] for n in adapted.trainable() if "adapter_drop" in n}
    assert "decoder" in owner
    assert owner.endswith(".1")


@pytest.mark.parametrize(("options", "layers"), [({}, 12), ({"dropped": 5, "robust": False}, 7)])
def test_count(options, layers):
    adapted = peftlib.attach(backbones.shapes("roberta-base"), "adapter_drop", **options)
    assert adapted.count().method == layers * (2 * 768 * 48 + 48 + 768)


def test_bad_options():
    with pytest.raises(ConfigError, match="dropped=-1"):
        peftlib.config("adapter_drop", dropped=-1)
    with pytest.raises(ConfigError, match=r"max_dropped=3.*set dropped"):
        peftlib.config("adapter_drop", robust=False, max_dropped=3)
    with pytest.raises(TargetError, match=r"dropped=6.*5 or less"):
        peftlib.attach(deep(), "adapter_drop", dropped=6)
    special = peftlib.attach(deep(), "adapter_drop", dropped=2, robust=False)
    for k in (1, 7, 2.0):
        with pytest.raises(ConfigError, match=rf"k={k!r}.*from 2 to 6"):
            special.method.drop(k)


def _drawn_evenly():
    """Section 3.1: at each step n is drawn from 0 to 11 of 12 layers."""
    method = peftlib.attach(deep(), "adapter_drop").method
    drawn = Counter(method.drawn(step) for step in range(3000))
    assert set(drawn) == set(range(6))
    assert max(drawn.values()) < 1.25 * min(drawn.values())


LIBRARY = "AdapterHub (adapter-transformers), adapters/modeling.py and configuration.py"
FACTS = Facts(
    "adapter_drop",
    Default("robust", True, "section 3.1: robust AdapterDrop layers"),
    Default("max_dropped", None, "section 3.1: up to all but one of the layers"),
    Default("bottleneck", 48, f"{LIBRARY}: Pfeiffer's reduction_factor 16 of 768"),
    Default("activation", "relu", f"{LIBRARY}, PfeifferConfig"),
    Default("dropout", 0.0, f"{LIBRARY}: none"),
    Start("*.down.weight", normal(0.02), f"{LIBRARY}, init_bert_weights"),
    Start("*.up.weight", normal(0.02), f"{LIBRARY}, init_bert_weights"),
    Start("*.adapter_drop.*.bias", zeros(), f"{LIBRARY}, init_bert_weights"),
    Trains(("*.adapter_drop.down.*", "*.adapter_drop.up.*"), f"{LIBRARY}: no norm"),
    Count("roberta-base", 894_528, f"{LIBRARY}: 2 d r + d + r in 12 layers"),
    Count("t5-base", 1_789_056, "the same formula at 48"),
    Count("llama-7b", 12_715_520, "the same formula at 48"),
    Holds("the number of dropped layers is uniform", _drawn_evenly, "section 3.1"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
