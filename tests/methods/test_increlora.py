"""IncreLoRA: its equation, importance and rounds written out, the exact budget, the reserve and its warm-up."""

import pytest
import torch

import peftlib
from peftlib.conformance.case import batch, logits, train
from peftlib.errors import PeftlibError
from tests.methods.facts import Count, Default, Facts, Holds, Start, Trains, normal
from tests.methods.helpers import Spy, backbone, inputs

CODE = "FeiyuZhang98/IncreLoRA, "
LAYER, SCRIPTS = CODE + "loralib/loralib/increlora.py, ", CODE + "NLU/scripts/rank=2"

FACTS = Facts(
    "increlora",
    Default("target_rank", 2, SCRIPTS),
    Default("alpha", 32.0, SCRIPTS + "/run_cola.sh (16 on MNLI, QQP and SST-2)"),
    Default("targets", "all-linear", SCRIPTS + ": --lora_module with six kinds of maps"),
    Default("grow", 1, LAYER + "RankAllocator.__init__: 1 for an average target rank of 2"),
    Default("top", 12, SCRIPTS + "/run_qnli.sh"),
    Default("beta1", 0.85, SCRIPTS),
    Default("beta2", 0.85, SCRIPTS),
    Default("orthogonality", 0.1, SCRIPTS),
    Default("dropout", 0.0, CODE + "NLU/examples/text-classification/run_glue.py, ModelArguments.lora_dropout"),
    Default("part_warmup", None, CODE + "NLU/src/transformers/optimization.py, Multi_LambdaLR.check_new_params"),
    Default("initial_warmup", 0.03, SCRIPTS + ": 100 to 1000 steps, 1 to 3 % of them"),
    Default("growth_end", 0.5, SCRIPTS + ": between 20 and 65 % of the steps; this share is chosen here"),
    Start("*.increlora.P", normal(0.02), LAYER + "SVDLinear.reset_parameters", attach=lambda: whole("P")),
    Start("*.increlora.Q", normal(0.02), LAYER + "SVDLinear.reset_parameters", attach=lambda: whole("Q")),
    Holds(
        "the active value starts at 0 and the reserve's at 1e-5", lambda: values_start(), LAYER + "add_reserve_param"
    ),
    Trains(("*.increlora.P", "*.increlora.Q", "*.increlora.singular"), LAYER + "SVDLinear.__init__"),
    # Six rounds for the budget of 72 matrices, twelve in each: room for seven components in a matrix.
    Count("roberta-base", 1_161_720, "7 * 12 * (8 * 768 + 2 * (768 + 3072) + 6)"),
    Count("t5-base", 6_896_832, "192 matrices, room for 17 in each: 17 * 12 * (13,830 + 19,978)"),
    Count("llama-7b", 49_975_680, "224 matrices, room for 20 in each: 20 * 32 * 78,087"),
)


def whole(name: str) -> peftlib.Adapted:
    """With the components that wait, which are zero, cut away from P or Q."""
    adapted = peftlib.attach(backbone("bert"), "increlora")
    for update in adapted.method.updates.values():
        parameter = getattr(update, name)
        parameter.data = parameter.data[:, update.kept] if name == "P" else parameter.data[update.kept]
    return adapted


def values_start() -> None:
    for update in peftlib.attach(backbone("bert"), "increlora").method.updates.values():
        assert update.singular[update.active].tolist() == [0.0]
        assert update.singular[update.reserve].tolist() == [pytest.approx(1e-5)]


@FACTS.tests
def test_published_facts(fact):
    fact()


def adalora(x, weight, bias, p, singular, q, alpha, rank):
    """Zhang et al. 2023: h = W x + (alpha / r) P Lambda Q x for x (tokens, in), in float64."""
    x, W, P, Lambda, Q = (tensor.double() for tensor in (x, weight, p, singular.diag(), q))
    return (x @ W.T + bias.double() + alpha / rank * x @ Q.T @ Lambda @ P.T).float()


def finished(**options):
    adapted = peftlib.attach(backbone("bert"), "increlora", **options)
    train(adapted, batch("bert"), steps=20)
    return adapted


