"""SAM: which entries are chosen, tensor by tensor or over all, and how many."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

import peftlib
from peftlib import backbones, tasks
from peftlib.conformance.case import backbone, batch, tokenizer, train
from peftlib.errors import ConfigError, TargetError
from peftlib.mechanisms import sparse
from peftlib.methods.partial.delta_weight_masking.sam import shares
from tests.methods.facts import Count, Default, Facts, Trains

CODE = "fuzihaofzh/AnalyzeParameterEfficientFinetune, src/runner.py, run_train_step ('bsearch')"

FACTS = Facts(
    "sam",
    Default("density", 0.005, "fuzihaofzh/AnalyzeParameterEfficientFinetune, scripts/train.sh: bsearch=0.005"),
    Default("batches", 600, "fuzihaofzh/AnalyzeParameterEfficientFinetune, scripts/train.sh: burnin=600"),
    Default("scope", "tensor", f"{CODE}: topk of int(share * numel) in each tensor"),
    Default("clip", 1.0, "src/main_runscript.py: max_grad_norm = 1.0, and complex_backpropagate in src/runner.py"),
    Default("dropout", True, f"{CODE}: jiant_model.train(), unless 'arand' is given"),
    Trains(("*.parametrizations.*.0.values",), f"{CODE}: gradients are masked", attach=lambda: attached("bert")),
    Count("roberta-base", int(0.005 * 124_055_040), "0.5 % of the parameters below the head"),
    Count("t5-base", int(0.005 * 222_903_552), "0.5 % of the parameters"),
    Count("llama-7b", int(0.005 * 6_607_343_616), "0.5 % of the parameters below the output map"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()


def parts(family: str, count: int = 4) -> list[dict]:
    data = batch(family)
    return [{k: v[i : i + 8 // count] for k, v in data.items()} for i in range(0, 8, 8 // count)]


def attached(family: str = "bert", count: int = 4, **options) -> peftlib.Adapted:
    adapted = peftlib.attach(backbone(family), "sam", **{"density": 0.02, **options})
    adapted.calibrate(parts(family, count))
    return adapted


def summed(family: str, batches: int = 4, clip: float = 1.0) -> dict[str, torch.Tensor]:
    """Sums of the batches' gradients, each clipped as a whole (complex_backpropagate in the authors' src/runner.py)."""
    model, sums = backbone(family), {}
    for part in parts(family)[:batches]:
        model.zero_grad()
        model(**part).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for name, p in model.named_parameters():
            if any(p is q for q in model.base_model.parameters()):
                sums[name] = sums.get(name, 0) + (torch.zeros_like(p) if p.grad is None else p.grad)
    return sums


def masks(adapted: peftlib.Adapted) -> dict[str, torch.Tensor]:
    children = adapted.method.children
    return {
        n: children[n].owned if n in children else torch.zeros(p.shape, dtype=torch.bool)
        for n, p in adapted.method.candidates.items()
    }


@pytest.mark.parametrize("clip", [1.0, 0.1])
@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "t5"])
def test_in_each_tensor_its_share_of_the_largest_summed_gradients(family, clip):
    adapted, found = attached(family, clip=clip), summed(family, clip=clip)
    chosen = masks(adapted)
    assert chosen.keys() == found.keys()
    total = sum(g.numel() for g in found.values())
    assert adapted.count().method == sum(int(m.sum()) for m in chosen.values()) == int(0.02 * total)
    for name, mask in chosen.items():
        kept, size = int(mask.sum()), mask.numel()
        assert abs(kept - 0.02 * size) < 1
        score = found[name].square()
        if kept and score.max() > 1e-12:
            # Beyond rounding of the sums, no entry outside is larger than one inside.
            assert score[mask].min() >= score[~mask].max() * (1 - 1e-3)


def test_over_all_tensors_the_largest_win():
    adapted, found = attached(scope="all"), summed("bert")
    mask = torch.cat([m.flatten() for m in masks(adapted).values()])
    score = torch.cat([g.square().flatten() for g in found.values()])
    assert int(mask.sum()) == adapted.count().method == int(0.02 * mask.numel())
    assert score[mask].min() >= score[~mask].max() * (1 - 1e-3)


def test_clipping_each_batch_changes_the_choice():
    clipped, plain = masks(attached(clip=0.01)), masks(attached(clip=None))
    assert any(not torch.equal(clipped[n], mask) for n, mask in plain.items())


def test_gradients_are_added_in_training_mode_with_draws_of_their_own():
    def chosen(**options):
        torch.manual_seed(0)
        model = backbones.load("tiny-bert", head="classification", dropout=0.5).model
        adapted = peftlib.attach(model, "sam", density=0.02, **options)
        state = torch.random.get_rng_state()
        adapted.calibrate(parts("bert"))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert not adapted.model.training
        return torch.cat([m.flatten() for m in masks(adapted).values()])

    assert torch.equal(chosen(), chosen())
    assert not torch.equal(chosen(), chosen(dropout=False))


def test_gradients_are_added_before_they_are_squared():
    # Fisher's sum of squares takes other entries.
    fisher = peftlib.attach(backbone("bert"), "fish_mask", density=0.02, charge_head=False)
    fisher.calibrate(parts("bert"))
    sums = attached(scope="all", density=fisher.count().method / attached().method.entries)
    assert any(
        not torch.equal(child.indices, sums.method.children[n].indices)
        for n, child in fisher.method.children.items()
        if n in sums.method.children
    )


def test_it_reads_no_more_batches_than_it_is_told():
    told, given = attached(batches=2), peftlib.attach(backbone("bert"), "sam", density=0.02)
    given.calibrate(parts("bert")[:2])
    assert all(torch.equal(m, masks(given)[n]) for n, m in masks(told).items())


def test_masked_entries_stay_with_weight_decay_and_momentum():
    adapted, plain = attached(), backbone("bert")
    chosen = masks(adapted)
    train(adapted, batch("bert"), steps=5, rate=0.05, weight_decay=0.5)
    adapted.model(**batch("bert"))
    moved = 0
    for name, tensor in adapted.method.candidates.items():
        changed = tensor != plain.get_parameter(name)
        assert not (changed & ~chosen[name]).any()
        moved += int(changed.sum())
    assert moved > 0.9 * adapted.count().method


MASKED = {"sam": {"density": 0.05}, "child_tuning_d": {"density": 0.4}}


def _dense(method: str, chosen: dict[str, torch.Tensor], data: list[dict], max_norm: float) -> dict[str, torch.Tensor]:
    """What the authors' loops do: everything has a gradient, all of it is clipped, then it is masked."""
    model = backbone("bert")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for given in data:
        optimizer.zero_grad()
        model(**given).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        for name, mask in chosen.items():
            if (g := model.get_parameter(name).grad) is not None:
                g.mul_(mask)
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("method", MASKED)
@pytest.mark.parametrize("max_norm", [0.02, 100.0])
def test_the_whole_gradient_is_clipped_and_then_masked(method, max_norm):
    adapted = peftlib.attach(backbone("bert"), method, **MASKED[method])
    adapted.calibrate(parts("bert"))
    # Every tensor has a chosen entry, so nothing is left out of the norm.
    chosen = masks(adapted)
    expected = _dense(method, chosen, parts("bert"), max_norm)
    optimizer = torch.optim.SGD(adapted.trainable().values(), lr=0.5)
    adapted.model.train()
    with adapted.lifecycle(4, max_norm=max_norm) as life:
        for given in parts("bert"):
            life.step_start()
            adapted.model(**given).loss.backward()
            life.gradients()
            optimizer.step()
            optimizer.zero_grad()
            life.step_end()
    adapted.model.eval()(**batch("bert"))  # writes the last values
    for name, tensor in {**adapted.method.candidates, **adapted.method.trained_head()}.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("method", MASKED)
