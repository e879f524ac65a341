"""Hyperformer++: one network a stack makes every adapter, for each row's task, also for a layer that is not there."""

import pytest
import torch
import torch.nn.functional as F

import peftlib
from peftlib import anatomy, backbones
from peftlib.conformance.case import LABELS, batch, logits, train
from peftlib.errors import TargetError, UnknownNameError
from tests.methods.facts import Count, Default, Facts, Holds, Start, Trains, normal, zeros
from tests.methods.helpers import Spy, backbone, inputs, linear, perturb

OPTIONS = {"tasks": 3, "reduction": 4, "embedding": 6, "hidden": 10}


def attached(family="bert", head="classification", std=0.3, **options):
    adapted = peftlib.attach(backbone(family, head), "hyperformer_pp", **OPTIONS | options)
    perturb(adapted, std=std)
    return adapted


def generated(network, task, layer, place, d):
    """The paper's network H, written from its embeddings to the weights of one adapter."""
    code = torch.cat([network.task.weight[task], network.layer.weight[layer], network.place.weight[place]])
    first, _, second = network.join
    code = second.weight @ torch.relu(first.weight @ code + first.bias) + second.bias
    code = (code - code.mean()) / torch.sqrt(code.var(unbiased=False) + 1e-6)
    code = code * network.norm.weight + network.norm.bias
    made = {name: maker.weight @ code + maker.bias for name, maker in network.makers.items()}
    return made | {"down": made["down"].view(-1, d), "up": made["up"].view(d, -1)}


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_every_block_has_the_adapter_of_its_row_s_task(family):
    adapted = attached(family)
    adapted.model.double()
    parts = adapted.host.anatomy
    sites = [(layer, place) for layer in parts.layers for place in ("ffn.down", "attention.output")]
    spy = Spy(*(layer.sites[place].module for layer, place in sites))
    tasks = [2, 0, 2]
    logits(adapted.model, **inputs(family), task_ids=torch.tensor(tasks))
    assert len(adapted.host.paths()) == len(sites)
    for layer, place in sites:
        x, y = spy[layer.sites[place].module]
        for row, task in enumerate(tasks):
            network = adapted.method.networks[layer.stack]
            w = generated(network, task, layer.index, int(place == "attention.output"), parts.d)
            own = linear(layer.sites[place], x[row])
            inner = F.gelu(own @ w["down"].T + w["down_bias"], approximate="tanh")
            z = F.layer_norm(inner @ w["up"].T + w["up_bias"], (parts.d,))
            torch.testing.assert_close(y[row], own + z * w["scale"] + w["shift"], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_stacks_have_a_network_each_and_share_the_tasks(family):
    adapted = attached(family)
    networks = list(adapted.method.networks.values())
    assert len(networks) == (2 if family == "t5" else 1)
    assert len({id(network.task) for network in networks}) == 1
    names = [name for name in adapted.trainable() if ".hyperformer." in name]
    assert len(names) == len(set(names)) == len(networks) * (2 + 4 + 2 + 12) + 1
    assert adapted.count().stored == adapted.count().trained


def test_every_norm_of_the_backbone_trains_and_no_other_part_of_it():
    for family in ("t5", "bert"):
        adapted = attached(family, "seq2seq" if family == "t5" else "masked_lm", std=0.0)
        own = {name for name in adapted.trainable() if ".hyperformer." not in name}
        inside = {name for name, _ in anatomy.of(backbone(family)).base.named_parameters()}
        norms = {name for name in inside if "norm" in name.lower()}
        assert norms == {name.partition(".")[2] if family == "bert" else name for name in own}
    assert not any(
        "norm" in name.lower() and ".hyperformer." not in name for name in attached(train_norms=False).trainable()
    )


def test_count_on_t5_base():
    adapted = peftlib.attach(backbones.shapes("t5-base", head="seq2seq"), "hyperformer_pp", tasks=8)
    d, r, e = 768, 24, 64
    network = 12 * e + 2 * e + 3 * e * 128 + 128 + 128 * e + e + 2 * e + (e + 1) * (2 * d * r + r + 3 * d)
    norms = 12 * 2 * d + d + 12 * 3 * d + d
    assert adapted.count().method == 8 * e + 2 * network + norms


# Tasks


def test_opposite_tasks_are_learned_at_once():
    """Two tasks with the same texts and opposite labels: nothing but the tasks' embeddings tells them apart."""
    adapted = peftlib.attach(backbone("bert"), "hyperformer_pp", tasks=2, reduction=4)
    data = {k: torch.cat([v, v]) for k, v in batch("bert").items()}
    data["labels"][len(LABELS) :] = 1 - data["labels"][len(LABELS) :]
    data["task_ids"] = torch.tensor([0, 1]).repeat_interleave(len(LABELS))
    given = {k: v for k, v in data.items() if k != "labels"}
    for _ in range(8):
        train(adapted, data, steps=25, rate=0.001)
        if torch.equal(logits(adapted.model, **given).argmax(-1), data["labels"]):
            return
    raise AssertionError("200 steps did not tell the tasks apart")


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_mixed_batch_is_each_task_alone(family):
    adapted = attached(family)
    data, tasks = inputs(family), [1, 2, 1]
    mixed = logits(adapted.model, **data, task_ids=torch.tensor(tasks))
    answers = []
    for task in range(3):
        with adapted.task(task):
            answers.append(logits(adapted.model, **data))
    assert not torch.allclose(answers[1], answers[2], atol=1e-3)
    torch.testing.assert_close(
        mixed, torch.stack([answers[t][row] for row, t in enumerate(tasks)]), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_repeats_a_mixed_batch_with_its_tasks(reentrant):
    found = []
    for on in (False, True):
        adapted = attached("bert")
        if on:
            adapted.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            adapted.model.enable_input_require_grads()
        adapted.model.train()
        ids = torch.tensor([0, 1, 2, 2, 1, 0, 0, 1])
        adapted.model(**batch("bert"), task_ids=ids).loss.backward()
        found.append({n: p.grad for n, p in adapted.trainable().items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_a_mixed_batch_compiles_as_one_graph():
    adapted = attached("bert")
    data, ids = inputs("bert"), torch.tensor([2, 0, 1])
    expected = logits(adapted.model, **data, task_ids=ids)
    torch._dynamo.reset()
    compiled = torch.compile(adapted.model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, **data, task_ids=ids), expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


# A layer that is not there


def test_an_adapter_for_an_unseen_layer():
    adapted = attached("bert")
    network = adapted.method.networks["encoder"]
    table = network.layer.weight.detach()
    for index, expected in ((1, table[1]), (0.25, 0.75 * table[0] + 0.25 * table[1]), (2, 2 * table[1] - table[0])):
        torch.testing.assert_close(network.layer_embedding(index), expected)
    for place, code in (("ffn", 0), ("attention", 1)):
        for name, tensor in adapted.method.make(2, 1, place)._asdict().items():
            torch.testing.assert_close(tensor[0], generated(network, 2, 1, code, 32)[name], atol=1e-5, rtol=1e-4)


def test_a_layer_can_use_an_adapter_of_an_index_that_was_not_trained():
    adapted = attached("bert")
    site = adapted.host.anatomy.layers[1].sites["ffn.down"]
    spy = Spy(site.module)
    answers = []
    for index in (1, 2, 1.5):
        site.module.hyperformer.layer = index
        with adapted.task(1):
            answers.append(logits(adapted.model, **inputs("bert")))
        x, y = spy[site.module]
        own = linear(site, x)
        delta = adapted.method.make(1, index, "ffn").delta(own.flatten(0, 1)[None], site.module.hyperformer.activation)
        torch.testing.assert_close(y, own + delta.view(own.shape), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(answers[0], answers[1], atol=1e-3)


def test_what_cannot_be_is_refused():
    with pytest.raises(TargetError, match=r"reduction=64 leaves nothing of the hidden size 32"):
        peftlib.attach(backbone("bert"), "hyperformer_pp", reduction=64)
    adapted = attached()
    with pytest.raises(UnknownNameError, match="place of an adapter 'fnn'; did you mean 'ffn'"):
        adapted.method.make(0, 0, "fnn")
    with pytest.raises(UnknownNameError, match="stack 'decoder'"):
        adapted.method.make(0, 0, "ffn", "decoder")
    with pytest.raises(peftlib.errors.DataError, match="task 3"):
        adapted.method.make(3, 0, "ffn")
    with pytest.raises(peftlib.ConfigError, match="embedding=0"):
        peftlib.config("hyperformer_pp", embedding=0)


def _a_task():
    """8 tasks share what trains: 0.29 % of T5-base for each (abstract)."""
    adapted = peftlib.attach(backbones.shapes("t5-base", head="seq2seq"), "hyperformer_pp", tasks=8)
    assert f"{100 * adapted.count().method / adapted.count().total / 8:.2f}" == "0.29"


CODE = "rabeehk/hyperformer, hyperformer"
FACTS = Facts(
    "hyperformer_pp",
    Default("embedding", 64, f"{CODE}/configs/hyperformer++.json: task_embedding_dim, projected_task_embedding_dim"),
    Default("hidden", 128, f"{CODE}/adapters/adapter_configuration.py: task_hidden_dim"),
    Default("reduction", 32, f"{CODE}/configs/hyperformer++.json"),
    Default("activation", "gelu_new", f"{CODE}/configs/hyperformer++.json"),
    Default("std", 0.01, f"{CODE}/adapters/adapter_utils.py, linear_layer"),
    Default("train_norms", True, f"{CODE}/configs/hyperformer++.json: unfreeze_layer_norms"),
    Start("*.network.join.*.weight", normal(0.01), f"{CODE}/adapters/adapter_utils.py, linear_layer"),
    Start("*.network.join.*.bias", zeros(), f"{CODE}/adapters/adapter_utils.py, linear_layer"),
    Start("*.network.makers.*.weight", normal(0.01), f"{CODE}/adapters/adapter_utils.py, linear_layer"),
    Start("*.network.makers.*.bias", zeros(), f"{CODE}/adapters/adapter_utils.py, linear_layer"),
    Start("*.network.task.weight", normal(1.0), f"{CODE}/adapters/adapter_utils.py: torch.randn", {"tasks": 64}),
    Trains(("*.network.*", "*LayerNorm*"), f"{CODE}/utils/utils.py: hypernetworks, embeddings and all layer norms"),
    Count("t5-base", 5_211_056, "the modules of adapter_modeling.py, counted", {"tasks": 8}),
    Count("roberta-base", 2_619_928, "one network for the only stack, one task"),
    Count("llama-7b", 69_266_048, "one network for the only stack, one task"),
    Holds("0.29 % a task on T5-base", _a_task, "abstract"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
