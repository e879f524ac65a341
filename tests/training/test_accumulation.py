"""N batches of b rows a step equal one of N times b: losses, penalties, and what methods read from gradients."""

from __future__ import annotations

import pytest
import torch

import peftlib
from peftlib.conformance.case import Case, lm_head
from peftlib.errors import StateError
from peftlib.training.accumulation import items
from tests.methods.helpers import perturb

PENALTIES = {
    "lora": {},
    "adalora": {},
    "increlora": {},
    "adapter_fusion": {},
    "lt_sft": {"l1": 1.0},
    "mpt": {},
}
FAMILIES = ["bert", "gpt2", "llama", "t5", "bart"]


def gradients(case: Case, parts: list[torch.Tensor], says: bool) -> dict[str, torch.Tensor]:
    """Of one step; ``says``: the model is told the step's number of labels, else each loss is divided by the parts."""
    adapted, data = case.attach(), case.batch()
    if case.method == "mpt":  # compares means over text, which are those of the whole where rows have one length
        data |= {"attention_mask": torch.ones_like(data["attention_mask"])}
    perturb(adapted, std=0.1)
    total = items(adapted.model, data)
    adapted.model.train()
    with adapted.lifecycle(1000, accumulation=len(parts)) as life:
        life.step_start()
        for part in parts:
            rows = {k: v[part] for k, v in data.items()}
            told = {"num_items_in_batch": total} if says else {}
            loss = adapted.model(**rows, **told).loss
            (loss if says else loss / len(parts)).backward()
        found = {n: p.grad.clone() for n, p in adapted.trainable().items() if p.grad is not None}
        life.abandon()
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and one
    scale = max(float(g.abs().max()) for g in one.values())
    for name, gradient in one.items():
        assert float((gradient - other[name]).abs().max()) < 1e-4 * scale, name


UNEVEN = list(torch.arange(8).split(3))  # three, three and two rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_shares_of_a_step_add_up(method, family):
    for head in {"classification", lm_head(family)} - {"masked_lm"}:
        case = Case(method, family, head)
        same(gradients(case, [torch.arange(8)], says=False), gradients(case, UNEVEN, says=True))


@pytest.mark.parametrize("method", PENALTIES)
def test_a_penalty_counts_once_a_step(method):
    case = Case(method, "bert", options=PENALTIES[method])
    whole = gradients(case, [torch.arange(8)], says=False)
    same(whole, gradients(case, UNEVEN, says=True))
    same(whole, gradients(case, list(torch.arange(8).split(2)), says=False))


@pytest.mark.parametrize("outputs", [1, 3])
def test_regressions_and_several_labels_at_a_time_too(outputs):
    """Their losses know nothing of ``num_items_in_batch``."""
    model = peftlib.backbones.load("tiny-bert", num_labels=outputs, dropout=0.0).model
    model.config.problem_type = "regression" if outputs == 1 else "multi_label_classification"
    adapted = peftlib.attach(model, "lora")
    data = Case("lora", "bert").inputs()
    labels = torch.rand(8, outputs, generator=torch.Generator().manual_seed(0)).squeeze(1)
    model.train()
    whole = model(**data, labels=labels).loss
    parts = [
        model(**{k: v[part] for k, v in data.items()}, labels=labels[part], num_items_in_batch=labels.numel()).loss
        for part in UNEVEN
    ]
    torch.testing.assert_close(sum(parts), whole)
    assert adapted.calibrated


def test_a_part_without_labels_adds_nothing():
    adapted = Case("adalora", "llama", "causal_lm").attach()
    data = Case("adalora", "llama", "causal_lm").batch()
    adapted.model.train()
    with adapted.lifecycle(10):
        loss = adapted.model(**data | {"labels": torch.full_like(data["labels"], -100)}, num_items_in_batch=7).loss
    assert float(loss.detach()) == 0


# What methods read from gradients


def importance(parts: list[torch.Tensor]) -> torch.Tensor:
    adapted, data = Case("increlora", "bert", options={"target_rank": 4}).attach(), Case("increlora", "bert").batch()
    perturb(adapted, std=0.1)
    adapted.model.train()
    with adapted.lifecycle(1000, accumulation=len(parts)) as life:
        life.step_start()
        for part in parts:
            (adapted.model(**{k: v[part] for k, v in data.items()}).loss * len(part) / 8).backward()
        life.gradients()
        life.abandon()
    return adapted.method.sensitivity


def test_the_importance_of_a_matrix_is_that_of_the_whole_step():
    whole = importance([torch.arange(8)])
    torch.testing.assert_close(importance(UNEVEN), whole, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("method", ["child_tuning_d", "sam"])
def test_the_norm_of_what_is_dropped_is_that_of_the_whole_step(method):
    found = []
    for parts in ([torch.arange(8)], UNEVEN):
        adapted, data = Case(method, "bert").attach(), Case(method, "bert").batch()
        adapted.model.train()
        with adapted.lifecycle(10, max_norm=0.01, accumulation=len(parts)) as life:
            life.step_start()
            for part in parts:
                (adapted.model(**{k: v[part] for k, v in data.items()}).loss * len(part) / 8).backward()
            life.gradients()
            life.abandon()
        found.append({n: p.grad.clone() for n, p in adapted.trainable().items() if p.grad is not None})
    same(*found)


@pytest.mark.parametrize(("method", "options"), [("increlora", {}), ("sam", {"max_norm": 1.0})])
def test_one_pass_too_many_is_named(method, options):
    adapted, data = Case(method, "bert").attach(), Case(method, "bert").batch()
    adapted.model.train()
    with adapted.lifecycle(10, **options) as life:
        life.step_start()
        adapted.model(**data).loss.backward()
        with pytest.raises(StateError, match=rf"{method} reads what each backward pass.*accumulation="):
            adapted.model(**data)
        life.abandon()


@pytest.mark.parametrize("method", ["adalora", "increlora", "lora_prune", "delta_lora", "child_tuning_d"])
def test_a_step_that_the_scaler_leaves_out_is_none_for_the_method(method):
    """As with GradScaler: the first gradients overflow, and nothing is stepped."""
    ends = []
    for overflows in (False, True):
        adapted, data = Case(method, "bert").attach(), Case(method, "bert").batch()
        optimizer = torch.optim.SGD(adapted.trainable().values(), lr=0.1)
        adapted.model.train()
        with adapted.lifecycle(40) as life:
            for scale in ([float("inf")] if overflows else []) + [1.0, 1.0]:
                life.step_start()
                (scale * adapted.model(**data).loss).backward()
                life.gradients()
                if scale == 1:
                    optimizer.step()
                optimizer.zero_grad()
                life.step_end()
            assert life.step == 2 + overflows
            state = adapted.method.run_state() | adapted.state()
            ends.append({n: t.detach().clone() for n, t in state.items()})
            life.abandon()
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-4, atol=1e-6)
