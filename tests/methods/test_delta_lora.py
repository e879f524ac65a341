"""Delta-LoRA: the weight's steps written out, its warm-up, what is stored, the way back."""

import pytest
import torch

import peftlib
from peftlib.conformance.case import batch, logits, train
from peftlib.errors import PeftlibError, StateError
from peftlib.methods.base import TrainingState
from tests.methods.facts import Count, Default, Facts, Start, Trains, kaiming_uniform, zeros
from tests.methods.helpers import backbone, inputs, perturb


def product(update):
    """(alpha / r) B A in float64."""
    return 6.0 / 4 * update.B.detach().double() @ update.A.detach().double()


def test_the_weight_moves_by_the_change_of_the_product_after_the_warmup():
    """W is compared, step by step, with the paper's rule in float64 from the factors that the optimizer made:
    W_{t+1} = W_t + lambda (alpha / r) (B_{t+1} A_{t+1} - B_t A_t) for t > K, t from 0 (algorithm 1)."""
    adapted = peftlib.attach(backbone("bert"), "delta_lora", rank=4, alpha=6.0, follow=0.5, warmup=0.4)
    site, update = next(iter(adapted.method.updates.items()))
    weights = [site.weight.detach().clone()]
    products = [product(update)]
    step_end = adapted.method.on_step_end

    def look(training: TrainingState) -> None:
        step_end(training)
        weights.append(site.weight.detach().clone())
        products.append(product(update))

    adapted.method.on_step_end = look
    train(adapted, batch("bert"), steps=10, weight_decay=0.1)
    assert all(torch.equal(weight, weights[0]) for weight in weights[:6])  # K = 4
    for step in range(5, 10):
        expected = weights[step].double() + 0.5 * (products[step + 1] - products[step])
        torch.testing.assert_close(weights[step + 1].double(), expected, atol=1e-7, rtol=1e-6)
    moved = float((weights[10] - weights[5]).abs().max())
    assert moved > 0.01
    total = weights[0].double() + 0.5 * (products[10] - products[5])
    torch.testing.assert_close(site.weight.double(), total, atol=1e-7, rtol=1e-6)
    assert torch.equal(site.weight, weights[0] + 0.5 * update.moved())


def test_the_weight_has_no_gradient_and_no_optimizer_state():
    adapted = peftlib.attach(backbone("bert"), "delta_lora", warmup=0.0)
    weights = [site.module.weight for site in adapted.method.updates]
    optimizer = torch.optim.AdamW([p for p in adapted.model.parameters() if p.requires_grad])
    before = [weight.clone() for weight in weights]
    adapted.model.train()
    with adapted.lifecycle(3) as life:
        for _ in range(3):
            life.step_start()
            adapted.model(**batch("bert")).loss.backward()
            assert all(weight.grad is None for weight in weights)
            life.gradients()
            optimizer.step()
            optimizer.zero_grad()
            life.step_end()
    assert all(not torch.equal(weight, old) for weight, old in zip(weights, before))
    assert not {id(weight) for weight in weights} & {id(p) for p in optimizer.state}


def test_until_the_warmup_ends_it_is_lora():
    def losses(name: str, **options) -> list[float]:
        return train(peftlib.attach(backbone("bert"), name, **options), batch("bert"), steps=10)

    lora, delta, none = losses("lora"), losses("delta_lora", warmup=0.4), losses("delta_lora", follow=0.0)
    assert delta[:5] == pytest.approx(lora[:5], rel=1e-5)
    assert abs(delta[9] - lora[9]) > 1e-4
    assert none == pytest.approx(lora, rel=1e-4)


def test_the_file_holds_low_rank_factors_and_loads_exactly(tmp_path):
    """LoRA's numbers while the weights stand still, twice as many when they have followed; also after a second
    training."""
    adapted = peftlib.attach(backbone("bert"), "delta_lora")
    size = adapted.count()
    assert size.stored == size.trained
    for _ in range(2):
        train(adapted, batch("bert"), steps=5)
        size = adapted.count()
        assert size.stored - size.head == 2 * size.method
        before = logits(adapted.model, **inputs("bert"))
        loaded = peftlib.load(backbone("bert"), adapted.save(tmp_path / "adapter"))
        assert torch.equal(logits(loaded.model, **inputs("bert")), before)
        for mine, other in zip(adapted.method.updates, loaded.method.updates):
            assert torch.equal(mine.weight, other.weight)
    losses = [train(each, batch("bert"), steps=5) for each in (adapted, loaded)]
    assert losses[0] == losses[1]


