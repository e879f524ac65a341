"""Gates under a budget, and the bi-level search that trains them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from peftlib.errors import DataError, StateError
from peftlib.mechanisms.structure import Gates, Search, fitting, gate_gradient, halves
from tests.methods.helpers import slow_clock

SIZES = [3, 100, 7, 7, 64, 1]


def gates(alpha, budget=40.0, beta=1.0):
    made = Gates(SIZES, budget, beta, torch.device("cpu"))
    with torch.no_grad():
        made.alpha.copy_(torch.as_tensor(alpha))
    return made


@pytest.mark.parametrize("budget", [0.5, 40.0, 181.0])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_the_expected_size_is_the_budget_whatever_alpha_is(budget, spread, beta):
    torch.manual_seed(0)
    made = gates(spread * torch.randn(6) + 5, budget, beta)
    p = made.probabilities().detach().double()
    assert float(p @ torch.tensor(SIZES).double()) == pytest.approx(budget, rel=1e-4)
    assert (p[made.alpha.argsort()].diff() >= 0).all()


def test_what_one_gate_gains_in_the_gradient_the_others_lose():
    made = gates([0.3, -1.0, 0.5, 0.0, 0.2, 2.0])
    p = made.probabilities()
    slope = (p * (1 - p)).detach()
    (gradient,) = torch.autograd.grad(p[2], made.alpha)
    expected = -slope * p[2].detach() / p.sum().detach()
    expected[2] += slope[2]
    torch.testing.assert_close(gradient, expected)


def test_a_gate_is_more_than_half_open_with_probability_p():
    made = gates([0.3, -1.0, 0.5, 0.0, 0.2, 2.0])
    p = made.probabilities().detach()
    for by in (0.001, -0.001):
        made.draw(1 - p + by)
        assert ((made.values > 0.5) == (by > 0)).all()


def test_what_fits_is_taken_in_order():
    assert fitting([1, 0, 4, 2, 3, 5], SIZES, 80) == [0, 2, 4, 5]
    assert fitting(range(6), SIZES, 2) == [5]
    assert fitting(range(6), SIZES, 0) == []


def test_the_gradient_of_a_gate_is_that_of_the_step_ahead():
    """Against the derivative of the whole step, by autograd, for plain gradient descent."""
    torch.manual_seed(0)
    alpha, w = (nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (2, 3))
    mix = torch.randn(2, 3, dtype=torch.float64)

    def loss(w, alpha):
        return ((alpha @ mix) * w - 1).square().sum() + (w[0] * alpha[1]).sin()

    def other(w, alpha):
        return ((alpha @ mix) * w + 0.5).pow(4).sum() * 0.1 + alpha.square().sum()

    optimizer = torch.optim.SGD([w], lr=0.05)
    start = w.detach().clone()
    found = gate_gradient(alpha, [w], optimizer, lambda: loss(w, alpha), lambda: other(w, alpha))
    assert torch.equal(w, start)
    (gradient,) = torch.autograd.grad(loss(w, alpha), w, create_graph=True)
    (exact,) = torch.autograd.grad(other(w - 0.05 * gradient, alpha), alpha)
    (first_order,) = torch.autograd.grad(other((w - 0.05 * gradient).detach(), alpha), alpha)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)
    assert (first_order - exact).norm() > 0.05 * exact.norm(), "the second-order term is too small to be seen"


def test_an_optimizer_with_a_memory_is_as_it_was():
    torch.manual_seed(0)
    alpha, w = (nn.Parameter(torch.randn(2)) for _ in range(2))
    optimizer = torch.optim.AdamW([w], lr=0.1)
    (alpha.detach() * w).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = [t.clone() for t in (w.detach(), *optimizer.state[w].values())]
    gate_gradient(alpha, [w], optimizer, lambda: (alpha * w - 1).square().sum(), lambda: (alpha * w).sum())
    assert all(torch.equal(a, b) for a, b in zip((w.detach(), *optimizer.state[w].values()), before))


class Sum(nn.Module):
    """Candidates z_i w_i x_i of which only the third can explain the labels."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(6))
        self.gates = Gates([1] * 6, 1.5, 1.0, torch.device("cpu"))

    def forward(self, x, labels):
        return SimpleNamespace(loss=((self.gates.values * self.w * x).sum(-1) - labels).square().mean())


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    xs = torch.randn(4, 16, 6, generator=generator)
    return [{"x": x, "labels": 2 * x[:, 2]} for x in xs]


def search(model, **options):
    return Search(model, model.gates, [model.w], **({"steps": 40, "rate": 0.1, "gate_rate": 0.1, "seed": 0} | options))


@pytest.mark.parametrize("order", [1, 2])
def test_the_search_finds_the_candidate_that_matters(order):
    model = Sum()
    search(model, order=order).run(rows())
    p = model.gates.probabilities().detach()
    assert int(p.argmax()) == 2
    assert float(p[2]) > 2 * float(p[[0, 1, 3, 4, 5]].max())
    assert float(p.sum()) == pytest.approx(1.5, rel=1e-4)


