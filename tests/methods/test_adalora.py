"""AdaLoRA: its equation and penalty, the schedule and the masks of HF peft, the exact budget, what is stored."""

import copy
import itertools
import types
import warnings

import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator

import peftlib
from peftlib import backbones
from peftlib.conformance.case import batch, train
from peftlib.errors import LoadError, PeftlibError
from peftlib.methods.base import TrainingState
from tests.methods.facts import Count, Default, Facts, Holds, Start, Trains, normal, tiny, zeros
from tests.methods.helpers import Spy, backbone, inputs, perturb


def adalora(x, weight, bias, p, singular, q, alpha, rank):
    """Zhang et al. 2023: h = W x + (alpha / r) P Lambda Q x for x (tokens, in), in float64."""
    x, W, P, Lambda, Q = (tensor.double() for tensor in (x, weight, p, singular.diag(), q))
    return (x @ W.T + bias.double() + alpha / rank * x @ Q.T @ Lambda @ P.T).float()


PEFT_NAMES = {"singular": "lora_E", "P": "lora_B", "Q": "lora_A"}


def orthogonality(updates):
    """The mean over all matrices of the norms, unsquared, of P^T P - I and Q Q^T - I, in float64."""
    norms = []
    for u in updates:
        P, Q = u.P.detach().double(), u.Q.detach().double()
        eye = torch.eye(len(Q), dtype=torch.float64)
        norms += [(P.T @ P - eye).square().sum().sqrt(), (Q @ Q.T - eye).square().sum().sqrt()]
    return float(sum(norms) / len(norms))


def importance(gradients, weights, beta=0.85):
    """Smoothed sensitivity times smoothed uncertainty of each entry of a tensor, from its gradients and values over the
    steps, in float64."""
    I_bar = U_bar = torch.zeros_like(weights[0], dtype=torch.float64)
    for g, w in zip(gradients, weights):
        sensitivity = (w.double() * g.double()).abs()
        I_bar = beta * I_bar + (1 - beta) * sensitivity
        U_bar = beta * U_bar + (1 - beta) * (sensitivity - I_bar).abs()
    return I_bar * U_bar


def budget(step, initial, target, initial_warmup, final_warmup, total):
    """The cubic schedule; ``step`` counts finished steps from 1."""
    if step <= initial_warmup:
        return initial
    if step > total - final_warmup:
        return target
    left = 1 - (step - initial_warmup) / (total - final_warmup - initial_warmup)
    return target + int((initial - target) * left**3)