def test_without_a_copy_of_the_originals(tmp_path):
    adapted = peftlib.attach(backbone("bert"), "delta_lora", keep_original=False)
    train(adapted, batch("bert"), steps=8)
    before = logits(adapted.model, **inputs("bert"))
    with pytest.raises(StateError, match="keep_original=False"):
        adapted.detach()
    loaded = peftlib.load(backbone("bert"), adapted.save(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded.model, **inputs("bert")), before, atol=1e-5, rtol=1e-5)


def test_of_a_fused_projection_only_the_adapted_parts_move():
    model = backbone("gpt2")
    plain = {n: p.clone() for n, p in model.named_parameters()}
    adapted = peftlib.attach(model, "delta_lora", warmup=0.0)
    train(adapted, batch("gpt2"), steps=3)
    fused = next(iter(adapted.method.updates)).module.weight
    owned = {n: mask for n, mask in adapted.host.owned().items() if n.endswith("c_attn.weight")}
    assert len(owned) == 2
    mask = owned["transformer.h.0.attn.c_attn.weight"]
    changed = fused != plain["transformer.h.0.attn.c_attn.weight"]
    assert changed[mask].float().mean() > 0.9
    assert not changed[~mask].any()
    assert [bool(part.all()) for part in mask.chunk(3, dim=1)] == [True, False, True]
    adapted.detach()
    assert all(torch.equal(p, plain[n]) for n, p in model.named_parameters())


def test_the_original_is_kept_once_for_both_parts_of_a_fused_projection():
    adapted = peftlib.attach(backbone("gpt2"), "delta_lora")
    first, second, *_ = adapted.method.originals.values()
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


@torch.no_grad()
def test_merged_are_the_moved_weight_and_the_product():
    adapted = peftlib.attach(backbone("bert"), "delta_lora")
    with torch.enable_grad():
        train(adapted, batch("bert"), steps=5)
    plain = backbone("bert")
    sites = {site: (u.delta(), u.moved()) for site, u in adapted.method.updates.items()}
    adapted.merge()
    for site, (delta, moved) in sites.items():
        expected = plain.get_submodule(site.path).weight + 0.5 * moved + delta
        torch.testing.assert_close(site.weight, expected, atol=1e-6, rtol=1e-5)


def test_combined_with_one_that_writes_the_same_weight():
    both = peftlib.combine("delta_lora", "delta_lora")
    with pytest.raises(PeftlibError, match="wants a place that is taken"):
        peftlib.attach(backbone("bert"), both)
    adapted = peftlib.attach(backbone("bert"), peftlib.combine("delta_lora", "bitfit"))
    perturb(adapted)
    train(adapted, batch("bert"), steps=3)
    assert len(adapted.host.owned()) == 4


@pytest.mark.parametrize("options", [{"warmup": 1.0}, {"warmup": -0.1}, {"follow": -1.0}], ids=str)
def test_values_that_cannot_be(options):
    with pytest.raises(PeftlibError, match=str(next(iter(options.values())))):
        peftlib.config("delta_lora", **options)


# What is published

ALGORITHM = "arXiv:2309.02411, algorithm 1, as copied out in public; the paper itself could not be had again"

FACTS = Facts(
    "delta_lora",
    Default("rank", 8, "arXiv:2309.02411, experiments; read when the method was written"),
    Default("alpha", 16.0, "chosen here, as LoRA's"),
    Default("follow", 0.5, "arXiv:2309.02411, RoBERTa on GLUE; read when the method was written"),
    Default("warmup", 0.06, "chosen here: LoRA's share of warm-up steps on GLUE; the paper's K is its warm-up"),
    Default("targets", ("*attention.query", "*attention.value"), "arXiv:2309.02411; read when the method was written"),
    Start("*.lora.A", kaiming_uniform(), f"{ALGORITHM}: Kaiming initialization"),
    Start("*.lora.B", zeros(), f"{ALGORITHM}: B = 0"),
    Trains(("*.lora.A", "*.lora.B"), f"{ALGORITHM}: W has no gradient"),
    Count("roberta-base", 294_912, "LoRA's"),
    Count("t5-base", 884_736, "LoRA's"),
    Count("llama-7b", 4_194_304, "LoRA's"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