def test_each_loop_leaves_clipping_to_the_method(method, tmp_path, monkeypatch):
    """fit and the Trainer: the norm is that of the whole gradient, larger than that of what trains."""
    norms, clip_whole = [], sparse.clip_whole

    def watched(parameters, children, max_norm):
        parameters = list(parameters)
        trained = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        whole = clip_whole(parameters, children, max_norm)
        after = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norms.append((float(trained), float(whole), float(after), max_norm))
        return whole

    monkeypatch.setattr(sparse, "clip_whole", watched)
    adapted = peftlib.attach(backbone("bert"), method, **MASKED[method])
    task = tasks.load("smoke")
    peftlib.fit(adapted, task, tokenizer=tokenizer("bert"), steps=2, max_grad_norm=0.03, evaluate_on=None)
    adapted = peftlib.attach(backbone("bert"), method, **MASKED[method])
    adapted.calibrate(parts("bert"))
    rows = [{k: v[i] for k, v in batch("bert").items()} for i in range(8)]
    args = TrainingArguments(str(tmp_path), max_steps=2, max_grad_norm=0.03, report_to=[], save_strategy="no")
    Trainer(adapted.model, args, train_dataset=rows, callbacks=[adapted.callback()]).train()
    assert args.max_grad_norm == 0.03
    assert len(norms) == 4
    for trained, whole, after, max_norm in norms:
        assert max_norm == 0.03 and whole > trained
        assert after == pytest.approx(trained * min(1, 0.03 / whole), rel=1e-3)


def test_shares_add_up_and_are_within_one_of_the_exact_ones():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        sizes = torch.randint(1, 5000, (20,), generator=generator).tolist()
        k = int(torch.randint(0, sum(sizes) + 1, (), generator=generator))
        counts = shares(sizes, k)
        assert sum(counts) == k
        assert all(abs(c - k * s / sum(sizes)) < 1 and c <= s for c, s in zip(counts, sizes))


def test_bad_settings():
    for options in ({"density": 0}, {"scope": "layer"}, {"batches": 0}, {"clip": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            attached(**options)
    with pytest.raises(TargetError, match="it must be a number from 1"):
        attached(density=1e-7)
