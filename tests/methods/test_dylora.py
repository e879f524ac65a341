"""DyLoRA: the drawn rank and its gradients, every rank after one training, the cut and its parity with LoRA."""

import copy
from collections import Counter

import pytest
import torch

import peftlib
from peftlib.conformance.case import batch, logits, train
from peftlib.errors import PeftlibError
from peftlib.methods.base import TrainingState
from tests.methods.facts import Count, Default, Facts, Holds, Start, Trains, kaiming_uniform, tiny, zeros
from tests.methods.helpers import Spy, backbone, inputs, perturb


def lora(x, weight, bias, a, b, alpha, rank):
    """Hu et al. 2022: h = W x + (alpha / r) B A x for x (tokens, in), in float64."""
    x, W, A, B = (tensor.double() for tensor in (x, weight, a, b))
    return (x @ W.T + bias.double() + alpha / rank * x @ A.T @ B.T).float()


@pytest.fixture
def adapted():
    adapted = peftlib.attach(backbone("bert"), "dylora", rank=4, alpha=6.0)
    perturb(adapted)
    return adapted


@pytest.mark.parametrize("rank", [1, 3, 4])
@torch.no_grad()
def test_equation_at_a_rank(adapted, rank):
    site = adapted.host.anatomy.layers[1].sites["attention.value"]
    spy = Spy(site.module)
    with adapted.method.at_rank(rank):
        adapted.model(**inputs("bert"))
    x, y = spy[site.module]
    a, b = site.module.lora.A[:rank], site.module.lora.B[:, :rank]
    expected = lora(x[1, :5], site.weight, site.bias, a, b, alpha=6.0, rank=rank)
    torch.testing.assert_close(y[1, :5], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_trains_the_drawn_components_alone(frozen):
    model = backbone("bert")
    adapted = peftlib.attach(model, "dylora", rank=4, frozen=frozen)
    perturb(adapted)
    model.train()
    seen = set()
    with adapted.lifecycle(20) as life:
        for _ in range(20):
            life.step_start()
            model(**batch("bert")).loss.backward()
            drawn = {int((u.drawn != 0).sum()) for u in adapted.method.updates.values()}
            (b,) = drawn
            learns = torch.tensor([j == b - 1 if frozen else j < b for j in range(4)])
            for update in adapted.method.updates.values():
                assert torch.equal(update.A.grad.abs().sum(1) > 0, learns)
                assert torch.equal(update.B.grad.abs().sum(0) > 0, learns)
                assert float(update.drawn[0]) == pytest.approx(16 / b)
            model.zero_grad()
            life.step_end()
            seen |= drawn
    assert seen == {1, 2, 3, 4}


def test_the_frozen_form_computes_the_same(adapted):
    frozen = peftlib.attach(backbone("bert"), "dylora", rank=4, alpha=6.0, frozen=True)
    perturb(frozen)
    losses = []
    for each in (adapted, frozen):
        torch.manual_seed(0)
        each.model.train()
        with each.lifecycle(1) as life:
            life.step_start()
            losses.append(each.model(**batch("bert")).loss.detach())
    assert torch.equal(*losses)


def test_ranks_are_drawn_uniformly_from_the_smallest():
    method = peftlib.attach(backbone("bert"), "dylora", rank=5, min_rank=2).method
    update = next(iter(method.updates.values()))
    torch.manual_seed(0)
    found = Counter()
    for step in range(2000):
        method.on_step_start(TrainingState(step, 2000))
        found[int((update.drawn != 0).sum())] += 1
    assert set(found) == {2, 3, 4, 5}
    assert all(abs(count - 500) < 80 for count in found.values())


def test_every_rank_is_usable_after_one_training():
    data = batch("bert")
    model = backbone("bert")
    with torch.no_grad():
        start = float(model(**data).loss)
    torch.manual_seed(0)
    adapted = peftlib.attach(model, "dylora", rank=8, train_head=False)
    train(adapted, data, steps=60, rate=5e-3)
    losses = []
    for rank in range(1, 9):
        with adapted.method.at_rank(rank), torch.no_grad():
            losses.append(float(model(**data).loss))
    assert max(losses) < 0.8 * start
    assert len(set(losses)) == 8


@torch.no_grad()
def test_a_cut_is_lora_of_that_rank(adapted, tmp_path):
    """The cut, what its file loads to, its merge and LoRA with its factors all compute what that rank computed."""
    with adapted.method.at_rank(3):
        at_three = logits(adapted.model, **inputs("bert"))
    full = logits(adapted.model, **inputs("bert"))
    whole = adapted.count().stored
    adapted.method.cut(3)
    after = logits(adapted.model, **inputs("bert"))
    torch.testing.assert_close(after, at_three, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(full, at_three, atol=1e-3)
    matrices = len(adapted.method.updates)
    assert whole - adapted.count().stored == matrices * (32 + 32)

    loaded = peftlib.load(backbone("bert"), adapted.save(tmp_path / "adapter"))
    assert torch.equal(logits(loaded.model, **inputs("bert")), after)
    with pytest.raises(PeftlibError, match="rank 4 is not here; choose one from 1 to 3"), loaded.method.at_rank(4):
        pass

    plain = peftlib.attach(backbone("bert"), "lora", rank=3, alpha=6.0)
    plain.method.load_state(adapted.method.state())
    torch.testing.assert_close(logits(plain.model, **inputs("bert")), at_three, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(logits(adapted.merge(), **inputs("bert")), at_three, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_merged_at_a_rank(adapted):
    model = copy.deepcopy(adapted.model)
    with adapted.method.at_rank(2):
        expected = logits(adapted.model, **inputs("bert"))
    twin = model.peftlib_adapted
    with twin.method.at_rank(2):
        merged = twin.merge()
    torch.testing.assert_close(logits(merged, **inputs("bert")), expected, atol=1e-5, rtol=1e-5)


def test_a_cut_adapter_trains_on(adapted):
    adapted.method.cut(2)
    before = {n: p.detach().clone() for n, p in adapted.trainable().items()}
    train(adapted, batch("bert"), steps=3)
    assert all(not torch.equal(p, before[n]) for n, p in adapted.trainable().items())


@pytest.mark.parametrize("rank", [0, 5, 2.5, "2"])
def test_a_rank_that_was_not_trained(adapted, rank):
    with pytest.raises(PeftlibError, match=f"rank {rank!r} is not here; choose one from 1 to 4"):
        adapted.method.cut(rank)


def test_values_that_make_no_range():
    with pytest.raises(PeftlibError, match="min_rank=9 is above rank=8"):
        peftlib.config("dylora", min_rank=9)


# What is published

RUN = "huawei-noah/Efficient-NLP, DyLoRA/examples/NLU"


def check_scale():
    """``dynamic.forward`` scales A and B by sqrt(r / b) each, ``Linear`` the product by alpha / r."""
    update = next(iter(tiny("dylora", rank=8).method.updates.values()))
    for b in range(1, 9):
        update.draw(b)
        assert update.drawn.tolist() == pytest.approx([16 / b] * b + [0.0] * (8 - b))


def check_frozen():
    """``pr = inputs[:, :rank].detach()``: of the components that are used only the last learns."""
    method = tiny("dylora", rank=8).method
    update = next(iter(method.updates.values()))
    for step in range(20):
        method.on_step_start(TrainingState(step, 20))
        assert int(update.learns.sum()) == 1 + int((update.drawn == 0).sum())
        assert not update.learns[: int((update.drawn != 0).sum()) - 1].any()


FACTS = Facts(
    "dylora",
    Default("rank", 8, f"{RUN}/roberta_base_*.sh"),
    Default("alpha", 16.0, f"{RUN}/roberta_base_*.sh"),
    Default("frozen", True, f"{RUN}/examples/text-classification/run_glue.py: set_rank(new_rank, frozen=True)"),
    Default("min_rank", 1, f"{RUN}/examples/text-classification/run_glue.py: torch.randint(0, maximum_rank), plus one"),
    Default("dropout", 0.0, f"{RUN}/.../modeling_roberta.py: layers without dropout"),
    Default("targets", ("*attention.query", "*attention.value"), f"{RUN}/.../modeling_roberta.py"),
    Start("*.lora.A", kaiming_uniform(), "huawei-noah/Efficient-NLP, DyLoRA/loralib/layers.py, reset_parameters"),
    Start("*.lora.B", zeros(), "huawei-noah/Efficient-NLP, DyLoRA/loralib/layers.py, reset_parameters"),
    Trains(("*.lora.A", "*.lora.B"), "huawei-noah/Efficient-NLP, DyLoRA/loralib/layers.py, Linear"),
    Holds("the scale is alpha / b", check_scale, "huawei-noah/Efficient-NLP, DyLoRA/loralib: DyLoRA.py, layers.py"),
    Holds("components below the drawn one are frozen", check_frozen, "DyLoRA/loralib/DyLoRA.py, dynamic.forward"),
    Count("roberta-base", 294_912, "LoRA's of rank 8"),
    Count("t5-base", 884_736, "LoRA's of rank 8"),
    Count("llama-7b", 4_194_304, "LoRA's of rank 8"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
