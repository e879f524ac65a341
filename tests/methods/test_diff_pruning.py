"""Diff pruning: the gates' price, the projection, the second phase."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import peftlib
from peftlib.conformance.case import backbone, batch, logits, train
from peftlib.errors import ConfigError, DataError
from peftlib.mechanisms import hard_concrete, warmup


def halves(family: str = "bert") -> list[dict]:
    data = batch(family)
    return [{k: v[i : i + 4] for k, v in data.items()} for i in (0, 4)]


def attached(family: str = "bert", **options) -> peftlib.Adapted:
    adapted = peftlib.attach(backbone(family), "diff_pruning", **{"density": 0.05, **options})
    adapted.calibrate(halves(family))
    return adapted


def literal(structured: bool, steps: int, seed: int, rate: float, gate_rate: float, price: float) -> dict:
    """The first phase written out: the difference of each tensor with its gates at u = 1/2, by name."""
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


@pytest.mark.parametrize("structured", [False, True])
def test_the_first_phase_is_the_papers_and_the_projection_keeps_its_largest_part(structured):
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
    """With a high price fewer gates are expected to be open at the end of the first phase."""
    seen, counted = [], hard_concrete.expected_open

    def watched(*args):
        seen.append(float(counted(*args).detach()))
        return counted(*args)

    monkeypatch.setattr(hard_concrete, "expected_open", watched)
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


def test_the_second_phase_holds_the_mask_with_states_for_k_values():
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
    with pytest.raises(DataError, match="not finite"):
        attached(first_rate=1e30)
