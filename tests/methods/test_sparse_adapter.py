"""SparseAdapter: which entries each score keeps, on each kind of module, and that only they live on."""

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

import peftlib
from peftlib import backbones
from peftlib.conformance.case import Case, backbone, batch, inputs, logits, train
from peftlib.conformance.checks import CHECKS
from peftlib.errors import LoadError, MergeError, StateError, TargetError, UnknownNameError
from peftlib.mechanisms import pruned
from peftlib.methods.base import ConfigError
from tests.methods.facts import Count, Default, Facts, Start, Trains, normal, ones, zeros
from tests.methods.helpers import Spy, linear, perturb

LAYER = "Shwai-He/SparseAdapter, petl/petl_factory.py, Adapter_Layer"
PLACE = "Shwai-He/SparseAdapter, src/transformers/models/roberta/modeling_roberta.py"
ROOT = "*.sequential_adapter"

FACTS = Facts(
    "sparse_adapter",
    Start(f"{ROOT}.down.weight", normal(0.02), f"{LAYER}, init_bert_weights"),
    Start(f"{ROOT}.up.weight", normal(0.02), f"{LAYER}, init_bert_weights"),
    Start(f"{ROOT}.*.bias", zeros(), f"{LAYER}, init_bert_weights"),
    Start(f"{ROOT}.norm.weight", ones(), f"{LAYER}, adapter_layer_norm_before"),
    Start("*.lora.A", normal(0.02), "petl/petl_factory.py, Linear: lora_init='bert'", {"form": "lora", "rank": 4}),
    Start("*.lora.B", normal(0.02), "petl/petl_factory.py, Linear: lora_init='bert'", {"form": "lora", "rank": 4}),
    Trains(
        tuple(
            f"*.{block}.sequential_adapter.{part}"
            for block in ("attention.output.dense", "*.output.dense")
            for part in ("down.*", "up.*", "norm.*")
        ),
        f"{PLACE}: ef_attn_adapter and ef_ffn_adapter; --unfreeze_params ef_",
    ),
    Trains(
        ("*.prefix.*", "*.parallel_adapter.*"),
        "src/transformers/pruning/generator.py, prunable: adapters and LoRA; the prefix trains as it is",
        {"form": "mam", "length": 4, "hidden": 8},
    ),
    Default("score", "snip", "arXiv:2210.04284, abstract: a proper method, such as SNIP"),
    Default("density", 0.6, "arXiv:2210.04284, abstract: a proper ratio, such as 40 % pruned"),
    Default("scope", "global", "petl/options.py, PruneArguments: mask_scope"),
    Default("rows", 320, "src/transformers/trainer_sparse.py, get_prune_dataloader: length * 32, length = 10"),
    Default("bottleneck", 64, "examples/pytorch/text-classification/run_glue.sh: attn_bn=64, ffn_bn=64"),
    Default("activation", "relu", LAYER),
    Default("norm", True, f"{LAYER}: adapter_layernorm_option='in'"),
    Default("dropout", 0.1, f"{PLACE}: dropout=config.hidden_dropout_prob, 0.1 of RoBERTa"),
    Default("alpha", 32.0, "petl/options.py, TuneArguments: lora_alpha"),
    Default("hidden", 800, "petl/options.py, TuneArguments: mid_dim"),
    Default("scale", 1.0, "petl/options.py, TuneArguments: ffn_adapter_scalar"),
    Count("roberta-base", int(0.6 * 48 * 768 * 64) + 24 * (64 + 3 * 768), "60 % of the matrices, biases and norms"),
    Count("t5-base", int(0.6 * 96 * 768 * 64) + 48 * (64 + 3 * 768), "60 % of the matrices, biases and norms"),
    Count("llama-7b", int(0.6 * 128 * 4096 * 64) + 64 * (64 + 3 * 4096), "60 % of the matrices, biases and norms"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()


FORMS = {
    "adapter": {"form": "adapter", "bottleneck": 6, "dropout": 0.0},
    "lora": {"form": "lora", "rank": 4, "alpha": 8.0},
    "mam": {"form": "mam", "length": 5, "hidden": 9, "bottleneck": 16, "dropout": 0.0},
}


def attached(form="adapter", family="bert", calibrate=True, **options):
    adapted = peftlib.attach(backbone(family), "sparse_adapter", **(FORMS[form] | {"density": 0.3} | options))
    if calibrate:
        adapted.calibrate([batch(family)])
    return adapted


def kept(adapted):
    return {(name, int(i)) for name, child in adapted.method.children.items() for i in child.indices}


def largest(scores, k):
    """The k largest entries of {name: scores}, by a plain sort; among equals the first."""
    places = [(n, i) for n, s in scores.items() for i in range(s.numel())]
    order = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True, stable=True).indices[:k]
    return {places[int(i)] for i in order}


def gradients(adapted):
    parameters = adapted.method.candidates
    loss = adapted.model.eval()(**batch("bert")).loss
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_adapter_reads_its_own_norm_of_the_blocks_output(family):
    """The authors' Adapter_Layer, written out in float64: h + W_up relu(W_down LN(h) + b_down) + b_up."""
    adapted = peftlib.attach(backbone(family), "sparse_adapter", **FORMS["adapter"])
    perturb(adapted)
    adapted.model.double()
    for layer in adapted.host.anatomy.layers:
        for name in ("attention.output", "ffn.down"):
            site = layer.sites[name]
            child, spy = site.module.sequential_adapter, Spy(site.module)
            adapted.model.eval()(**inputs(family))
            x, y = spy[site.module]
            h = linear(site, x)
            centred = h - h.mean(-1, keepdim=True)
            normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * child.norm.weight
            inner = ((normed + child.norm.bias) @ child.down.weight.T + child.down.bias).clamp(min=0)
            torch.testing.assert_close(y, h + inner @ child.up.weight.T + child.up.bias)


def test_without_the_norm_there_is_none():
    adapted = attached(norm=False, calibrate=False)
    assert not [n for n in adapted.trainable() if "norm" in n]


def test_it_scores_the_first_rows():
    adapted, seen = attached(calibrate=False, rows=11), []
    adapted.method.keep = lambda _: None
    adapted.method.scores = lambda batches: (
        seen.extend(batches) or [p.abs() for p in adapted.method.candidates.values()]
    )
    adapted.calibrate([batch("bert")] * 4)
    assert [len(b["labels"]) for b in seen] == [8, 3]
    assert torch.equal(seen[1]["input_ids"], batch("bert")["input_ids"][:3])
    with pytest.raises(ConfigError, match="rows"):
        peftlib.config("sparse_adapter", rows=0)


def test_the_prefix_of_the_mam_form_is_not_pruned_and_stored_without_its_mlp(tmp_path):
    adapted = attached("mam", density=0.02)
    prefixes = [c for c in adapted.host.paths().values() if hasattr(c, "pair")]
    assert all((t != 0).all() for c in prefixes for t in c.pair())
    assert {n.rpartition(".parallel_adapter.")[2] for n in adapted.method.candidates} == {"down.weight", "up.weight"}
    trained = sum(p.numel() for n, p in adapted.trainable().items() if ".prefix." in n)
    assert trained == 5 * 32 + 33 * 9 + 2 * 2 * 32 * 10  # embeddings, and an MLP of 9 units for two layers
    train(adapted, batch("bert"))
    tensors = load_file(adapted.save(tmp_path / "a") / "adapter.safetensors")
    stored = {n: t.numel() for n, t in tensors.items() if ".prefix." in n}
    assert {n.rpartition(".")[2] for n in stored} == {"key", "value"}
    assert sum(stored.values()) == 2 * 2 * 5 * 32


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("score", ["snip", "magnitude"])
def test_snip_and_magnitude_keep_the_largest_of_a_plain_loop(score, form):
    before = attached(form, calibrate=False)
    scores = {n: p.detach().abs() for n, p in before.method.candidates.items()}
    if score == "snip":
        scores = {n: scores[n] * slope.abs() for n, slope in gradients(before).items()}
    adapted = attached(form, score=score)
    assert len(kept(adapted) ^ largest(scores, adapted.method.k)) <= 2, "beyond rounding"


def test_grasp_is_the_weight_times_the_hessian_along_the_gradient():
    """The directional derivative of the gradient, by differences in float64, against the score."""
    adapted = attached(calibrate=False, score="grasp")
    adapted.model.double()
    scores = adapted.method.scores([batch("bert")])
    slopes, parameters = gradients(adapted), adapted.method.candidates
    ends = []
    for step in (1e-4, -1e-4):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(slopes[name], alpha=step)
        ends.append(gradients(adapted))
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(slopes[name], alpha=-step)
    for (name, parameter), score in zip(parameters.items(), scores):
        expected = parameter.detach() * (ends[0][name] - ends[1][name]) / 2e-4
        torch.testing.assert_close(score, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("form", ["adapter", "lora"])
def test_synflow_is_the_gradient_of_what_the_absolute_product_makes_of_ones(form):
    adapted = attached(form, calibrate=False, score="synflow")
    scores = dict(zip(adapted.method.candidates, adapted.method.scores([])))
    names = list(scores)
    for first, second in zip(names[::2], names[1::2]):
        a, b = (adapted.method.candidates[n].detach().abs().requires_grad_() for n in (first, second))
        (b @ a @ torch.ones(a.shape[1])).sum().backward()
        torch.testing.assert_close(scores[first], a.detach() * a.grad)
        torch.testing.assert_close(scores[second], b.detach() * b.grad)


def test_a_drawn_mask_follows_the_seed():
    masks = []
    for seed in (1, 1, 2):
        adapted = peftlib.attach(backbone("bert"), "sparse_adapter", score="random", bottleneck=6, seed=seed)
        adapted.calibrate([batch("bert")])
        masks.append(kept(adapted))
    assert masks[0] == masks[1] != masks[2]


def test_a_zero_start_would_leave_snip_without_scores():
    adapted = attached(calibrate=False)
    with torch.no_grad():
        for name, parameter in adapted.method.candidates.items():
            if name.endswith("up.weight"):
                parameter.zero_()
    assert all(float(s.abs().max()) == 0 for s in adapted.method.scores([batch("bert")]))
    assert all(float(s.abs().max()) > 0 for s in attached(calibrate=False).method.scores([batch("bert")]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scope", ["global", "local"])
def test_the_budget_is_met_to_the_entry(scope, form):
    adapted = attached(form, scope=scope, calibrate=False)
    entries = {n: p.numel() for n, p in adapted.method.candidates.items()}
    before = adapted.count()
    adapted.calibrate([batch("bert")])
    if scope == "local":
        assert {n: len(c.values) for n, c in adapted.method.children.items()} == {
            n: int(0.3 * size) for n, size in entries.items()
        }
    assert sum(len(c.values) for c in adapted.method.children.values()) == adapted.method.k
    assert before.trained == adapted.count().trained == sum(p.numel() for p in adapted.trainable().values())
    assert before.stored_bytes >= adapted.count().stored_bytes


def test_large_sparse_costs_what_the_dense_adapter_costs():
    def method(**options):
        return peftlib.attach(backbones.shapes("roberta-base"), "sparse_adapter", **options).count().method

    biases = 12 * 2 * 3 * 768  # of W_up, and the norms
    dense = method(bottleneck=64, density=1.0) - 12 * 2 * 64
    for width in (128, 256):
        assert method(bottleneck=width, density=64 / width) - 12 * 2 * width == dense == 12 * 4 * 768 * 64 + biases


@pytest.mark.parametrize("form", FORMS)
def test_dropped_entries_are_zero_for_good_and_the_file_holds_the_others(form, tmp_path):
    adapted = attached(form, density=0.02)
    train(adapted, batch("bert"), weight_decay=0.1)
    paths = {id(c): path for path, c in adapted.host.paths().items()}
    for child in adapted.method.children.values():
        module, _, name = paths[id(child)].rpartition(".parametrizations.")
        weight = getattr(adapted.model.get_submodule(module), name.split(".")[0]).detach()
        assert torch.equal(weight != 0, child.owned)
    folder = adapted.save(tmp_path / "a")
    tensors = load_file(folder / "adapter.safetensors")
    k = adapted.method.k
    assert sum(t.numel() for n, t in tensors.items() if n.endswith(".values")) == k
    dense = sum(4 * t.numel() for n, t in tensors.items() if not n.endswith((".values", ".indices", ".bits")))
    assert sum(t.numel() * t.element_size() for t in tensors.values()) <= 8 * k + dense
    loaded = peftlib.load(backbone("bert"), folder)
    assert kept(loaded) == kept(adapted)
    assert torch.equal(logits(loaded.model, **inputs("bert")), logits(adapted.model, **inputs("bert")))
    if form != "mam":  # a loaded prefix trains on without its MLP
        assert train(loaded, batch("bert")) == train(adapted, batch("bert"))


def test_a_file_that_does_not_fit_is_refused():
    state = attached().state()
    with pytest.raises(LoadError, match="missing"):
        attached(calibrate=False).method.load_state({n: t for n, t in state.items() if not n.endswith("up.bias")})
    head = [n for n in state if "classifier" in n]
    with pytest.raises(LoadError, match="does not choose from"):
        attached(calibrate=False).method.load_state({**state, "more": state[head[0]]})


def test_the_largest_of_scores_with_signs_in_order():
    scores = [torch.tensor([[-3.0, 2.0], [0.0, 2.0]]), torch.tensor([2.0, -1.0])]
    assert [i.tolist() for i in pruned.largest(scores, 3)] == [[1, 3], [0]]
    assert [i.tolist() for i in pruned.largest(scores, 5)] == [[1, 2, 3], [0, 1]]
    assert [i.tolist() for i in pruned.largest(scores, 1)] == [[1], []]


@dataclass(frozen=True)
class FormCase(Case):
    form: str = ""

    @property
    def config(self):
        return peftlib.config("sparse_adapter", **FORMS[self.form], density=0.5)


@pytest.mark.parametrize("form", ["lora", "mam"])
@pytest.mark.parametrize("name", ["moves", "gradients", "frozen", "save_load", "detach", "deepcopy", "checkpointing"])
def test_the_other_forms_keep_the_promises_too(name, form, tmp_path):
    CHECKS[name].run(FormCase("sparse_adapter", "bert", form=form), tmp_path)


def test_the_lora_form_merges():
    adapted = attached("lora")
    train(adapted, batch("bert"))
    before = logits(adapted.model, **inputs("bert"))
    torch.testing.assert_close(logits(adapted.merge(), **inputs("bert")), before, atol=1e-5, rtol=1e-4)
    with pytest.raises(MergeError, match="sparse_adapter has no merge"):
        attached().merge()


def test_what_cannot_be_is_refused():
    with pytest.raises(StateError, match=r"adapted\.calibrate"):
        train(attached(calibrate=False), batch("bert"))
    with pytest.raises(UnknownNameError, match="score of sparse_adapter 'snap'; did you mean 'snip'"):
        peftlib.config("sparse_adapter", score="snap")
    for options in ({"density": 0.0}, {"batches": 0}, {"rank": 0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            peftlib.config("sparse_adapter", **options)
    with pytest.raises(TargetError, match="of 1,536 entries is 0"):
        attached(density=0.0001, calibrate=False)
