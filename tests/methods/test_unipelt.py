"""UniPELT: three methods at once, each behind a gate that has one value a sample."""

import pytest
import torch
import torch.nn.functional as F

import peftlib
from peftlib import backbones
from peftlib.errors import MergeError, UnsupportedError
from peftlib.mechanisms import attention
from peftlib.methods.base import ConfigError
from tests.methods.facts import Count, Default, Facts, Start, Trains, kaiming_uniform, normal, zeros
from tests.methods.helpers import Spy, backbone, inputs, linear, perturb

SMALL = {"length": 5, "bottleneck": 6, "rank": 4, "alpha": 6.0, "reparametrize": False}


def attached(family="bert", head="classification", **options):
    adapted = peftlib.attach(backbone(family, head), "unipelt", train_head=False, **(SMALL | options))
    perturb(adapted)
    return adapted


def per_sample(gate, x, mask):
    """The literal rule: the mean of sigmoid(w x_t + b) over each sample's tokens."""
    values = torch.sigmoid(x @ gate.linear.weight[0] + gate.linear.bias)
    return torch.stack([row[keep.bool()].mean() for row, keep in zip(values, mask)]).detach()


@torch.no_grad()
def test_lora_is_scaled_by_a_gate_of_each_sample_s_tokens():
    adapted, given = attached(), inputs("bert")
    sites = adapted.host.anatomy.sites(("attention.query", "attention.value"))
    spy = Spy(*(site.module for site in sites))
    adapted.model.eval()(**given)
    assert len({int(row.sum()) for row in given["attention_mask"]}) > 1, "nothing is padded"
    for site in sites:
        x, y = spy[site.module]
        gate = per_sample(site.module.lora_gate, x, given["attention_mask"])
        update = x @ site.module.lora.A.T @ site.module.lora.B.T * (6.0 / 4)
        torch.testing.assert_close(y, linear(site, x) + gate[:, None, None] * update, atol=2e-5, rtol=1e-4)
        assert gate.unique().numel() == 3


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_the_adapter_reads_behind_the_norm_and_its_gate_too(family):
    adapted, given = attached(family), inputs(family)
    layer = adapted.host.anatomy.layers[1]
    norm, child, sums = layer.norms["ffn"], layer.module.sequential_adapter, []
    norm.register_forward_pre_hook(lambda module, args: sums.append(args[0]), prepend=True)
    spy = Spy(norm)
    adapted.model.eval()(**given)
    reads = F.layer_norm(sums[0], sums[0].shape[-1:], norm.weight, norm.bias, norm.eps)
    gate = per_sample(layer.module.sequential_adapter_gate, reads, given["attention_mask"])
    delta = torch.relu(reads @ child.down.weight.T + child.down.bias) @ child.up.weight.T + child.up.bias
    torch.testing.assert_close(spy[norm][0], sums[0] + gate[:, None, None] * delta, atol=2e-5, rtol=1e-4)


