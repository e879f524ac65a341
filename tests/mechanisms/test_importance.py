"""Streamed scores against plain loops."""

from __future__ import annotations

import pytest
import torch

from peftlib.conformance.case import backbone, batch
from peftlib.errors import DataError, UnsupportedError
from peftlib.mechanisms import importance


def split(data: dict, size: int) -> list[dict]:
    count = len(data["labels"])
    return [{k: v[i : i + size] for k, v in data.items()} for i in range(0, count, size)]


def rows(data: dict) -> list[dict]:
    """Each row without its padding."""
    found = []
    for row in split(data, 1):
        length = int(row["attention_mask"].sum())
        found.append({k: v if v.dim() == 1 else v[:, :length] for k, v in row.items()})
    return found


def gradients(model, loss) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found)]


def assert_equal(sums, expected):
    for a, b in zip(sums, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-9 + 1e-6 * float(b.abs().max()))


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("absolute", [False, True])
def test_per_example_equals_a_loop_over_unpadded_rows(family, absolute):
    # In float64: the biases of keys have no gradient but rounding.
    model, data = backbone(family).double(), batch(family)
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for row in rows(data):
        for total, g in zip(expected, gradients(model, model(**row).loss)):
            total += g.abs() if absolute else g**2
    expected = [total.float() for total in expected]
    for size in (1, 3, 8):
        sums = importance.per_example(model, list(model.parameters()), split(data, size), 100, absolute=absolute)
        assert_equal(sums, expected)


def test_per_example_is_not_the_square_of_the_batchs_gradient():
    model, data = backbone("bert"), batch("bert")
    one = importance.per_example(model, list(model.parameters()), [data], 100)
    whole = importance.per_batch(model, list(model.parameters()), [data])
    assert any(not torch.allclose(a, b, rtol=0.1) for a, b in zip(one, whole))


def test_expected_weighs_all_classes_by_the_model():
    model, data = backbone("bert"), batch("bert")
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([1.5, -0.5]))
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for row in rows(data):
        row.pop("labels")
        probabilities = model(**row).logits.softmax(-1)[0]
        for p in probabilities:
            for total, g in zip(expected, gradients(model, -p.log())):
                total += p.detach() * g**2
    assert_equal(importance.per_example(model, list(model.parameters()), [data], 100, "expected"), expected)


@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_per_batch_is_the_mean_of_squares(max_norm):
    model, data = backbone("bert"), batch("bert")
    batches = split(data, 3)
    expected = [torch.zeros_like(p) for p in model.parameters()]
    clipped = 0
    for part in batches:
        for total, g in zip(expected, gradients(model, model(**part).loss)):
            if max_norm and g.norm() > max_norm:
                g, clipped = g * max_norm / g.norm(), clipped + 1
            total += g**2 / len(batches)
    assert clipped > 0 or max_norm is None
    assert_equal(importance.per_batch(model, list(model.parameters()), batches, max_norm=max_norm), expected)
    two = importance.per_batch(model, list(model.parameters()), batches, limit=2)
    assert_equal(two, importance.per_batch(model, list(model.parameters()), batches[:2]))


def mean_gradients(model, batches: list[dict]) -> list[torch.Tensor]:
    found = [gradients(model, model(**part).loss) for part in batches]
    return [torch.stack(each).mean(0) for each in zip(*found)]


@pytest.mark.parametrize("family", ["roberta", "llama", "t5"])
def test_signed_means_add_before_anyone_takes_the_size(family):
    model, batches = backbone(family).double(), split(batch(family), 3)
    parameters = list(model.parameters())
    signed = [g.float() for g in mean_gradients(model, batches)]
    assert_equal(importance.per_batch(model, parameters, batches, form="signed"), signed)
    one = importance.per_batch(model, parameters, batches, limit=1, form="signed")
    assert_equal(one, importance.per_batch(model, parameters, batches[:1], form="signed"))
    expected = [g.abs() for g in signed]
    sizes = torch.stack([torch.stack([g.abs().sum() for g in gradients(model, model(**b).loss)]) for b in batches])
    assert all(bool((e.sum() < s).item()) for e, s in zip(expected, sizes.mean(0)) if s > 1e-6)


def test_first_order_is_what_setting_an_entry_back_costs():
    model, batches = backbone("bert").double(), split(batch("bert"), 4)
    weight = model.bert.encoder.layer[1].output.dense.weight
    start = weight.detach().clone()
    moved = 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        weight.add_(moved)
    (scores,) = importance.first_order(model, [weight], iter(batches), starts=[start])
    (with_zeros,) = importance.first_order(model, [weight], batches)
    g = mean_gradients(model, batches)[[p is weight for p in model.parameters()].index(True)]
    assert_equal([scores, with_zeros], [(moved * g).float(), (weight * g).detach().float()])

    @torch.no_grad()
    def loss() -> float:
        return sum(float(model(**part).loss) for part in batches) / len(batches)

    before = loss()
    for group in ([(0, 0)], [(5, 7)], [(3, j) for j in range(64)]):
        rows, columns = zip(*group)
        with torch.no_grad():
            weight[rows, columns] -= moved[rows, columns]
        change = loss() - before
        assert change == pytest.approx(-float(scores[rows, columns].double().sum()), rel=0.05, abs=1e-10)
        with torch.no_grad():
            weight[rows, columns] += moved[rows, columns]


def test_reading_stops_at_the_limit():
    model, data, read = backbone("bert"), batch("bert"), []

    def stream():
        for part in split(data, 2):
            read.append(part)
            yield part

    sums = importance.per_example(model, list(model.parameters()), stream(), 3)
    assert len(read) == 2
    assert_equal(
        sums, importance.per_example(model, list(model.parameters()), [{k: v[:3] for k, v in data.items()}], 9)
    )


def test_one_gradient_lives_at_a_time_and_nothing_is_left_behind(monkeypatch):
    model, data = backbone("bert"), batch("bert")
    chosen = [p for n, p in model.named_parameters() if "layer" in n]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.classifier.weight.requires_grad_(True)
    flags = [p.requires_grad for p in model.parameters()]
    alive, add = [], importance.GradientSums._add

    def watched(self, total, parameter):
        alive.append(sum(p.grad is not None for p in model.parameters()))
        add(self, total, parameter)

    monkeypatch.setattr(importance.GradientSums, "_add", watched)
    importance.per_batch(model, chosen, split(data, 4))
    assert len(alive) == 2 * len(chosen)
    assert max(alive) == 1
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == flags
    with pytest.raises(RuntimeError):
        importance.per_batch(model, chosen, [{"input_ids": data["input_ids"], "labels": torch.full((8,), -1.0)}])
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(p._post_accumulate_grad_hooks for p in chosen)


def test_data_that_gives_no_importance_is_refused():
    model, data = backbone("bert"), batch("bert")
    parameters = list(model.parameters())
    with pytest.raises(DataError, match="empty"):
        importance.per_example(model, parameters, [], 8)
    with pytest.raises(DataError, match="no labels"):
        importance.per_batch(model, parameters, [{k: v for k, v in data.items() if k != "labels"}])
    lm = backbone("gpt2", "causal_lm")
    with pytest.raises(UnsupportedError, match="expected Fisher"):
        importance.per_example(lm, list(lm.parameters()), [batch("gpt2", "causal_lm")], 8, "expected")
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite"):
        importance.per_batch(model, parameters, [data])
