"""Diff pruning: the gates against their definition and against chance, their price, projection, main training."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import peftlib
from peftlib.conformance.case import backbone, batch, logits, train
from peftlib.errors import ConfigError, DataError
from peftlib.mechanisms import warmup
from peftlib.methods.partial.delta_weight_masking import diff_pruning
from peftlib.methods.partial.delta_weight_masking.diff_pruning import (
    GatedDifference,
    expected_open,
    gate,
    noise_like,
    open_probability,
)
from tests.methods.facts import Count, Default, Facts, Holds, Trains, calibrated

CODE = "dguo98/DiffPruning, examples/run_glue_diffpruning.py"


def _start_of_the_gates():
    gates = GatedDifference(torch.randn(4, 3), 5.0, True, -1.5, 1.5)
    assert not gates.w.any()
    assert bool((gates.alpha == 5).all()) and gates.group.shape == () and float(gates.group.detach()) == 5


FACTS = Facts(
    "diff_pruning",
    Default("density", 0.005, "README of dguo98/DiffPruning: run_glue_mag.py --target_sparsity 0.005"),
    Default("structured", True, f"{CODE}: --per_params_alpha 1"),
    Default("penalty", 1.25e-7, f"{CODE}: --sparsity_pen 0.000000125"),
    Default("low", -1.5, f"{CODE}: --concrete_lower"),
    Default("high", 1.5, f"{CODE}: --concrete_upper"),
    Default("alpha", 5.0, f"{CODE}: --alpha_init"),
    Default("gate_rate", 0.1, f"{CODE}: alpha_optimizer = AdamW(alpha_params, lr=0.1)"),
    Default("epochs", 3.0, f"{CODE}: --num_train_epochs"),
    Default("first_rate", 5e-5, f"{CODE}: --learning_rate (README for BERT-large: 1e-5)"),
    Holds("w starts at zero and alpha at 5", _start_of_the_gates, f"{CODE}: p1 and alpha of each parameter"),
    Trains(
        ("*.parametrizations.*.0.values",),
        "dguo98/DiffPruning, run_glue_fixmask_finetune.py",
        attach=calibrated("diff_pruning", density=0.05),
    ),
    Count("roberta-base", int(0.005 * 124_055_040), "0.5 % of the parameters below the head"),
    Count("bert-large-uncased", int(0.005 * 335_141_888), "README of the repository: 0.5 %", percent="0.5"),
    Count("t5-base", int(0.005 * 222_903_552), "0.5 % of the parameters"),
    Count("llama-7b", int(0.005 * 6_607_343_616), "0.5 % of the parameters below the output map"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()


LOW, HIGH, DRAWS = -0.4, 1.3, 20_000


def halves(family: str = "bert") -> list[dict]:
    data = batch(family)
    return [{k: v[i : i + 4] for k, v in data.items()} for i in (0, 4)]


def attached(family: str = "bert", **options) -> peftlib.Adapted:
    adapted = peftlib.attach(backbone(family), "diff_pruning", **{"density": 0.05, **options})
    adapted.calibrate(halves(family))
    return adapted


def literal(structured: bool, steps: int, seed: int, rate: float, gate_rate: float, price: float) -> dict:
    """The warm-up training written out: the difference of each tensor with its gates at u = 1/2, by name."""
    model, low, high = backbone("bert").train(), -1.5, 1.5
    names = [n for n, _ in model.named_parameters() if n.startswith("bert")]
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    w = {n: torch.zeros_like(start[n]) for n in names}
    alpha = {n: torch.full_like(start[n], 5.0) for n in names}
    group = {n: torch.tensor(5.0) for n in names} if structured else {}
    head = [p for n, p in model.named_parameters() if n not in names]
    learned, gates = [*w.values(), *head], [*alpha.values(), *group.values()]
    for t in (*learned, *gates):
        t.requires_grad_(True)
    optimizer = torch.optim.AdamW([{"params": learned, "lr": rate}, {"params": gates, "lr": gate_rate}], weight_decay=0)
    base = [g["lr"] for g in optimizer.param_groups]
    torch.manual_seed(seed)
    for step in range(steps):
        for g, r in zip(optimizer.param_groups, base):
            g["lr"] = r * min(step + 1, (steps - step) / (steps - 1))
        loss, difference = 0, {}
        for n in names:
            total = w[n]
            for a in (alpha[n], group.get(n)):
                if a is not None:
                    u = torch.rand_like(a).clamp(1e-4, 1 - 1e-4)
                    s = torch.sigmoid(u.log() - (1 - u).log() + a)
                    total = total * (s * (high - low) + low).clamp(0, 1)
            difference[n] = total
            opened = torch.sigmoid(alpha[n]).sum()  # log(-l / r) is 0
            loss = loss + price * opened * (torch.sigmoid(group[n]) if structured else 1)
        with torch.no_grad():
            for n in names:
                model.get_parameter(n).copy_(start[n] + difference[n])
        model.zero_grad()
        output = model(**halves()[step % 2]).loss
        output.backward()
        grads = [model.get_parameter(n).grad for n in names]
        for t in (*learned[: len(names)], *gates):
            t.grad = None
        (sum((d * g).sum() for d, g in zip(difference.values(), grads)) + loss).backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        torch.nn.utils.clip_grad_norm_(gates, 1.0)
        optimizer.step()
    with torch.no_grad():
        return {
            n: w[n]
            * (torch.sigmoid(alpha[n]) * 3 - 1.5).clamp(0, 1)
            * ((torch.sigmoid(group[n]) * 3 - 1.5).clamp(0, 1) if structured else 1)
            for n in names
        }


def draws(alpha: torch.Tensor) -> torch.Tensor:
    return gate(alpha, noise_like(alpha.expand(DRAWS, *alpha.shape)), LOW, HIGH)


@pytest.fixture
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.usefixtures("seeded")
def test_expected_number_of_open_gates_is_what_many_draws_give():
    alpha = torch.linspace(-4, 4, 9)
    z = draws(alpha)
    assert float(z.min()) == 0 and float(z.max()) == 1
    opened = (z > 0).float()
    error = (opened.mean(0) - open_probability(alpha, LOW, HIGH)).abs()
    assert (error < 4 * opened.std(0) / DRAWS**0.5 + 2e-4).all()  # u keeps 1e-4 away from its ends
    count = opened.sum(1)
    expected = float(expected_open(alpha, None, LOW, HIGH))
    assert abs(float(count.mean()) - expected) < 4 * float(count.std()) / DRAWS**0.5


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("group", [-1.5, 0.0, 3.0])
def test_with_a_gate_of_the_whole_tensor_both_must_be_open(group):
    alpha, group = torch.linspace(-3, 3, 8).reshape(2, 4), torch.tensor(group)
    count = (draws(alpha) * draws(group)[:, None, None] > 0).float().sum((1, 2))
    expected = float(expected_open(alpha, group, LOW, HIGH))
    assert abs(float(count.mean()) - expected) < 4 * float(count.std()) / DRAWS**0.5
    assert expected < 0.99 * float(expected_open(alpha, None, LOW, HIGH))


def test_a_gate_is_its_formula_and_has_its_gradient_where_it_is_neither_open_nor_closed():
    alpha = torch.tensor([-5.0, -0.5, 0.7, 5.0], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([0.0, 0.3, -0.2, 0.0], dtype=torch.float64)
    z = gate(alpha, noise, LOW, HIGH)
    s = 1 / (1 + (-(alpha + noise)).exp())
    assert torch.allclose(z, (s * 1.7 - 0.4).clamp(0, 1), atol=1e-12)
    z.sum().backward()
    inside = (s * 1.7 - 0.4 > 0) & (s * 1.7 - 0.4 < 1)
    assert inside.tolist() == [False, True, True, False]
    assert torch.allclose(alpha.grad, torch.where(inside, 1.7 * s * (1 - s), 0.0), atol=1e-12)


@pytest.mark.parametrize("structured", [False, True])
def test_the_warmup_training_is_the_papers_and_the_projection_keeps_its_largest_part(structured):
    options = {"structured": structured, "first_rate": 1e-3, "gate_rate": 2.0, "penalty": 1e-3}
    adapted = attached(**options, steps=4)
    expected = literal(structured, 4, adapted.method.seed, 1e-3, 2.0, 1e-3)
    sizes = torch.cat([d.abs().flatten() for d in expected.values()])
    k = int(0.05 * sizes.numel())
    assert adapted.count().method == k
    assert float((sizes == 0).float().mean()) > 0.01, "no gate has closed"
    smallest = float(sizes.sort(descending=True).values[k - 1])
    plain, found = backbone("bert"), 0
    for name, child in adapted.method.children.items():
        now = child.values.detach() - plain.get_parameter(name).flatten()[child.indices.long()]
        wanted = expected[name].flatten()[child.indices.long()]
        torch.testing.assert_close(now, wanted, rtol=1e-3, atol=1e-6)
        found += int((wanted.abs() >= smallest * (1 - 1e-3)).sum())
    assert found == k


@pytest.mark.parametrize("structured", [False, True])
def test_the_price_closes_gates(structured, monkeypatch):
    """With a high price fewer gates are expected to be open at the end of the warm-up training."""
    seen, counted = [], diff_pruning.expected_open

    def watched(*args):
        seen.append(float(counted(*args).detach()))
        return counted(*args)

    monkeypatch.setattr(diff_pruning, "expected_open", watched)
    ends = []
    for price in (0.0, 1e-2):
        seen.clear()
        adapted = attached(structured=structured, penalty=price, epochs=4, gate_rate=1.0)
        ends.append(sum(seen[-len(adapted.method.candidates) :]))
    assert ends[1] < 0.7 * ends[0]


def test_the_head_trains_through_and_is_not_priced(monkeypatch):
    groups, run = [], warmup.train

    def watched(model, given, *args, **more):
        groups.extend(given)
        return run(model, given, *args, **more)

    monkeypatch.setattr(warmup, "train", watched)
    adapted = attached(first_rate=1e-2)
    learned, gates = (list(g["params"]) for g in groups)
    assert [p for p in learned if any(p is h for h in adapted.model.classifier.parameters())]
    assert len(gates) == 2 * len(adapted.method.candidates)
    head = adapted.model.classifier.weight
    assert not torch.equal(head, backbone("bert").classifier.weight)
    assert torch.equal(adapted.detach().classifier.weight, backbone("bert").classifier.weight)


def test_the_main_training_holds_the_mask_with_states_for_k_values():
    adapted, plain = attached(), backbone("bert")
    logits(adapted.model, **batch("bert"))
    count = adapted.count()
    outside = {n: ~c.owned for n, c in adapted.method.children.items()}
    optimizer = torch.optim.AdamW(adapted.trainable().values(), lr=0.1, weight_decay=0.5)
    adapted.model.train()
    with adapted.lifecycle(3) as life:
        for _ in range(3):
            life.step_start()
            adapted.model(**batch("bert")).loss.backward()
            life.gradients()
            optimizer.step()
            optimizer.zero_grad()
            life.step_end()
    assert sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.dim()) == 2 * count.trained
    logits(adapted.model, **batch("bert"))
    for name, parameter in adapted.method.candidates.items():
        changed = parameter != plain.get_parameter(name)
        assert not (changed & outside.get(name, torch.ones_like(changed))).any()


def test_the_file_holds_k_values_and_trains_on_after_loading(tmp_path):
    adapted = attached(density=0.01)
    train(adapted, batch("bert"))
    folder, count = adapted.save(tmp_path / "diff"), adapted.count()
    tensors = load_file(folder / "adapter.safetensors")
    assert sum(t.numel() for n, t in tensors.items() if n.endswith(".values")) == count.method
    assert sum(t.numel() * t.element_size() for t in tensors.values()) <= 8 * count.method + 4 * count.head
    loaded = peftlib.load(backbone("bert"), folder)
    assert train(loaded, batch("bert")) == train(adapted, batch("bert"))


def test_bad_settings_and_data():
    bad = ({"density": 0}, {"penalty": -1}, {"low": 0.0}, {"high": 1.0}, {"epochs": 0}, {"steps": 0}, {"gate_rate": 0})
    for options in bad:
        with pytest.raises(ConfigError, match=next(iter(options))):
            attached(**options)
    with pytest.raises(DataError, match="warm-up training is not finite"):
        attached(first_rate=1e30)