def _attention(module, x, keys, values, allowed):
    """Softmax attention of projections of x (n, d) over keys and values (H, k, p), for queries (H, n, p)."""
    weights = torch.softmax((x @ keys.transpose(1, 2)) / x.shape[-1] ** 0.5 + allowed, dim=-1)
    return weights @ values


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_prefix_is_scaled_by_its_gate_sample_by_sample_or_query_by_query(family):
    """What the attention function gives, against a loop over samples (an encoder) or queries (a causal stack)."""
    adapted, given = attached(family), inputs(family, 1)
    module = adapted.host.anatomy.layers[0].attention
    heads, _, p = module.prefix.key.shape
    torch.manual_seed(0)
    n = given["input_ids"].shape[1]
    query, key, value = (torch.randn(1, heads, n, p) for _ in range(3))
    x = torch.randn(1, n, adapted.host.anatomy.d)
    causal = family == "llama"
    module.prefix_gate.seen.value = x
    if not causal:
        module.prefix_gate.tokens.mask = None
    module.num_key_value_groups = 1
    out, _ = attention.attention(module, query, key, value, None, is_causal=causal)
    values = torch.sigmoid(x[0] @ module.prefix_gate.linear.weight[0] + module.prefix_gate.linear.bias)
    for t in range(n):
        gate = values[t] if causal else values.mean()
        seen = t + 1 if causal else n
        keys = torch.cat([gate * module.prefix.key, key[0, :, :seen]], dim=1)
        vals = torch.cat([gate * module.prefix.value, value[0, :, :seen]], dim=1)
        expected = _attention(module, query[0, :, t : t + 1], keys, vals, 0.0)
        torch.testing.assert_close(out[0, t], expected[:, 0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_causal_model_does_not_see_the_tokens_to_come():
    adapted = attached("gpt2", "causal_lm")
    ids = inputs("gpt2", 1)["input_ids"]
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 50
    a, b = (adapted.model.eval()(input_ids=i).logits[:, :-1] for i in (ids, other))
    assert torch.equal(a, b)


@torch.no_grad()
def test_open_gates_give_the_three_methods_together():
    adapted = attached()
    for gate in adapted.method.gates.paths().values():
        gate.linear.weight.zero_()
        gate.linear.bias.fill_(100.0)
    parts = [dict(part) for part in adapted.method.part_configs()]
    together = peftlib.combine(*(peftlib.config(part.pop("method"), **part) for part in parts))
    plain = peftlib.attach(backbone("bert"), together, train_head=False)
    gates = adapted.method.gates.state()
    plain.method.load_state({n: t for n, t in adapted.state().items() if n not in gates})
    given = inputs("bert")
    assert torch.allclose(adapted.model(**given).logits, plain.model(**given).logits, atol=1e-6)


@pytest.mark.parametrize("reparametrize", [True, False])
def test_count_on_bert_base(reparametrize):
    adapted = peftlib.attach(backbones.shapes("bert-base-uncased"), "unipelt", reparametrize=reparametrize)
    d, stored = 768, 12 * 2 * 10 * 768
    prefix = 10 * d + (d + 1) * 512 + 24 * d * 513 if reparametrize else stored
    rest = 12 * (4 * d * 8 + 2 * d * 48 + 48 + d + 4 * (d + 1))
    assert adapted.count().method == prefix + rest
    assert adapted.count().stored - adapted.count().head == stored + rest


def test_what_cannot_be_is_refused():
    with pytest.raises(MergeError, match="unipelt has no merge: The gates depend on the input"):
        attached().merge()
    with pytest.raises(ConfigError, match="length=0"):
        peftlib.config("unipelt", length=0)
    given = inputs("bert", 1)
    mask = given["attention_mask"]
    with pytest.raises(UnsupportedError, match=r"attention mask of shape \(batch, tokens\), and got"):
        attached().model(input_ids=given["input_ids"], attention_mask=mask[:, None, None, :] * mask[:, None, :, None])


CODE = "morningmoni/UniPELT"
FACTS = Facts(
    "unipelt",
    Default("length", 10, f"{CODE}, run_glue.py: prefix_len"),
    Default("reparametrize", True, f"{CODE}, run_glue.py: mid_dim"),
    Default("hidden", 512, f"{CODE}, run_glue.py: mid_dim"),
    Default("bottleneck", 48, f"{CODE}, transformers/adapters/configuration.py, PfeifferConfig: 16 of 768"),
    Default("activation", "relu", f"{CODE}, transformers/adapters/configuration.py, PfeifferConfig"),
    Default("rank", 8, f"{CODE}, run_glue.py: lora_r"),
    Default("alpha", 8.0, f"{CODE}, lora_layers.py: a gate takes the place of alpha / r, which is 1 here"),
    Start(
        "*.sequential_adapter.down.weight",
        normal(0.02),
        f"{CODE}, adapters/modeling.py, init_bert_weights",
        {"bottleneck": 64},
    ),
    Start(
        "*.sequential_adapter.up.weight",
        normal(0.02),
        f"{CODE}, adapters/modeling.py, init_bert_weights",
        {"bottleneck": 64},
    ),
    Start("*_gate.linear.weight", normal(0.02), f"{CODE}, adapters/modeling.py, init_bert_weights"),
    Start("*_gate.linear.bias", zeros(), f"{CODE}, adapters/modeling.py, init_bert_weights"),
    Start("*.lora.A", kaiming_uniform(), f"{CODE}, lora_layers.py, reset_parameters", {"rank": 32}),
    Start("*.lora.B", zeros(), f"{CODE}, lora_layers.py, reset_parameters"),
    Trains(
        ("*.prefix.maker.*", "*.sequential_adapter.*", "*.lora.A", "*.lora.B", "*_gate.linear.*"),
        f"{CODE}, run_glue.py: the three modules and their gates",
    ),
    Count("roberta-base", 11_083_376, "its formula; the MLP's 9.9 million are not stored"),
    Count("t5-base", 32_346_372, "its formula; the code is on BERT"),
    Count("llama-7b", 154_052_736, "its formula; the code is on BERT"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