@torch.no_grad()
def test_equation_while_growing_and_afterwards():
    """The scale is alpha / r of the active components; the reserve acts with 1e-5."""
    model = backbone("bert")
    adapted = peftlib.attach(model, "increlora", target_rank=3, top=4, alpha=6.0)
    site = adapted.host.anatomy.layers[1].sites["ffn.up"]
    update = site.module.increlora
    update.singular[0] = 0.7
    update.start(torch.tensor([2]), reserve=False)
    update.singular[2] = -0.4
    assert float(update.singular[1]) == pytest.approx(1e-5)
    spy = Spy(site.module)
    found = []
    for training in (False, True):
        model.train(training)
        with adapted.lifecycle(10):
            model(**inputs("bert"))
        x, y = spy[site.module]
        found.append(y)
        p, q = update.P[:, :3], update.Q[:3]
        expected = adalora(x[1, :5], site.weight, site.bias, p, update.singular[:3], q, alpha=6.0, rank=2)
        torch.testing.assert_close(y[1, :5], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


def test_importance_is_that_of_the_formed_update():
    """mean |dW * grad dW|, where the gradient comes from a forward pass with the formed update as a leaf."""
    model = backbone("bert")
    adapted = peftlib.attach(model, "increlora", target_rank=3, top=4, train_head=False)
    with torch.no_grad():
        for update in adapted.method.updates.values():
            update.singular[0] = 0.5
    deltas = {site: u.delta().requires_grad_() for site, u in adapted.method.updates.items()}
    model.train()
    with adapted.lifecycle(10) as life:
        life.step_start()
        model(**batch("bert")).loss.backward()
        scores = [float(u.importance.grad) for u in adapted.method.updates.values()]
        life.gradients()
        assert all(u.importance.grad is None for u in adapted.method.updates.values())
    sensitivity = 0.15 * torch.tensor(scores)
    torch.testing.assert_close(adapted.method.sensitivity, sensitivity)
    torch.testing.assert_close(adapted.method.uncertainty, 0.15 * (torch.tensor(scores) - sensitivity).abs())

    plain = backbone("bert")
    for site, delta in deltas.items():
        plain.get_submodule(site.path).register_forward_hook(lambda m, args, y, d=delta: y + args[0] @ d.T)
    plain(**batch("bert")).loss.backward()
    expected = [float((d.detach() * d.grad).abs().mean()) for d in deltas.values()]
    assert scores == pytest.approx(expected, rel=1e-4)


def test_a_round_gives_rank_to_the_most_important_matrices():
    method = peftlib.attach(backbone("bert"), "increlora", target_rank=3, top=5, grow=2).method
    method.sensitivity = torch.tensor([0.0, 3, 1, 9, 0, 5, 0, 2, 7, 0, 0, 4])
    method.uncertainty = torch.ones(12)
    assert method._round(10, step=4) == 10
    assert list(method.ranks().values()) == [1, 3, 1, 3, 1, 3, 1, 1, 3, 1, 1, 3]
    assert method._round(3, step=5) == 3
    assert list(method.ranks().values()) == [1, 3, 1, 5, 1, 3, 1, 1, 4, 1, 1, 3]


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
@pytest.mark.parametrize("options", [{"target_rank": 2, "top": 5}, {"target_rank": 4, "top": 7, "grow": 3}], ids=str)
def test_a_run_ends_exactly_on_the_budget(options, steps):
    """Also where the rounds do not divide what is to be given, and in runs with fewer steps than rounds."""
    adapted = peftlib.attach(backbone("bert"), "increlora", **options)
    train(adapted, batch("bert"), steps=steps)
    updates = adapted.method.updates.values()
    assert sum(adapted.method.ranks().values()) == options["target_rank"] * len(updates)
    assert not any(u.reserve.any() or u.measures for u in updates)
    assert all(not u.singular[~u.kept].any() for u in updates)
    assert len(set(adapted.method.ranks().values())) > 1 or steps == 1
    steps_of_growth = [step for step, _ in adapted.method.trace]
    assert steps_of_growth == sorted(set(steps_of_growth))
    assert steps_of_growth[-1] == max(1, round(0.5 * steps))


def test_only_components_in_use_have_gradients_and_those_that_wait_stay_zero():
    adapted = peftlib.attach(backbone("bert"), "increlora", target_rank=3, top=4)

    def look(step: int) -> None:
        for update in adapted.method.updates.values():
            assert torch.equal(update.P.grad.abs().sum(0) > 0, update.kept)
            assert torch.equal(update.Q.grad.abs().sum(1) > 0, update.kept)
            assert torch.equal(update.singular.grad != 0, update.active)
            for tensor in (update.P.T, update.Q, update.singular):
                assert not tensor[~update.kept].any()

    train(adapted, batch("bert"), steps=3, total=40, weight_decay=0.1, watch=[look])


@pytest.mark.parametrize(("part_warmup", "rising"), [(None, 2), (0.4, 4)])
def test_a_part_that_begins_later_has_the_schedule_for_itself(part_warmup, rising):
    """The authors' code (NLU/src/transformers/optimization.py, Multi_LambdaLR) gives the group of a round at step t a
    linear schedule over the T - t steps that are left, with the warm-up steps of the whole training."""
    total, begins = 10, 1  # growth_end: everything grows after the first step
    adapted = peftlib.attach(
        backbone("bert"), "increlora", target_rank=2, top=12, part_warmup=part_warmup, growth_end=0.1
    )
    update = next(iter(adapted.method.updates.values()))
    # Signs of gradients instead of Adam's history, so that a step is as long as the learning rate.
    model = adapted.model.train()
    optimizer = torch.optim.Adam(adapted.trainable().values(), lr=0.01, betas=(0.0, 0.0))
    life = adapted.lifecycle(total)
    scheduler = life.scheduler(optimizer, peftlib.Schedule("linear", warmup=2))
    moved = []
    with life:
        for _ in range(total):
            life.step_start()
            model(**batch("bert")).loss.backward()
            life.gradients()
            before = update.singular.detach().clone()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            life.step_end()
            moved.append((update.singular.detach() - before).abs()[:2].tolist())

    def linear(step: int, rising: int, steps: int) -> float:
        return step / rising if step < rising else (steps - step) / (steps - rising)

    first, grown = zip(*moved)
    assert first[2:] == pytest.approx([0.01 * linear(t, 2, total) for t in range(2, total)], rel=1e-3)
    expected = [0.01 * linear(t - begins, rising, total - begins) for t in range(begins, total)]
    assert grown[begins:] == pytest.approx(expected, rel=2e-2, abs=1e-7)


def test_stored_are_the_active_components_alone(tmp_path):
    adapted = finished(target_rank=2, top=5)
    parts = adapted.method.updates.items()
    numbers = sum(int(u.active.sum()) * (s.in_features + s.out_features + 1) + 2 * len(u.kept) for s, u in parts)
    assert adapted.count().stored - adapted.count().head == numbers
    loaded = peftlib.load(backbone("bert"), adapted.save(tmp_path / "adapter"))
    assert loaded.method.ranks() == adapted.method.ranks()
    before = logits(adapted.model, **inputs("bert"))
    assert torch.equal(logits(loaded.model, **inputs("bert")), before)
    train(loaded, batch("bert"), steps=5)
    assert sum(loaded.method.ranks().values()) == 2 * len(parts)


def test_a_file_from_the_middle_of_the_growth(tmp_path):
    adapted = peftlib.attach(backbone("bert"), "increlora", target_rank=3, top=5)
    train(adapted, batch("bert"), steps=5, total=20)
    loaded = peftlib.load(backbone("bert"), adapted.save(tmp_path / "adapter"))
    assert torch.equal(logits(loaded.model, **inputs("bert")), logits(adapted.model, **inputs("bert")))
    assert 12 < sum(loaded.method.ranks().values()) < 36
    train(loaded, batch("bert"), steps=20)
    assert sum(loaded.method.ranks().values()) == 36


def test_a_target_of_rank_one_never_grows():
    adapted = finished(target_rank=1)
    assert set(adapted.method.ranks().values()) == {1}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target_rank": 0}, "target_rank=0"),
        ({"growth_end": 1.5}, "growth_end=1.5"),
        ({"initial_warmup": 0.6}, "initial_warmup=0.6 is above growth_end=0.5"),
        ({"beta1": 0}, "beta1=0"),
    ],
)
def test_values_that_make_no_schedule(options, match):
    with pytest.raises(PeftlibError, match=match):
        peftlib.config("increlora", **options)


def test_a_target_that_no_matrix_has():
    with pytest.raises(PeftlibError, match=r"rank 33 does not fit"):
        peftlib.attach(backbone("bert"), "increlora", target_rank=33)
