"""S3Delta: the candidates, the budget, the gates and their search, what it leaves behind, and one that was cut off."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import peftlib
from peftlib import backbones
from peftlib.conformance.case import batch, lm_head
from peftlib.errors import DataError, LoadError, MergeError, StateError, TargetError
from peftlib.mechanisms import importance
from peftlib.methods.base import ConfigError
from peftlib.methods.hybrid.automatic.s3delta.layer import Gates, LowRankLinear, Stretch
from peftlib.methods.hybrid.automatic.s3delta.method import LINEAR
from peftlib.methods.hybrid.automatic.s3delta.search import Search, fitting, gate_gradient, halves
from tests.methods.facts import Count, Default, Facts, Holds
from tests.methods.helpers import backbone, inputs, interrupt, perturb, slow_clock

SMALL = {"budget": 0.02, "steps": 1}


def attached(family="bert", head="classification", calibrate=True, seed=0, **options):
    adapted = peftlib.attach(backbone(family, head), "s3delta", seed=seed, **(SMALL | options))
    if calibrate:
        adapted.calibrate([batch(family, head)])
    return adapted


def test_candidates_of_bert_base():
    method = peftlib.attach(backbones.shapes("bert-base-uncased"), "s3delta").method
    d, f, inner = 768, 3072, 24
    adapter = 2 * (d + inner) + inner + d
    sizes = {
        "lora": sorted(12 * [*4 * [2 * d], *2 * [d + f]]),
        "bitfit": sorted(12 * [*5 * [d], f, *2 * [d]]),
        "lnfit": sorted(12 * 2 * [d]),
        "adapter": sorted(12 * 2 * [adapter]),
    }
    found = {kind: sorted(c.size for c in method.candidates if c.kind == kind) for kind in sizes}
    assert found == sizes
    assert len({c.name for c in method.candidates}) == len(method.candidates) == 12 * 18
    assert method.pending()[0] == method.budget == int(0.001 * (109_482_240))


def test_t5_has_biases_where_the_backbone_has_none_and_final_norms():
    candidates = peftlib.attach(backbones.shapes("t5-base", head="seq2seq"), "s3delta").method.candidates
    places = {(c.kind, c.name.rpartition(".")[0]) for c in candidates}
    assert ("bitfit", "encoder.block.0.layer.0.SelfAttention.q") in places
    assert {("lnfit", f"{stack}.final_layer_norm") for stack in ("encoder", "decoder")} <= places
    assert not [name for _, name in places if "EncDecAttention" in name]


@pytest.mark.parametrize("strategy", ["search", "random"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("budget", [0.002, 0.0123])
def test_the_structure_fits_the_budget_and_nothing_more_would(family, budget, strategy):
    head = "classification" if family == "bert" else lm_head(family)
    adapted = attached(family, head, budget=budget, strategy=strategy)
    method, total = adapted.method, adapted.count().total - sum(p.numel() for p in adapted.host.anatomy.head.values())
    size = adapted.count().method
    assert sum(c.size for c in method.chosen) == size <= budget * total
    left = [c.size for c in method.candidates if c not in method.chosen]
    assert min(left) > method.budget - size


def test_what_is_kept_has_the_largest_probabilities():
    method = attached(steps=3).method
    order = sorted(method.candidates, key=lambda c: -method.probabilities[c.name])
    taken, left = [], method.budget
    for candidate in order:
        if candidate.size <= left:
            taken.append(candidate)
            left -= candidate.size
    assert set(taken) == set(method.chosen)
    assert len(set(method.probabilities.values())) > 10, "the search told candidates apart"
    expected = sum(c.size * method.probabilities[c.name] for c in method.candidates)
    assert expected == pytest.approx(method.budget, rel=1e-4)


def test_closed_gates_give_the_backbone_and_open_ones_the_modules():
    adapted, given = attached(calibrate=False), inputs("bert")
    plain = adapted.model(**given).logits
    gates = Gates([1] * len(adapted.method.candidates), 1.0, 1.0, torch.device("cpu"))
    with adapted.host.temporary() as host, torch.no_grad():
        for i, candidate in enumerate(adapted.method.candidates):
            child = candidate.add(host)
            for parameter in child.parameters():
                parameter.normal_(std=0.1)
            gates.guard(i, child, LINEAR[candidate.kind])
        gates.values = torch.zeros(len(adapted.method.candidates))
        assert torch.equal(adapted.model(**given).logits, plain)
        gates.values = torch.ones(len(adapted.method.candidates))
        opened = adapted.model(**given).logits
        assert not torch.allclose(opened, plain, atol=1e-2)
        assert not adapted.trainable().keys() - set(adapted.head_names), "what is temporary is no part of the method"
    assert torch.equal(adapted.model(**given).logits, plain)


def test_a_gate_scales_what_a_candidate_adds():
    method = attached("t5", lm_head("t5"), calibrate=False).method
    gates = Gates([1], 1.0, 1.0, torch.device("cpu"))
    for kind in LINEAR:
        child = next(c for c in method.candidates if c.kind == kind).make()
        for parameter in child.parameters():
            nn.init.normal_(parameter)
        x = y = torch.randn(2, 3, method.host.anatomy.d)
        whole = child(x, y) - y
        gates.values = torch.tensor([0.3])
        gates.guard(0, child, LINEAR[kind])
        torch.testing.assert_close(child(x, y) - y, 0.3 * whole, rtol=1e-4, atol=1e-4)
        assert whole.abs().min() > 0


def test_after_the_search_all_is_as_at_the_start_but_for_the_structure():
    untouched = attached(calibrate=False)
    before = {n: t.clone() for n, t in untouched.model.state_dict().items()}
    adapted = attached(steps=2)
    after = adapted.model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    added = after.keys() - before.keys()
    assert {n.rpartition(".")[0] for n in added} <= {n for n, _ in adapted.model.named_modules()}
    assert len(added) == sum(len(list(p.parameters())) for p in adapted.host.paths().values())
    assert all(p.grad is None for p in adapted.model.parameters())


def test_a_budget_for_all_candidates_needs_no_search():
    adapted = peftlib.attach(backbone("bert"), "s3delta", budget=0.5)
    adapted.calibrate([])
    assert adapted.method.chosen == adapted.method.candidates


def test_a_search_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    slow_clock(monkeypatch)
    whole = attached(steps=6)
    calls = interrupt(monkeypatch, importance, "loss", at=28)
    cut = attached(steps=6, calibrate=False)
    with pytest.raises(KeyboardInterrupt):
        cut.calibrate([batch("bert")], checkpoint=tmp_path / "search")
    assert not cut.host.paths() and not cut.calibrated
    start = attached(calibrate=False).model.state_dict()
    assert all(torch.equal(t, start[n]) for n, t in cut.model.state_dict().items()), "the head is as it was"
    again = attached(steps=6, calibrate=False)
    again.calibrate([batch("bert")], checkpoint=tmp_path / "search")
    assert len(calls) == 28 + 5
    assert again.method.probabilities == whole.method.probabilities
    assert all(torch.equal(t, whole.state()[n]) for n, t in again.state().items())
    other = attached(steps=6, calibrate=False, seed=1)
    with pytest.raises(StateError, match="another search"):
        other.calibrate([batch("bert")], checkpoint=tmp_path / "search")


def test_random_structures_differ_by_seed_and_number():
    made = [(0, 0), (0, 0), (1, 0), (0, 1)]
    names = [{c.name for c in attached(strategy="random", seed=s, draw=n).method.chosen} for s, n in made]
    assert names[0] == names[1] != names[2] != names[3] != names[0]


def test_a_file_holds_the_structure(tmp_path):
    adapted = attached("gpt2", lm_head("gpt2"), strategy="random", seed=3)
    perturb(adapted)
    loaded = peftlib.load(backbone("gpt2", lm_head("gpt2")), adapted.save(tmp_path / "a"))
    assert {c.name for c in loaded.method.chosen} == {c.name for c in adapted.method.chosen}
    with pytest.raises(LoadError, match="none of the"):
        attached(calibrate=False).method.load_state({"bert.embeddings.weight": torch.zeros(1)})


def test_what_cannot_be_is_refused():
    with pytest.raises(TargetError, match=r"budget=1e-05 is 0 parameters .* smallest candidate has 32"):
        attached(budget=1e-5)
    with pytest.raises(ConfigError, match="kind of candidate='prefix'"):
        peftlib.config("s3delta", kinds=("lora", "prefix"))
    with pytest.raises(ConfigError, match=r"kinds=\(\) leaves no candidates"):
        peftlib.config("s3delta", kinds=())
    with pytest.raises(ConfigError, match="strategy='best'"):
        peftlib.config("s3delta", strategy="best")
    with pytest.raises(MergeError, match="s3delta has no merge"):
        attached(strategy="random").merge()


# Candidates of its own, against the same change of the module's own weights


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_a_stretch_is_a_change_of_the_norm_s_weight(family):
    norm = next(iter(peftlib.anatomy.of(backbone(family)).layers[0].norms.values()))
    torch.manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(torch.randn_like(norm.weight))
        x, stretch = torch.randn(2, 5, len(norm.weight)) * 3 + 1, Stretch(norm)
        before = norm(x)
        assert torch.equal(stretch(x, before), before)
        stretch.w.copy_(torch.randn_like(stretch.w))
        found = stretch(x, before)
        norm.weight.add_(stretch.w)
        torch.testing.assert_close(found, norm(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_low_rank_map_is_linear_and_of_its_rank():
    torch.manual_seed(0)
    linear = LowRankLinear(7, 5, rank=2)
    linear.bias.copy_(torch.randn(5))
    weight = (linear(torch.eye(7)) - linear.bias).T
    assert torch.linalg.matrix_rank(weight) == 2
    x = torch.randn(3, 7)
    torch.testing.assert_close(linear(x), torch.nn.functional.linear(x, weight, linear.bias))


# The gates under a budget, and the bi-level search that trains them


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


def test_a_bare_search_that_was_cut_off_goes_on_to_the_same_end(tmp_path, monkeypatch):
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


def _adapters_start():
    """Rank 1 of width d: W_left (d, 1), W_right (1, inner), uniform below sqrt(2) sqrt(6 / (fan_in + fan_out))."""
    torch.manual_seed(0)
    for sizes in ((400, 12), (12, 400)):
        maps = [LowRankLinear(*sizes, 1) for _ in range(20)]
        for name, n in (("A", sizes[0]), ("B", sizes[1])):
            drawn = torch.cat([getattr(m, name).detach().flatten() for m in maps])
            bound = 2**0.5 * (6 / (n + 1)) ** 0.5
            assert 0.9 * bound < drawn.abs().max() <= bound
            assert abs(float(drawn.std()) / (bound / 3**0.5) - 1) < 0.1
        assert all(m.bias.abs().max() == 0 for m in maps)
    adapter = peftlib.attach(backbone("bert"), "s3delta").method._adapter(32)
    assert adapter.up.B.abs().max() > 0
    assert peftlib.attach(backbone("bert"), "s3delta", zero_up=True).method._adapter(32).up.B.abs().max() == 0


CODE = "thunlp/S3Delta, NAS_global"
FACTS = Facts(
    "s3delta",
    Default("gate_rate", 0.1, f"{CODE}/argparser.py: alpha_learning_rate"),
    Default("beta", 1.0, f"{CODE}/argparser.py"),
    Default("order", 2, f"{CODE}/architect.py: DARTS of second order"),
    Default("rank", 1, f"{CODE}/structure_config/mix_low_rank.json: lora_r"),
    Default("reduction", 32, f"{CODE}/delta_layers.py, LowRankAdapterSequentialLayer"),
    Default("activation", "gelu_new", f"{CODE}/delta_layers.py, LowRankAdapterSequentialLayer"),
    Default("zero_up", False, f"{CODE}/delta_layers.py, reset_param: both maps are drawn"),
    Default("budget", 0.001, "chosen here; the paper has 0.014 % of T5-large and more"),
    Default("steps", 100, "chosen here; theirs are 15 epochs"),
    Default("search_rate", 1e-3, f"chosen here; {CODE}/argparser.py has 3e-4"),
    Holds(
        "the adapters start Glorot-uniform with gain sqrt(2)",
        _adapters_start,
        f"{CODE}/opendelta/delta_models/layers/init.py",
    ),
    Count("roberta-base", 124_055, "the budget, 0.1 % of 124,055,040"),
    Count("t5-base", 222_903, "the budget, 0.1 % of 222,903,552"),
    Count("llama-7b", 6_607_343, "its candidates together, which are fewer than the budget"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
