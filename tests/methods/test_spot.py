"""SPoT: which source is found, what the target starts from, what is left of the search."""

from dataclasses import replace

import pytest
import torch

import peftlib
from peftlib.conformance.case import backbone, logits, train
from peftlib.errors import UnknownNameError
from peftlib.methods.additive.soft_prompts.spot import similarity
from peftlib.methods.base import ConfigError
from tests.methods.facts import Count, Default, Facts, Holds, Trains


def task(number: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Sixteen texts that end with one of two words, which gives the label; each task has words of its own."""
    ids = torch.randint(20, 60, (16, 6), generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor([0, 1] * 8)
    ids[:, 2:] = (100 + 2 * number + labels)[:, None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def prompt(data, steps=80, seed=0, length=20):
    adapted = peftlib.attach(backbone("bert"), "prompt_tuning", seed=seed, length=length)
    train(adapted, data, steps=steps, rate=0.02)
    return adapted.snapshot()


@pytest.fixture(scope="module")
def library():
    return [replace(prompt(task(i)), name=f"task{i}") for i in range(3)]


def vectors(adapter):
    (found,) = adapter.own.values()
    return found


def test_the_related_source_is_found_among_unrelated_ones(library):
    for i in range(3):
        adapted = peftlib.attach(backbone("bert"), "spot", sources=library, probe_steps=60, probe_rate=0.02)
        adapted.calibrate([task(i, seed=i + 1)])  # other texts than the source had
        assert adapted.method.ranking[0][0] == f"task{i}"
        assert [s for _, s in adapted.method.ranking] == sorted((s for _, s in adapted.method.ranking), reverse=True)
        (start,) = adapted.snapshot().own.values()
        assert torch.equal(start, vectors(library[i]))


def test_nothing_is_left_of_the_probe(library):
    adapted = peftlib.attach(backbone("bert"), "spot", sources=library, probe_steps=3)
    plain = peftlib.attach(backbone("bert"), "prompt_tuning", length=20)
    assert all(torch.equal(p, plain.trainable()[n]) for n, p in adapted.trainable().items())
    adapted.calibrate([task(0)])
    heads = {n: p for n, p in adapted.trainable().items() if n in adapted.head_names}
    assert heads
    assert all(torch.equal(p, plain.trainable()[n]) for n, p in heads.items())
    assert all(p.grad is None for p in adapted.trainable().values())


def test_similarities_by_hand():
    torch.manual_seed(0)
    one, other = torch.randn(3, 5), torch.randn(4, 5)
    pairs = [torch.cosine_similarity(a, b, dim=0) for a in one for b in other]
    assert similarity(one, other, "tokens") == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-6)
    means = torch.cosine_similarity(one.mean(0), other.mean(0), dim=0)
    assert similarity(one, other) == pytest.approx(float(means), abs=1e-6)


def test_the_mean_of_the_nearest_is_weighted_by_similarity(library):
    adapted = peftlib.attach(backbone("bert"), "spot", sources=library, top=2, similarity="tokens", probe_steps=5)
    adapted.calibrate([task(1)])
    (one, a), (two, b) = adapted.method.ranking[:2]
    prompts = {s.name: vectors(s) for s in library}
    (start,) = adapted.snapshot().own.values()
    assert a > b > 0
    torch.testing.assert_close(start, (a * prompts[one] + b * prompts[two]) / (a + b))


def test_a_single_or_named_source_needs_no_search_and_gives_its_logits(library):
    for sources, options in ((library[:1], {}), (library, {"source": "task0"})):
        adapted = peftlib.attach(backbone("bert"), "spot", sources=sources, train_head=False, **options)
        theirs = peftlib.load(backbone("bert"), library[0])
        theirs.model.classifier.load_state_dict(backbone("bert").classifier.state_dict())
        data = {k: v for k, v in task(2).items() if k != "labels"}
        assert adapted.calibrated
        assert torch.equal(logits(adapted.model, **data), logits(theirs.model, **data))


def test_what_does_not_fit_is_named(library):
    model = backbone("bert")
    with pytest.raises(UnknownNameError, match="source of spot 'task9'"):
        peftlib.attach(model, "spot", sources=library, source="task9")
    with pytest.raises(ConfigError, match="top=5 is more than the 3 sources"):
        peftlib.attach(model, "spot", sources=library, top=5)
    short = replace(prompt(task(0), steps=1, length=7), name="short")
    with pytest.raises(ConfigError, match="sources of one length, and 'task0' has length=20, 'short' length=7"):
        peftlib.attach(model, "spot", sources=[library[0], short])
    with pytest.raises(ConfigError, match="2 sources are named 'task0'"):
        peftlib.attach(model, "spot", sources=[library[0], library[0]], source="task0")
    with pytest.raises(UnknownNameError, match="similarity 'cosine'"):
        peftlib.config("spot", similarity="cosine")


# The published facts


def placed(vectors, name):
    """A saved prompt of these vectors."""
    adapted = peftlib.attach(backbone("bert"), "prompt_tuning", length=len(vectors))
    with torch.no_grad():
        adapted.host.trained()["bert.prompt.vectors"].copy_(vectors)
    return replace(adapted.snapshot(), name=name)


def ranked(sources, probe, **options):
    """What is found for a probe of these vectors, and the start."""
    adapted = peftlib.attach(backbone("bert"), "spot", sources=sources, **options)
    adapted.method._probe = lambda batches: probe
    adapted.calibrate([])
    return dict(adapted.method.ranking), adapted.host.trained()["bert.prompt.vectors"].detach()


def check_opposite_is_far():
    torch.manual_seed(0)
    probe, aside = torch.randn(4, 32), torch.randn(4, 32)
    near, start = ranked([placed(-probe, "opposite"), placed(aside, "aside")], probe)
    assert list(near) == ["aside", "opposite"]
    assert near["opposite"] == pytest.approx(-1, abs=1e-6)
    assert torch.equal(start, aside)
    _, start = ranked([placed(-probe, "opposite"), placed(probe + aside, "near")], probe, top=2)
    assert torch.allclose(start, probe + aside)


def check_early_prompts():
    torch.manual_seed(0)
    probe, other = torch.randn(4, 32), torch.randn(4, 32)
    late = [placed(other, "a"), placed(probe, "b")]
    early = [placed(probe, "a early"), placed(other, "b early")]
    near, start = ranked([*late, *early], probe, early=("a early", "b early"))
    assert list(near) == ["a", "b"]
    assert torch.equal(start, other)


FACTS = Facts(
    "spot",
    Default("similarity", "mean", "section 4.1: cosine similarity of average tokens"),
    Default("top", 1, "section 4.2: best of top-k; weighted average with more"),
    Default("early", (), "chosen here; theirs compares prompts of step 10,000, for which early ones must be saved"),
    Default("probe_steps", 100, "chosen here"),
    Default("probe_rate", 1e-2, "chosen here"),
    Holds("the opposite of a prompt is the farthest from it", check_opposite_is_far, "section 4.1: cosine"),
    Holds("prompts are compared early in training", check_early_prompts, "section 4.1: the 10,000th step"),
    Trains(("bert.prompt.vectors",), "section 3: prompt tuning from another start"),
    Count("t5-base", 100 * 768, "section 3: prompts of 100 vectors"),
    Count("roberta-base", 100 * 768, "section 3"),
    Count("llama-7b", 100 * 4096, "section 3"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