@pytest.mark.parametrize(("order", "passes"), [(1, 2), (2, 5)])
def test_what_a_step_costs(order, passes, monkeypatch):
    model, given = Sum(), []
    monkeypatch.setattr(model, "forward", lambda **batch: given.append(batch) or Sum.forward(model, **batch))
    search(model, steps=3, order=order).run(rows())
    assert len(given) == 3 * passes


def test_a_step_of_first_order_goes_down_the_loss_of_the_other_half():
    model, data = Sum(), rows()[:2]
    nn.init.normal_(model.w, generator=torch.Generator().manual_seed(1))
    model.gates.draw(torch.rand(2, 6, generator=torch.Generator().manual_seed(0))[0])
    losses = [model(**batch).loss for batch in data]
    own, other = (torch.autograd.grad(loss, model.gates.alpha, retain_graph=True)[0] for loss in losses)
    search(model, steps=1, order=1, gate_rate=0.1).run(data)
    torch.testing.assert_close(model.gates.alpha.detach(), -0.1 * other.sign(), rtol=1e-4, atol=0)
    assert (own.sign() != other.sign()).any()


def test_a_search_that_was_cut_off_goes_on_to_the_same_end(tmp_path, monkeypatch):
    whole, cut = Sum(), Sum()
    search(whole).run(rows())
    true_step = Search._step

    def step(self, number, *rest):
        if number == 27:
            raise KeyboardInterrupt
        return true_step(self, number, *rest)

    monkeypatch.setattr(Search, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        search(cut, checkpoint=tmp_path / "new" / "search", every=0).run(rows())
    assert not torch.equal(cut.gates.alpha, whole.gates.alpha)
    done = []

    def counted(self, number, *rest):
        done.append(number)
        return true_step(self, number, *rest)

    monkeypatch.setattr(Search, "_step", counted)
    again = Sum()
    search(again, checkpoint=tmp_path / "new" / "search").run(rows())
    assert done == list(range(27, 40))
    assert torch.equal(again.gates.alpha, whole.gates.alpha) and torch.equal(again.w, whole.w)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["search"]
    finished = Sum()
    search(finished, checkpoint=tmp_path / "new" / "search").run(rows())
    assert torch.equal(finished.gates.alpha, whole.gates.alpha) and len(done) == 13


def test_the_state_is_written_when_so_much_time_has_passed_and_at_the_end(tmp_path, monkeypatch):
    written = []
    slow_clock(monkeypatch, seconds=1)
    monkeypatch.setattr(Search, "_write", lambda self, step, optimizers: written.append(step))
    search(Sum(), steps=10, checkpoint=tmp_path / "search", every=3).run(rows())
    # The clock is read at the start, once a step, and once more where the state is written.
    assert written == [3, 6, 9, 10]


@pytest.mark.parametrize("change", [{"seed": 1}, {"rate": 0.2}, {"data": 1}])
def test_the_state_of_another_search_is_refused(tmp_path, change):
    file = tmp_path / "search"
    search(Sum(), steps=10, checkpoint=file).run(rows())
    options = {"steps": 10, "checkpoint": file} | {k: v for k, v in change.items() if k != "data"}
    with pytest.raises(StateError, match="another search"):
        search(Sum(), **options).run(rows(change.get("data", 0)))
    file.write_bytes(b"not a file of tensors")
    with pytest.raises(StateError, match="not a search's state"):
        search(Sum(), **options).run(rows())


def test_smaller_batches_are_cut_before_they_are_dealt_out(monkeypatch):
    model, given = Sum(), []
    monkeypatch.setattr(model, "forward", lambda **batch: given.append(batch) or Sum.forward(model, **batch))
    search(model, steps=2, order=1, batch_size=6).run(rows())
    pieces = [x for batch in rows() for x in batch["x"].split(6)]
    assert [len(piece) for piece in pieces[:3]] == [6, 6, 4]
    # Alpha on the second and the fourth piece, the weights on the first and the third.
    assert all(torch.equal(batch["x"], pieces[i]) for batch, i in zip(given, (1, 0, 3, 2), strict=True))


def test_halves_are_apart_and_need_two_rows():
    batches = rows()
    own, other = halves(batches, 3)
    assert [id(b) for b in own] == [id(batches[0]), id(batches[2])] and [id(b) for b in other] == [id(batches[1])]
    (own,), (other,) = halves(batches[:1], 10)
    assert torch.equal(torch.cat([own["x"], other["x"]]), batches[0]["x"]) and len(own["x"]) == 8
    with pytest.raises(DataError, match="two halves of data"):
        halves([{"x": torch.zeros(1, 6)}], 10)
    with pytest.raises(DataError, match="0 rows"):
        halves([], 10)


def test_a_loss_that_is_not_finite_is_named():
    model = Sum()
    with pytest.raises(DataError, match="loss is not finite"):
        search(model).run([{"x": b["x"], "labels": b["labels"] * float("nan")} for b in rows()])
