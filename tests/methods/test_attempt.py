"""ATTEMPT: its equation, its weights, its tasks, what is frozen."""

import math
from dataclasses import replace

import pytest
import torch

import peftlib
from peftlib.conformance.case import backbone, batch, inputs, logits, train
from peftlib.errors import UnsupportedError
from peftlib.methods.base import ConfigError
from tests.methods.facts import Count, Default, Facts, Holds, Start, Trains, kaiming_uniform
from tests.methods.helpers import perturb


def prompt(seed, family="bert", **options):
    adapted = peftlib.attach(backbone(family), "prompt_tuning", seed=seed, **({"length": 5} | options))
    perturb(adapted, seed=seed)
    return replace(adapted.snapshot(), name=f"source{seed}")


def attached(family="bert", sources=3, head="classification", **options):
    given = [prompt(seed, family) for seed in range(sources)]
    adapted = peftlib.attach(backbone(family, head), "attempt", sources=given, **options)
    (mixture,) = adapted.host.paths().values()
    return adapted, mixture, [next(iter(s.own.values())) for s in given]


def by_hand(mixture, sources, target, x):
    """The prompt of one text (n, e), as the paper writes it."""
    query = mixture.up.weight @ torch.nn.functional.silu(mixture.down.weight @ x.max(0).values)
    query = (query - query.mean()) / (query.var(unbiased=False) + 1e-5).sqrt()
    prompts = [*sources, target]
    scores = [float(p.max(0).values @ query) / (math.e * x.shape[1]) for p in prompts]
    total = sum(math.exp(s) for s in scores)
    weights = [math.exp(s) / total for s in scores]
    return target + sum(a * p for a, p in zip(weights, prompts)), weights


@torch.no_grad()
def test_equation_and_weights():
    adapted, mixture, sources = attached()
    assert torch.equal(mixture.targets[0], sources[0])
    perturb(adapted)
    table, data = adapted.model.bert.embeddings.word_embeddings, inputs("bert")
    made = mixture(table(data["input_ids"]), data["attention_mask"])
    found = []
    for row in range(8):
        x = table(data["input_ids"][row, : int(data["attention_mask"][row].sum())])
        expected, weights = by_hand(mixture, sources, mixture.targets[0], x)
        torch.testing.assert_close(made[row], expected, atol=1e-5, rtol=1e-5)
        found.append(weights)
    given = mixture.weights(table(data["input_ids"]), data["attention_mask"], mixture.targets.expand(8, -1, -1))
    torch.testing.assert_close(given, torch.tensor(found), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(given.sum(1), torch.ones(8))
    assert (given[0] - given[7]).abs().max() > 1e-3, "the weights do not depend on the instance"


def test_sources_stay_and_the_file_needs_nothing_else(tmp_path):
    adapted, mixture, sources = attached()
    train(adapted, batch("bert"))
    assert torch.equal(mixture.sources, torch.stack(sources))
    trained = {n.rpartition("prompt.")[2] for n in adapted.trainable() if n not in adapted.head_names}
    assert trained == {"targets", "down.weight", "up.weight"}
    loaded = peftlib.load(backbone("bert"), adapted.save(tmp_path / "mixed"))
    assert torch.equal(logits(loaded.model, **inputs("bert")), logits(adapted.model, **inputs("bert")))


def test_each_row_has_its_tasks_target_and_all_share_the_attention():
    adapted, mixture, _ = attached(tasks=2)
    data, ids = batch("bert"), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    adapted.model(**data, task_ids=torch.ones(8, dtype=torch.long)).loss.backward()
    assert mixture.targets.grad[0].abs().max() == 0 < mixture.targets.grad[1].abs().max()
    perturb(adapted)
    given = {k: v for k, v in data.items() if k != "labels"}
    mixed = logits(adapted.model, **given, task_ids=ids)
    for task in (0, 1):
        with adapted.task(task):
            alone = logits(adapted.model, **given)
        assert torch.allclose(mixed[ids == task], alone[ids == task], atol=1e-5)
        assert not torch.allclose(mixed[ids != task], alone[ids != task], atol=1e-3)


def test_beams_keep_their_tasks():
    adapted, _, _ = attached("t5", head="seq2seq", tasks=2)
    perturb(adapted)
    given = {k: v for k, v in inputs("t5").items() if k in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False}
    with adapted.task(1):
        cached, plain = (adapted.model.generate(**given, use_cache=c, **options) for c in (True, False))
    assert torch.equal(cached, plain)


def test_what_cannot_be_is_refused():
    short = prompt(3, length=4)
    with pytest.raises(ConfigError, match="sources of one length, and 'source0' has length=5, 'source3' length=4"):
        peftlib.attach(backbone("bert"), "attempt", sources=[prompt(0), short])
    with pytest.raises(UnsupportedError, match="also what is to be predicted"):
        attached("gpt2", head="causal_lm")
    with pytest.raises(ConfigError, match="temperature=0"):
        peftlib.config("attempt", temperature=0)
    with pytest.raises(ConfigError, match="tasks=0"):
        peftlib.config("attempt", tasks=0)


# The published facts

ASAI = "AkariAsai/ATTEMPT, attempt/third_party/models/t5/modeling_t5.py, T5Stack"


def check_start_and_norm():
    _, mixture, sources = attached()
    assert torch.equal(mixture.targets[0], sources[0])
    assert not [n for n, _ in mixture.named_parameters() if "norm" in n]
    assert mixture.temperature == pytest.approx(math.e * 32)


FACTS = Facts(
    "attempt",
    Default("bottleneck", 100, f"{ASAI}: attn_W_down"),
    Default("temperature", None, "attempt/configs: 2000 or e exp(1) = 2087 on T5-base"),
    Start("*.prompt.down.weight", kaiming_uniform(), f"{ASAI}: nn.Linear"),
    Start("*.prompt.up.weight", kaiming_uniform(), f"{ASAI}: nn.Linear"),
    Holds("the target starts from the first source and the norm is frozen", check_start_and_norm, "run_seq2seq.py"),
    Trains(
        ("*.prompt.targets", "*.prompt.down.weight", "*.prompt.up.weight"),
        "AkariAsai/ATTEMPT, attempt/utils/utils.py, freeze_model_params: attn_W_down, attn_W_up, prefix_shared",
    ),
    # 231,936, which is told of the paper, would be with the norm's 2 e.
    Count("t5-base", 100 * 768 + 2 * 768 * 100, "freeze_model_params: 230,400"),
    Count("roberta-base", 100 * 768 + 2 * 768 * 100, "freeze_model_params"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