def _oracle(adapted, total: int = 100, **options):
    """HF peft's model with our weights, and our parameter -> its parameter."""
    config = peft.AdaLoraConfig(
        task_type="SEQ_CLS",
        init_r=adapted.config.rank,
        target_r=adapted.config.target_rank,
        lora_alpha=adapted.config.alpha,
        target_modules=sorted({site.path for site in adapted.method.updates}),
        total_step=total,
        orth_reg_weight=adapted.config.orthogonality,
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = peft.get_peft_model(backbone("bert"), config)
    left = {n: p for n, p in oracle.named_parameters() if p.requires_grad}
    pairs = {}
    for name, parameter in adapted.trainable().items():
        if name in adapted.head_names:
            owner, _, last = name.partition(".")
            theirs = f"{owner}.modules_to_save.default.{last}"
        else:
            path, _, last = name.rpartition(".")
            theirs = f"{path.removesuffix('.adalora')}.{PEFT_NAMES[last]}.default"
        pairs[parameter] = left.pop(f"base_model.model.{theirs}")
    assert not left
    _copy(pairs)
    return oracle, pairs


@torch.no_grad()
def _copy(pairs) -> None:
    for mine, other in pairs.items():
        other.copy_(mine.reshape(other.shape))


@torch.no_grad()
def test_equation_on_one_site():
    model = backbone("bert")
    adapted = peftlib.attach(model, "adalora", rank=4, target_rank=2, alpha=6.0)
    perturb(adapted)
    site = adapted.host.anatomy.layers[1].sites["attention.query"]
    spy = Spy(site.module)
    model(**inputs("bert"))
    x, y = spy[site.module]
    u = site.module.adalora
    expected = adalora(x[1, :5], site.weight, site.bias, u.P, u.singular, u.Q, alpha=6.0, rank=4)
    torch.testing.assert_close(y[1, :5], expected, atol=1e-5, rtol=1e-5)


def test_penalty_is_the_mean_of_unsquared_norms():
    adapted = peftlib.attach(backbone("bert"), "adalora", rank=4, target_rank=2, orthogonality=0.3)
    perturb(adapted)
    expected = 0.3 * orthogonality(adapted.method.updates.values())
    assert float(adapted.method.penalty(None).detach()) == pytest.approx(expected, rel=1e-5)
    data, model = batch("bert"), adapted.model
    plain = float(model(**data).loss.detach())
    model.train()
    with adapted.lifecycle(10):
        loss = float(model(**data).loss.detach())
    assert loss == pytest.approx(plain + expected, rel=1e-5)


def test_parity_with_hf_peft():
    """Logits, loss with the penalty and gradients, with the same weights. HF peft divides by r + 1e-5."""
    adapted = peftlib.attach(backbone("bert"), "adalora", orthogonality=0.5)
    perturb(adapted, std=0.1)
    oracle, pairs = _oracle(adapted)
    assert sum(p.numel() for p in pairs.values()) == adapted.count().trained
    data = batch("bert")
    with torch.no_grad():
        ours, theirs = adapted.model(**data).logits, oracle.eval()(**data).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, backbone("bert")(**data).logits, atol=1e-3)
    adapted.model.train()
    with adapted.lifecycle(10):
        ours, theirs = adapted.model(**data).loss, oracle.train()(**data).loss
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        ours.backward()
    theirs.backward()
    for mine, other in pairs.items():
        expected = other.grad.reshape(mine.shape)
        torch.testing.assert_close(mine.grad, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("interval", [1, 3])
def test_masks_are_those_of_hf_pefts_allocator(interval):
    """Side by side over a run: with the same weights and gradients at every step, the same triplets are zeroed.

    HF peft calls its allocator after the optimizer's step. Here no optimizer steps in between, so that both read the
    same weights; the weights of each step are drawn anew, as large as training would make them."""
    total, rank, target = 40, 6, 2
    config = peftlib.config("adalora", rank=rank, target_rank=target, interval=interval)
    adapted = peftlib.attach(backbone("bert"), config)
    first, last = round(0.15 * total), total - round(0.5 * total)
    oracle, pairs = _oracle(adapted, total, tinit=first, tfinal=total - last, deltaT=interval)
    allocator = oracle.base_model.rankallocator
    assert isinstance(allocator, RankAllocator)
    generator = torch.Generator().manual_seed(0)
    counts = []
    for step in range(total):
        with torch.no_grad():
            for mine, other in pairs.items():
                mine += 0.1 * torch.randn(mine.shape, generator=generator)
                mine.grad = torch.randn(mine.shape, generator=generator)
                other.grad = mine.grad.reshape(other.shape).clone()
        _copy(pairs)
        adapted.method.on_gradients(TrainingState(step, total))
        adapted.method.on_step_end(TrainingState(step, total))
        oracle.base_model.update_and_allocate(step + 1)
        for site, update in adapted.method.updates.items():
            theirs = pairs[update.singular]
            assert torch.equal(update.singular.reshape(theirs.shape), theirs), f"step {step}: {site}"
        counts.append(sum(int((u.singular != 0).sum()) for u in adapted.method.updates.values()))
    matrices = len(adapted.method.updates)
    assert counts[first - 1] == matrices * rank
    assert set(counts[last:]) == {matrices * target}
    assert counts[2 * first - 1] == budget(2 * first, matrices * rank, matrices * target, first, total - last, total)


def test_schedule_is_the_papers():
    config = peftlib.config("adalora", initial_warmup=0.1, final_warmup=0.4)
    budgets = [config.budget(step, 50, 48, 20) for step in range(1, 51)]
    assert budgets == [budget(step, 48, 20, 5, 20, 50) for step in range(1, 51)]
    assert budgets[:5] == [48] * 5
    assert budgets[29:] == [20] * 21


@torch.no_grad()
def test_importance_is_the_papers():
    adapted = peftlib.attach(backbone("bert"), "adalora", rank=3, target_rank=1)
    update = next(iter(adapted.method.updates.values()))
    generator = torch.Generator().manual_seed(0)
    gradients, weights = [], []
    for step in range(6):
        for parameter in adapted.trainable().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        adapted.method.on_gradients(TrainingState(step, 100))
        gradients.append([t.grad.clone() for t in (update.singular, update.P, update.Q)])
        weights.append([t.detach().clone() for t in (update.singular, update.P, update.Q)])

    singular, P, Q = (importance(g, w) for g, w in zip(zip(*gradients), zip(*weights)))
    expected = singular + P.mean(0) + Q.mean(1)
    ((singular, P, Q),) = [[a * b for a, b in adapted.method.smooth[update]]]
    torch.testing.assert_close((singular + P.mean(0) + Q.mean(1)).double(), expected, atol=1e-6, rtol=1e-4)


def test_equal_importance_still_meets_the_budget():
    """HF peft's threshold zeroes every triplet of a tie; ours keeps the first ones."""
    adapted = peftlib.attach(backbone("bert"), "adalora", rank=4, target_rank=3)
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.fill_(0.5)
            parameter.grad = torch.ones_like(parameter)
    for step in range(10):
        adapted.method.on_gradients(TrainingState(step, 10))
        adapted.method.on_step_end(TrainingState(step, 10))
    assert sum(adapted.method.ranks().values()) == 3 * len(adapted.method.updates)
    assert list(adapted.method.ranks().values()) == [4] * 9 + [0] * 3


@pytest.mark.parametrize("steps", [1, 2, 3, 30])
def test_a_run_ends_exactly_on_the_budget(steps):
    adapted = peftlib.attach(backbone("bert"), "adalora", rank=6, target_rank=2)
    train(adapted, batch("bert"), steps=steps)
    updates = adapted.method.updates.values()
    assert sum(adapted.method.ranks().values()) == 2 * len(updates)
    for update in updates:
        assert not update.singular[~update.kept].any()
    if steps == 30:
        assert all(update.singular[update.kept].all() for update in updates)
        assert len(set(adapted.method.ranks().values())) > 1, "every matrix kept the same rank"


def test_the_choice_is_fixed_in_the_final_phase():
    adapted = peftlib.attach(backbone("bert"), "adalora", rank=6, target_rank=2)
    seen = []
    original = adapted.method.on_step_end

    def on_step_end(self, progress):
        original(progress)
        seen.append([u.singular.detach() != 0 for u in self.updates.values()])

    adapted.method.on_step_end = types.MethodType(on_step_end, adapted.method)
    train(adapted, batch("bert"), steps=20)
    final = [torch.cat(masks) for masks in seen[9:]]
    assert all(torch.equal(masks, final[0]) for masks in final)
    assert any(not torch.equal(torch.cat(a), torch.cat(b)) for a, b in itertools.pairwise(seen))


def test_stored_are_the_kept_triplets_alone(tmp_path):
    adapted = peftlib.attach(backbone("bert"), "adalora", rank=6, target_rank=2)
    train(adapted, batch("bert"), steps=20)
    sizes, matrices, places = adapted.method.updates, len(adapted.method.updates), 6
    kept = sum(int(u.kept.sum()) * (s.in_features + s.out_features + 1) for s, u in sizes.items())
    assert adapted.count().stored - adapted.count().head == kept + matrices * places
    loaded = peftlib.load(backbone("bert"), adapted.save(tmp_path / "adapter"))
    assert loaded.method.ranks() == adapted.method.ranks()
    with torch.no_grad():
        assert torch.equal(loaded.model(**inputs("bert")).logits, adapted.model(**inputs("bert")).logits)
    train(loaded, batch("bert"), steps=5)
    assert sum(loaded.method.ranks().values()) == 2 * matrices


def test_a_file_whose_parts_disagree():
    adapted = peftlib.attach(backbone("bert"), "adalora", rank=6, target_rank=2)
    state = adapted.method.state()
    name = next(n for n in state if n.endswith("adalora.kept"))
    state[name] = torch.tensor([True, False] * 3)
    with pytest.raises(LoadError, match="keeps 3 triplets and holds 6 columns"):
        adapted.method.load_state(state)


def test_a_matrix_can_lose_all_its_triplets(tmp_path):
    adapted = peftlib.attach(backbone("bert"), "adalora", rank=2, target_rank=1)
    perturb(adapted)
    first, *others = adapted.method.updates.values()
    first.kept.fill_(False)
    with torch.no_grad():
        first.singular.zero_()
        before = adapted.model(**inputs("bert")).logits
    loaded = peftlib.load(backbone("bert"), adapted.save(tmp_path / "adapter"))
    assert list(loaded.method.ranks().values()) == [0] + [2] * len(others)
    with torch.no_grad():
        assert torch.equal(loaded.model(**inputs("bert")).logits, before)
    losses = train(loaded, batch("bert"), steps=3)
    assert all(loss == loss for loss in losses)
    with torch.no_grad():
        before = loaded.model(**inputs("bert")).logits
        torch.testing.assert_close(loaded.merge()(**inputs("bert")).logits, before, atol=1e-5, rtol=1e-5)


def test_training_again_starts_the_schedule_anew():
    adapted = peftlib.attach(backbone("bert"), "adalora", rank=4, target_rank=2)
    train(adapted, batch("bert"), steps=10)
    fixed = copy.deepcopy(adapted.method.ranks())
    train(adapted, batch("bert"), steps=1, total=10)
    assert set(adapted.method.ranks().values()) == {4}
    train(adapted, batch("bert"), steps=10)
    assert sum(adapted.method.ranks().values()) == sum(fixed.values())


def test_count_of_the_surveys_table():
    targets = ("attention.query", "attention.value")
    adapted = peftlib.attach(backbones.shapes("roberta-base"), "adalora", targets=targets)
    assert adapted.count().trained == 1_034_786


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 4, "target_rank": 5},
        {"initial_warmup": 0.6, "final_warmup": 0.4},
        {"beta1": 0.0},
        {"interval": 0},
        {"orthogonality": -1.0},
    ],
    ids=str,
)
def test_values_that_make_no_schedule(options):
    with pytest.raises(PeftlibError, match=str(next(iter(options.values())))):
        peftlib.config("adalora", **options)


