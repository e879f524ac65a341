"""Multitask prompt tuning: the decomposition against HF peft, the distillation from teachers, the target phase."""

from dataclasses import replace

import pytest
import torch
from peft import MultitaskPromptTuningConfig, get_peft_model

import peftlib
from peftlib import anatomy
from peftlib.conformance.case import backbone, batch, inputs, logits, train
from peftlib.errors import UnknownNameError
from peftlib.mechanisms.outputs import state_of
from peftlib.methods.base import ConfigError
from tests.methods.facts import Count, Default, Facts, Holds, Start, Trains, normal
from tests.methods.helpers import perturb

IDS = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])


def teacher(seed, **options):
    adapted = peftlib.attach(backbone("bert"), "prompt_tuning", seed=seed, **({"length": 5} | options))
    perturb(adapted, seed=seed)
    return replace(adapted.snapshot(), name=f"teacher{seed}")


def student(sources=(), family="bert", head="classification", **options):
    adapted = peftlib.attach(backbone(family, head), "mpt", sources=sources, **({"length": 5} | options))
    perturb(adapted)
    return adapted, adapted.method.child


@pytest.mark.parametrize(
    ("family", "head", "kind"), [("bert", "classification", "SEQ_CLS"), ("t5", "seq2seq", "SEQ_2_SEQ_LM")]
)
def test_the_same_factors_give_hf_pefts_logits(family, head, kind):
    model = backbone(family, head)
    model._prepare_encoder_decoder_kwargs_for_generation = None  # HF peft wants it for its own generate()
    theirs = get_peft_model(
        model,
        MultitaskPromptTuningConfig(
            task_type=kind, num_virtual_tokens=5, num_tasks=2, num_ranks=3, num_transformer_submodules=1
        ),
    ).eval()
    ours, prompt = student(family=family, head=head, tasks=2, rank=3)
    encoder = theirs.prompt_encoder["default"]
    with torch.no_grad():
        for mine, other in (
            (prompt.shared, encoder.embedding.weight),
            (prompt.u, encoder.prefix_task_cols),
            (prompt.v, encoder.prefix_task_rows),
        ):
            mine.copy_(other.normal_())
        if head == "classification":
            ours.model.classifier.load_state_dict(backbone(family).classifier.state_dict())
        expected = theirs(**inputs(family, head), task_ids=IDS).logits
    got = logits(ours.model, **inputs(family, head), task_ids=IDS)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    numbers = sum(p.numel() for p in encoder.parameters())
    assert ours.count().method == numbers == 5 * 32 + 2 * 3 * (5 + 32)


@torch.no_grad()
def alone(adapter, rows):
    """A teacher's logits, and its last state at the prompt and the text, for some rows of the batch."""
    model = peftlib.load(backbone("bert"), adapter).model
    data = {k: v[rows] for k, v in inputs("bert").items()}
    states = []
    model.bert.encoder.layer[-1].register_forward_hook(lambda m, a, out: states.append(out))
    out = logits(model, **data)
    state = states[0] if isinstance(states[0], torch.Tensor) else states[0][0]
    return out, state


def test_each_row_learns_from_its_tasks_teacher_with_its_head():
    teachers = [teacher(1), teacher(2)]
    ours, prompt = student(teachers)
    data, states = batch("bert"), []
    ours.model.bert.encoder.layer[-1].register_forward_hook(lambda m, a, out: states.append(out))
    plain = ours.model.eval()(**data, task_ids=IDS)
    state = states[0] if isinstance(states[0], torch.Tensor) else states[0][0]
    ours.model.train()
    with ours.lifecycle(1) as life:
        life.step_start()
        loss = ours.model(**data, task_ids=IDS).loss
        loss.backward()
    expected, squares, positions = [], 0.0, 0
    for task, adapter in enumerate(teachers):
        rows = (task == IDS).nonzero().flatten()
        answer, taught = alone(adapter, rows)
        p, log_q = answer.softmax(-1), plain.logits[rows].log_softmax(-1)
        expected.append((p * (p.log() - log_q)).sum(-1))
        for i, row in enumerate(rows):
            n = 5 + int(data["attention_mask"][row].sum())
            squares += float((state[row, :n] - taught[i, :n]).square().mean(-1).sum())
            positions += n
    penalty = 0.9 * (torch.cat(expected).mean() + squares / positions)
    torch.testing.assert_close(loss - plain.loss, penalty, atol=1e-5, rtol=1e-4)
    assert all(p.grad is not None for p in (prompt.shared, prompt.u, prompt.v))
    assert not prompt.distillation.states


