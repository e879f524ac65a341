"""MOELoRA: experts weighted by the task of each row, in mixed batches; one update per task, which merges."""

import pytest
import torch

import peftlib
from peftlib import backbones
from peftlib.conformance.case import LABELS, batch, logits, train
from peftlib.errors import DataError, MergeError
from tests.methods.facts import Count, Default, Facts, Start, Trains, kaiming_uniform, normal, zeros
from tests.methods.helpers import Spy, backbone, inputs, linear, perturb

OPTIONS = {"tasks": 3, "rank": 4, "experts": 2, "task_dim": 6, "dropout": 0.0}


def mixture(x, experts, e, W_g, alpha, r):
    """(alpha / r) sum_i omega_i B_i A_i x for x (n, in) of one task: omega = softmax(W_g e), ``experts`` are pairs
    (A_i, B_i)."""
    omega = torch.exp(W_g @ e) / torch.exp(W_g @ e).sum()
    return alpha / r * sum(w * x @ A.T @ B.T for w, (A, B) in zip(omega, experts))


def attached(family="bert", head="classification", **options):
    adapted = peftlib.attach(backbone(family, head), "moelora", **OPTIONS | options)
    perturb(adapted)
    return adapted


@pytest.mark.parametrize("family", ["bert", "gpt2", "opt"])
def test_each_row_gets_its_task_s_mixture_of_experts(family):
    adapted = attached(family, targets=("attention.query", "ffn.up"))
    adapted.model.double()
    sites = list(adapted.method.updates)
    spy = Spy(*(site.module for site in sites))
    tasks = [2, 0, 2]
    data = inputs(family)
    logits(adapted.model, **data, task_ids=torch.tensor(tasks))
    for site, update in adapted.method.updates.items():
        experts = list(zip(update.A.detach().chunk(2), update.B.detach().chunk(2, dim=1)))
        e, W_g = update.gate.embedding.detach(), update.gate.linear.weight.detach()
        x, y = (t.unflatten(0, (3, -1)) if t.dim() == 2 else t for t in spy[site.module])
        for row, task in enumerate(tasks):
            expected = linear(site, x[row]).detach() + mixture(x[row], experts, e[task], W_g, alpha=32.0, r=4)
            torch.testing.assert_close(y[row][..., site.rows], expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("shared_gate", [True, False])
def test_a_mixed_batch_is_each_task_alone(family, shared_gate):
    adapted = attached(family, shared_gate=shared_gate)
    tasks = [1, 2, 1]
    data = inputs(family)
    mixed = logits(adapted.model, **data, task_ids=torch.tensor(tasks))
    answers = []
    for task in range(3):
        with adapted.task(task):
            answers.append(logits(adapted.model, **data))
    assert not torch.allclose(answers[0], answers[1], atol=1e-3)
    torch.testing.assert_close(mixed, torch.stack([answers[t][row] for row, t in enumerate(tasks)]))


def test_opposite_tasks_are_told_apart_by_the_gate():
    """Two tasks with the same texts and opposite labels, which nothing but the gate can tell apart."""
    adapted = peftlib.attach(backbone("bert"), "moelora", **OPTIONS | {"tasks": 2, "shared_gate": True})
    data = {k: torch.cat([v, v]) for k, v in batch("bert").items()}
    data["labels"][len(LABELS) :] = 1 - data["labels"][len(LABELS) :]
    data["task_ids"] = torch.tensor([0, 1]).repeat_interleave(len(LABELS))
    for _ in range(8):
        train(adapted, data, steps=25, rate=0.02)
        given = {k: v for k, v in data.items() if k != "labels"}
        if torch.equal(logits(adapted.model, **given).argmax(-1), data["labels"]):
            break
    else:
        raise AssertionError("200 steps did not tell the tasks apart")
    ((_, weights),) = adapted.method.weights().items()
    assert weights.shape == (2, 2)
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    assert (weights[0] - weights[1]).abs().max() > 0.05


@pytest.mark.parametrize("shared_gate", [True, False])
def test_one_task_is_cut_out_saved_and_merged(shared_gate, tmp_path):
    adapted = attached(shared_gate=shared_gate)
    data = inputs("bert")
    with adapted.task(1):
        expected = logits(adapted.model, **data)
    folder = adapted.save(tmp_path / "all")
    with pytest.raises(MergeError, match=r"each of its 3 tasks.*adapted\.method\.keep\(task\)"):
        adapted.merge()

    adapted.method.keep(1)
    torch.testing.assert_close(logits(adapted.model, **data), expected, atol=1e-6, rtol=1e-6)
    kept = logits(adapted.model, **data, task_ids=torch.tensor([1, 0, 2]))
    torch.testing.assert_close(kept, expected, atol=1e-6, rtol=1e-6)
    alone = adapted.save(tmp_path / "one")
    merged = adapted.merge()
    torch.testing.assert_close(logits(merged, **data), expected, atol=1e-5, rtol=1e-5)

    one = peftlib.load(backbone("bert"), alone)
    assert one.method.tasks == 1
    torch.testing.assert_close(logits(one.model, **data), expected, atol=1e-6, rtol=1e-6)
    every = peftlib.load(backbone("bert"), folder)
    with every.task(1):
        assert torch.equal(logits(every.model, **data), expected)


def test_counts_on_roberta_base():
    model = backbones.shapes("roberta-base")
    for shared, gates in ((True, 1), (False, 72)):
        adapted = peftlib.attach(model, "moelora", tasks=8, shared_gate=shared)
        experts = 12 * 16 * (4 * 2 * 768 + 2 * (768 + 3072))
        assert adapted.count().method == experts + gates * (8 * 64 + 64 * 8)
        assert len(adapted.method.gates) == gates
        adapted.detach()


def test_a_text_is_generated_for_a_task():
    adapted = attached("llama", "causal_lm")
    data = {k: v[:1] for k, v in inputs("llama", 1).items()}
    texts = []
    for task in range(3):
        with adapted.task(task):
            texts.append(adapted.model.generate(**data, max_new_tokens=8, do_sample=False).tolist())
    assert texts[0] != texts[1] or texts[1] != texts[2]


def test_what_cannot_be_is_refused():
    with pytest.raises(peftlib.ConfigError, match=r"rank=6 is not a multiple of experts=4"):
        peftlib.config("moelora", rank=6, experts=4)
    with pytest.raises(peftlib.ConfigError, match="tasks=0"):
        peftlib.config("moelora", tasks=0)
    adapted = attached()
    with pytest.raises(DataError, match="task 3 is not one of this adapter's tasks, 0 to 2"):
        logits(adapted.model, **inputs("bert"), task_ids=torch.tensor([0, 3, 1]))
    with pytest.raises(peftlib.ConfigError, match="task 3 is not here; choose one from 0 to 2"):
        adapted.method.keep(3)


# What is published

RUN = "liuqidong07/MOELoRA-peft, experiments/moelora.bash"
LAYER = "liuqidong07/MOELoRA-peft, src/MLoRA/peft/tuners/mmoelora.py"

FACTS = Facts(
    "moelora",
    Default("rank", 16, RUN),
    Default("experts", 8, RUN),
    Default("dropout", 0.1, RUN),
    Default("alpha", 32.0, "liuqidong07/MOELoRA-peft, src/MLoRA/arguments.py"),
    Default("task_dim", 64, f"{LAYER}, MMOELoraConfig"),
    Default("targets", "all-linear", f"{RUN}: all four linear maps of ChatGLM's layers"),
    Default("shared_gate", True, "chosen here: one gate for all maps, as the runs' class S has"),
    Start("*.moelora.A", normal(0.01), f"{LAYER}, reset_lora_parameters"),
    Start("*.moelora.B", zeros(), f"{LAYER}, reset_lora_parameters"),
    Start("*gate.embedding", normal(1.0), f"{LAYER}, MMOELoraLinear: torch's Embedding", {"tasks": 8}),
    Start("*gate.linear.weight", kaiming_uniform(), f"{LAYER}, Gate: torch's Linear", {"tasks": 8}),
    Trains(("*.moelora.A", "*.moelora.B", "*gate.embedding", "*gate.linear.weight"), LAYER, {"tasks": 3}),
    Count("roberta-base", 12 * 16 * (8 * 768 + 2 * 3840) + 64 + 64 * 8, "r (in + out) a map and the gate, one task"),
    Count("t5-base", 6_488_640, "the same, with cross-attention"),
    Count("llama-7b", 39_977_536, "the same, with the gate of the block"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
