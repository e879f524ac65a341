"""The same weights give what the library ``adapters`` computed with them, whose results ``adapters.py`` stored."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

import peftlib

FILE = Path(__file__).with_name("adapters.safetensors")
LAYERS = 2


def stored(case):
    """The tensors of a case, by their names in ``adapters``."""
    return {n.removeprefix(f"{case}."): t for n, t in load_file(FILE).items() if n.startswith(f"{case}.")}


def backbone():
    with safe_open(FILE, "pt") as file:
        config = json.loads(file.metadata()["config"])
    model = BertModel(BertConfig(**config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).eval()
    model.load_state_dict(stored("model"))
    return model


@torch.no_grad()
def states(model):
    return model(load_file(FILE)["input_ids"]).last_hidden_state


def fill(adapted, values):
    """Write the parameters of these names; every parameter that the method trains must be among them, but for norms."""
    trained = adapted.trainable()
    left = {n for n in trained if n not in values and "LayerNorm" not in n}
    assert not left, left
    with torch.no_grad():
        for name, value in values.items():
            trained[name].copy_(value)


def bottleneck(theirs, source, target):
    """The tensors of a bottleneck of ``adapters`` at ``source``, by ours at ``target``."""
    inner = {"down.weight": "adapter_down.0.weight", "down.bias": "adapter_down.0.bias"}
    inner |= {"up.weight": "adapter_up.weight", "up.bias": "adapter_up.bias"}
    return {f"{target}.{mine}": theirs[f"{source}.{name}"] for mine, name in inner.items()}


def by_layer(theirs, *places):
    """The bottlenecks of all layers; ``places`` are pairs of theirs and ours below a layer."""
    found = {}
    for layer in range(LAYERS):
        for source, target in places:
            path = f"encoder.layer.{layer}"
            found |= bottleneck(theirs, f"{path}.{source}", f"{path}.{target}")
    return found


def prefixes(theirs, heads=4, width=8):
    """Keys and values of all layers, (heads, m, width) each, from the one network that gives them in ``adapters``."""
    pool = "encoder.layer.0.attention.self.prefix_tuning.pool.prefix_tunings.one.self_prefix"
    first, second = (f"{pool}.control_trans.{number}" for number in (0, 2))
    E = theirs[f"{pool}.wte.weight"]  # (m, d)
    H = torch.tanh(E @ theirs[f"{first}.weight"].T + theirs[f"{first}.bias"])  # (m, h)
    P = H @ theirs[f"{second}.weight"].T + theirs[f"{second}.bias"]  # (m, 2 L d)
    pairs = P.view(len(E), LAYERS, 2, heads, width).permute(1, 2, 3, 0, 4)  # (L, 2, heads, m, width)
    return {
        f"encoder.layer.{layer}.attention.self.prefix.{name}": pairs[layer, number]
        for layer in range(LAYERS)
        for number, name in enumerate(("key", "value"))
    }


BEHIND_BOTH = [
    (f"{place}output.adapters.one", f"{place}output.dense.sequential_adapter") for place in ("attention.", "")
]


def sequential():
    adapted = peftlib.attach(backbone(), "sequential_adapter", bottleneck=8)
    fill(adapted, by_layer(stored("sequential"), *BEHIND_BOTH))
    return adapted


def pfeiffer():
    adapted = peftlib.attach(backbone(), "sequential_adapter", bottleneck=8, variant="pfeiffer")
    fill(adapted, by_layer(stored("pfeiffer"), ("output.adapters.one", "sequential_adapter")))
    return adapted


def parallel():
    adapted = peftlib.attach(backbone(), "parallel_adapter", bottleneck=8)
    fill(adapted, by_layer(stored("parallel"), ("output.adapters.one", "output.dense.parallel_adapter")))
    return adapted


def compacter():
    theirs = stored("compacter")
    adapted = peftlib.attach(backbone(), "compacter", bottleneck=8, divisions=4, rank=2, activation="gelu")
    rules = next(n for n in adapted.trainable() if n.endswith("rules.A"))
    # Theirs multiplies from the right, so that each of its factors is the transpose of ours.
    values = {rules: theirs["shared_parameters.one.phm_rule"].transpose(1, 2)}
    for layer in range(LAYERS):
        for place in ("attention.", ""):
            for mine, name in (("down", "adapter_down.0"), ("up", "adapter_up")):
                source = f"encoder.layer.{layer}.{place}output.adapters.one.{name}"
                target = f"encoder.layer.{layer}.{place}output.dense.compacter.{mine}"
                values[f"{target}.s"] = theirs[f"{source}.W_right"].transpose(1, 2)
                values[f"{target}.t"] = theirs[f"{source}.W_left"]
                values[f"{target}.bias"] = theirs[f"{source}.b"]
    fill(adapted, values)
    return adapted


def mam():
    theirs = stored("mam")
    adapted = peftlib.attach(backbone(), "mam_adapter", length=5, reparametrize=False, bottleneck=8)
    parallel = by_layer(theirs, ("output.adapters.one", "output.dense.parallel_adapter"))
    fill(adapted, parallel | prefixes(theirs))
    return adapted


def unipelt():
    theirs = stored("unipelt")
    adapted = peftlib.attach(
        backbone(), "unipelt", length=5, reparametrize=False, bottleneck=8, rank=4, alpha=4.0, activation="relu"
    )
    values = by_layer(theirs, ("output.adapters.one", "sequential_adapter")) | prefixes(theirs)
    for layer in range(LAYERS):
        path = f"encoder.layer.{layer}"
        gates = {
            f"{path}.attention.self.prefix_gate": f"{path}.attention.self.prefix_tuning.prefix_gates.one",
            f"{path}.sequential_adapter_gate": f"{path}.output.adapters.one.gate",
        }
        for name in ("query", "value"):
            lora = f"{path}.attention.self.{name}"
            values[f"{lora}.lora.A"] = theirs[f"{lora}.loras.one.lora_A"]
            values[f"{lora}.lora.B"] = theirs[f"{lora}.loras.one.lora_B"]
            gates[f"{lora}.lora_gate"] = f"{lora}.loras.one.gate"
        for mine, source in gates.items():
            values |= {f"{mine}.linear.{kind}": theirs[f"{source}.{kind}"] for kind in ("weight", "bias")}
    fill(adapted, values)
    return adapted


def fusion():
    theirs, sources = stored("fusion"), []
    for name in ("one", "two"):
        source = peftlib.attach(backbone(), "sequential_adapter", bottleneck=8, variant="pfeiffer", train_norms=False)
        fill(source, by_layer(theirs, (f"output.adapters.{name}", "sequential_adapter")))
        sources.append(replace(source.snapshot(), name=name))
    adapted = peftlib.attach(backbone(), "adapter_fusion", sources=sources)
    values = {}
    for layer in range(LAYERS):
        target, source = f"encoder.layer.{layer}.sequential_adapter", "output.adapter_fusion_layer.one,two"
        for mine in ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight"):
            values[f"{target}.{mine}"] = theirs[f"encoder.layer.{layer}.{source}.{mine}"]
    fill(adapted, values)
    return adapted


CASES = [sequential, pfeiffer, parallel, compacter, mam, unipelt, fusion]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_same_weights_give_the_states_of_adapters(case):
    plain, theirs = stored("plain")["output"], stored(case.__name__)["output"]
    torch.testing.assert_close(states(backbone()), plain, atol=1e-6, rtol=0)
    assert (theirs - plain).abs().max() > 0.1
    torch.testing.assert_close(states(case().model), theirs, atol=1e-6, rtol=0)