def test_the_distributions_are_compared_at_a_temperature():
    teachers = [teacher(1), teacher(2)]
    penalties = {}
    for T in (1.0, 3.0):
        ours, _ = student(teachers, temperature=T)
        plain = ours.model.eval()(**batch("bert"), task_ids=IDS)
        ours.model.train()
        with ours.lifecycle(1):
            loss = ours.model(**batch("bert"), task_ids=IDS).loss
        kl = 0.0
        for task, adapter in enumerate(teachers):
            rows = (task == IDS).nonzero().flatten()
            p, log_q = (alone(adapter, rows)[0] / T).softmax(-1), (plain.logits[rows] / T).log_softmax(-1)
            kl += float((p * (p.log() - log_q)).sum())
        penalties[T] = float(loss - plain.loss) - 0.9 * kl / len(IDS)
    # What is left is the distance of the states, which has no temperature.
    assert penalties[1.0] == pytest.approx(penalties[3.0], abs=1e-5)


def test_two_stacks_are_compared_in_both():
    def prompted(seed):
        adapted = peftlib.attach(backbone("t5", "seq2seq"), "prompt_tuning", length=5, seed=seed)
        perturb(adapted, seed=seed)
        return replace(adapted.snapshot(), name=f"teacher{seed}")

    taught = prompted(1)
    ours, _ = student([taught], family="t5", head="seq2seq")
    data = batch("t5", "seq2seq")

    def states(model):
        """The last states of both stacks, and the model's output."""
        seen, handles = {}, []
        for stack in ("encoder", "decoder"):
            last = [layer for layer in anatomy.of(model).layers if layer.stack == stack][-1].module
            keep = lambda m, a, out, stack=stack: seen.update({stack: state_of(out)})  # noqa: E731
            handles.append(last.register_forward_hook(keep))
        with torch.no_grad():
            output = model.eval()(**data)
        for handle in handles:
            handle.remove()
        return output, seen

    theirs, h = states(peftlib.load(backbone("t5", "seq2seq"), taught).model)
    plain, mine = states(ours.model)
    ours.model.train()
    with ours.lifecycle(1):
        loss = ours.model(**data).loss
    labelled = data["labels"] != -100
    real = torch.nn.functional.pad(data["attention_mask"], (5, 0), value=1).bool()
    p, log_q = theirs.logits.softmax(-1), plain.logits.log_softmax(-1)
    expected = (p * (p.log() - log_q)).sum(-1)[labelled].mean()
    expected += (mine["encoder"] - h["encoder"]).square().mean(-1)[real].mean()
    expected += (mine["decoder"] - h["decoder"]).square().mean(-1)[labelled].mean()
    torch.testing.assert_close(loss - plain.loss, 0.9 * expected, atol=1e-5, rtol=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    teachers = [teacher(1), replace(teacher(1), name="again")]
    ours, prompt = student(teachers)
    with torch.no_grad():
        prompt.shared.copy_(next(iter(teachers[0].own.values())))
        prompt.u.fill_(1)
        prompt.v.fill_(1)
        for name in ours.head_names:
            ours.trainable()[name].copy_(teachers[0].state[name])
    plain = ours.model(**batch("bert"), task_ids=IDS).loss
    ours.model.train()
    with ours.lifecycle(1):
        taught = ours.model(**batch("bert"), task_ids=IDS).loss
    assert float(taught) == pytest.approx(float(plain), abs=1e-6)


def test_the_student_goes_without_its_teachers_and_starts_a_target(tmp_path):
    ours, prompt = student([teacher(1), teacher(2)])
    train(ours, batch("bert") | {"task_ids": IDS})
    folder = ours.save(tmp_path / "sources")
    names = {n.rpartition(".")[2] for n in peftlib.read(folder).own}
    assert names == {"shared", "u", "v"}
    loaded = peftlib.load(backbone("bert"), folder)
    given = inputs("bert") | {"task_ids": IDS}
    assert torch.equal(logits(loaded.model, **given), logits(ours.model, **given))
    loaded.model.train()
    loaded.model(**batch("bert"), task_ids=IDS).loss.backward()

    for options, u in (({}, prompt.u.mean(0)), ({"start": "task", "start_task": 1}, prompt.u[1])):
        target = peftlib.attach(backbone("bert"), "mpt", sources=[folder], length=5, **options)
        made = target.method.child
        assert torch.equal(made.shared, prompt.shared)
        assert made.u.shape[0] == 1
        torch.testing.assert_close(made.u[0], u)
        rates = set(target.method.learning_rates().values())
        assert rates == {4 / 3} and len(target.method.learning_rates()) == 2
    assert not ours.method.learning_rates()
    made = peftlib.attach(backbone("bert"), "mpt", sources=[folder], length=5, start="shared").method.child
    assert torch.equal(made.shared, prompt.shared)
    assert made.u.abs().max() < 0.2
    target.model.train()
    target.model(**batch("bert")).loss.backward()


def test_what_does_not_fit_is_named(tmp_path):
    model = backbone("bert")
    with pytest.raises(ConfigError, match="tasks=3 and 2 teachers"):
        peftlib.attach(model, "mpt", sources=[teacher(1), teacher(2)], tasks=3, length=5)
    with pytest.raises(ConfigError, match="length=100, and the sources have 5"):
        peftlib.attach(model, "mpt", sources=[teacher(1), teacher(2)])
    learned = student(tasks=2)[0].snapshot()
    with pytest.raises(ConfigError, match="starts from one saved mpt"):
        peftlib.attach(model, "mpt", sources=[learned, teacher(1)], length=5)
    with pytest.raises(ConfigError, match="start_task=2: the source has tasks 0 to 1"):
        peftlib.attach(model, "mpt", sources=[learned], length=5, start="task", start_task=2)
    with pytest.raises(ConfigError, match="rank=2 differs"):
        peftlib.attach(model, "mpt", sources=[learned], length=5, rank=2)
    wide = peftlib.backbones.load("tiny-bert", num_labels=3, dropout=0.0).model
    with pytest.raises(ConfigError, match="number of labels"):
        peftlib.attach(wide, "mpt", sources=[teacher(1), teacher(2)], length=5)
    with pytest.raises(UnknownNameError, match="start 'median'"):
        peftlib.config("mpt", start="median")


# The published facts

PEFT = "huggingface/peft, tuners/multitask_prompt_tuning/model.py"


def check_shared_start():
    model = backbone("bert")
    table = anatomy.of(model).embeddings.weight.detach()
    shared = peftlib.attach(model, "mpt", length=20, common=40).method.child.shared
    assert all((table[:40] == vector).all(1).any() for vector in shared)
    assert shared.abs().max() > 0


FACTS = Facts(
    "mpt",
    Default("length", 100, "section 4.1: prompts of 100 vectors"),
    Default("rank", 1, "section 3.2"),
    Default("distill", 0.9, "from memory of section 3.3, not confirmed"),
    Default("task_rate", 4 / 3, "from memory of the appendix, not confirmed: 0.4 for the factors, 0.3 for the prompt"),
    Default("temperature", 1.0, "chosen here; section 3.3 tunes it"),
    Default("start", "mean", "section 3.4"),
    Start("*.prompt.u", normal(0.02), PEFT, {"tasks": 3}),
    Start("*.prompt.v", normal(0.02), PEFT, {"tasks": 3}),
    Holds("the shared prompt starts from embeddings", check_shared_start, f"{PEFT}: a PromptEmbedding"),
    Trains(("*.prompt.shared", "*.prompt.u", "*.prompt.v"), "section 3.2"),
    # 0.035 % of T5-base's parameters a target task, in the abstract: 76,800 + 868 of 222.9 million.
    Count("t5-base", 100 * 768 + 100 + 768, "the abstract's 0.035 %", percent="0.035"),
    Count("roberta-base", 100 * 768 + 100 + 768, "section 3.2"),
    Count("llama-7b", 100 * 4096 + 100 + 4096, "section 3.2"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