# What is published

README = "QingruZhang/AdaLoRA, README.md: SQuAD v2"
SCRIPTS = "QingruZhang/AdaLoRA, NLU/scripts and NLG_QA/scripts"
LAYER = "QingruZhang/AdaLoRA, loralib/loralib/adalora.py, SVDLinear"


def check_scale():
    adapted = tiny("adalora")
    assert {update.scale for update in adapted.method.updates.values()} == {16 / 12}


def check_six_kinds():
    """``--lora_module query,key,value,intermediate,layer.output,attention.output`` in all eleven scripts' form."""
    names = {site.name for site in tiny("adalora").method.updates}
    assert names == {f"attention.{n}" for n in ("query", "key", "value", "output")} | {"ffn.up", "ffn.down"}
    bart = {site.name for site in tiny("adalora", "bart").method.updates}
    assert bart == names | {f"cross_attention.{n}" for n in ("query", "key", "value", "output")}


FACTS = Facts(
    "adalora",
    Default("rank", 12, f"{README}, also run_bart_xsum.sh"),
    Default("target_rank", 8, f"{README}, also run_bart_xsum.sh"),
    Default("alpha", 16.0, README),
    Default("targets", "all-linear", f"{SCRIPTS}: six kinds of maps in each"),
    Default("dropout", 0.0, f"{LAYER}: the default, which no script changes"),
    Default("beta1", 0.85, SCRIPTS),
    Default("beta2", 0.85, SCRIPTS),
    Default("orthogonality", 0.1, f"{SCRIPTS}: but 0.3 for RTE and STS-B"),
    Default("interval", 1, f"{SCRIPTS}: RTE and MRPC, with the shortest runs; 10 and 100 in longer ones"),
    Default("initial_warmup", 0.15, f"{SCRIPTS}: RTE's 600 of 3,900 steps; 0.08 to 0.18 in the others"),
    Default("final_warmup", 0.5, f"{SCRIPTS}: QNLI's 8,000 and CoLA's 3,500 are nearest; 0.31 to 0.58 in the others"),
    Start("*.adalora.P", normal(0.02), f"{LAYER}.reset_parameters"),
    Start("*.adalora.Q", normal(0.02), f"{LAYER}.reset_parameters"),
    Start("*.adalora.singular", zeros(), f"{LAYER}.reset_parameters"),
    Trains(("*.adalora.P", "*.adalora.Q", "*.adalora.singular"), LAYER),
    Holds("the scale is alpha / r", check_scale, f"{LAYER}.forward, there with r + 1e-5"),
    Holds("six kinds of maps are adapted", check_six_kinds, SCRIPTS),
    Count("roberta-base", 12 * 12 * (8 * 768 + 2 * (768 + 3072) + 6), "r (in + out + 1) a map"),
    # The paper's table 1: LoRA of rank 8 on DeBERTa-v3-base, whose layers have these sizes, has 1.33 M, as all six
    # kinds of maps give; AdaLoRA of the same number of triplets, 576, has 1.27 M, because more of them are on the
    # attention's maps, where one is of 1,537 parameters, than on the feed-forward block's, where one is of 3,841.
    Count("bert-base-uncased", 12 * 8 * (8 * 768 + 2 * (768 + 3072) + 6), "8 triplets a map", {"rank": 8}),
    Count("t5-base", 4_868_352, "r (in + out + 1) a map, those of cross-attention too"),
    Count("llama-7b", 29_985_408, "r (in + out + 1) a map, the gate too"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
