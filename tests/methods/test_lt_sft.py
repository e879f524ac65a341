"""LT-SFT: the warm-up training, the choice, the rewinding, and vectors that add up."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import peftlib
from peftlib.conformance.case import backbone, batch, logits, train
from peftlib.errors import ConfigError, DataError, LoadError, StateError, TargetError
from tests.methods.facts import Count, Default, Facts, Trains

SCRIPT = "cambridgeltl/composable-sft, examples/token-classification/train_pos_tagging.sh"

FACTS = Facts(
    "lt_sft",
    Default("freeze_norms", True, f"{SCRIPT}: --freeze_layer_norm; every script has it"),
    Default("density", 0.08, f"{SCRIPT}: --ft_params_num 14155776, of 177,853,440 of multilingual BERT"),
    Default("l1", 0.0, f"{SCRIPT}: none; examples/language-modeling/train_mlm.sh has 0.1 in both trainings"),
    Default("first_rate", 5e-5, f"{SCRIPT}: --learning_rate 5e-5"),
    Default("epochs", 3.0, f"{SCRIPT}: --full_ft_max_epochs_per_iteration 3"),
    Trains(
        ("*.parametrizations.weight.0.values", "*.parametrizations.bias.0.values"),
        "cambridgeltl/composable-sft, src/sft/trainer.py: masked gradients of the maskable parameters",
        attach=lambda: attached("bert"),
    ),
    Count("roberta-base", int(0.08 * 124_055_040), "8 % of the parameters below the head"),
    Count("t5-base", int(0.08 * 222_903_552), "8 % of the parameters"),
    Count("llama-7b", int(0.08 * 6_607_343_616), "8 % of the parameters below the output map"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()


def halves(family: str = "bert") -> list[dict]:
    data = batch(family)
    return [{k: v[i : i + 4] for k, v in data.items()} for i in (0, 4)]


def attached(family: str = "bert", batches=None, **options) -> peftlib.Adapted:
    adapted = peftlib.attach(backbone(family), "lt_sft", **{"density": 0.05, **options})
    adapted.calibrate(halves(family) if batches is None else batches)
    return adapted


def dense(adapted: peftlib.Adapted) -> dict[str, torch.Tensor]:
    """Every tensor below the head as it computes now."""
    adapted.model.eval()
    logits(adapted.model, **batch("bert"))
    return {n: p.detach().clone() for n, p in adapted.method.candidates.items()}


def is_norm(name: str) -> bool:
    return "LayerNorm" in name


def fully_trained(epochs: int, rate: float, l1: float = 0.0, norms: bool = False):
    """A plain full fine-tuning: AdamW, linear decay to 0 (composable-sft gives each phase a Trainer's own, without
    warm-up), gradients clipped to norm 1."""
    model, batches = backbone("bert").train(), halves() * epochs
    trained = {n: p for n, p in model.named_parameters() if norms or not is_norm(n)}
    start = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=0)
    for step, part in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate * (len(batches) - step) / len(batches)
        far = sum((p - start[n]).abs().sum() for n, p in trained.items()) / sum(p.numel() for p in model.parameters())
        (model(**part).loss + l1 * far).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for p in model.parameters():
            p.grad = None
    return model


@pytest.mark.parametrize(("l1", "norms"), [(0.0, False), (0.0, True), (200.0, False)])
def test_the_entries_are_those_that_a_full_fine_tuning_moves_most(l1, norms):
    adapted = attached(epochs=2, first_rate=1e-3, l1=l1, freeze_norms=not norms)
    start, end = dict(backbone("bert").named_parameters()), fully_trained(2, 1e-3, l1, norms)
    assert norms == any(is_norm(n) for n in adapted.method.children)
    names = list(adapted.method.candidates)
    assert names == [n for n, _ in end.named_parameters() if n.startswith("bert.")]
    moved = torch.cat([(end.get_parameter(n) - start[n]).abs().flatten() for n in names])
    k = int(0.05 * moved.numel())
    assert adapted.count().method == k
    mine = torch.cat([_mask(adapted, n).flatten() for n in names])
    assert int(mine.sum()) == k
    expected = torch.zeros_like(mine)
    expected[moved.sort(descending=True, stable=True).indices[:k]] = True
    assert int((mine ^ expected).sum()) <= 0.01 * k, "beyond rounding"


def _mask(adapted: peftlib.Adapted, name: str) -> torch.Tensor:
    child = adapted.method.children.get(name)
    shape = adapted.method.candidates[name].shape
    return torch.zeros(shape, dtype=torch.bool) if child is None else child.owned


def test_l1_changes_what_is_chosen_and_draws_the_main_training_to_the_start():
    plain, drawn = attached(epochs=5, first_rate=1e-2), attached(epochs=5, first_rate=1e-2, l1=500.0)
    assert any(not torch.equal(_mask(plain, n), _mask(drawn, n)) for n in plain.method.candidates)
    adapted = attached(l1=7.0)
    train(adapted, batch("bert"), steps=2)
    given, total = batch("bert"), sum(p.numel() for p in backbone("bert").parameters())
    adapted.model.train()
    with adapted.lifecycle(2) as life:
        life.step_start()
        start = {n: p.detach().clone() for n, p in adapted.method.trained_head().items()}
        with torch.no_grad():
            for p in adapted.trainable().values():
                p.add_(0.1)
        loss = adapted.model(**given).loss
        plain_loss = torch.nn.functional.cross_entropy(adapted.model(**given).logits, given["labels"])
    far = sum((c.values - c.original).abs().sum() for c in adapted.method.children.values())
    far = far + sum((p - start[n]).abs().sum() for n, p in adapted.method.trained_head().items())
    assert float((loss - plain_loss).detach()) == pytest.approx(7.0 * float(far.detach()) / total, rel=1e-4)
    assert float(loss.detach()) > float(plain_loss.detach())


@pytest.mark.parametrize("family", ["bert", "t5", "llama", "gpt2"])
def test_norms_are_frozen_in_both_trainings(family):
    adapted, plain = attached(family, density=0.3, first_rate=1e-2), backbone(family)
    train(adapted, batch(family))
    norms = [n for n in adapted.method.candidates if "norm" in n.lower() or ".ln_" in n]
    assert norms
    for name in norms:
        assert name not in adapted.method.children
        assert torch.equal(adapted.model.get_parameter(name), plain.get_parameter(name))


def test_everything_is_rewound_the_head_too_and_the_random_state_is_left_alone():
    state = torch.random.get_rng_state()
    adapted = attached(epochs=5, first_rate=1e-2)
    assert torch.equal(torch.random.get_rng_state(), state)
    plain = backbone("bert")
    assert torch.equal(logits(adapted.model, **batch("bert")), logits(plain, **batch("bert")))
    assert all(torch.equal(t, plain.get_parameter(n)) for n, t in dense(adapted).items())
    assert torch.equal(adapted.model.classifier.weight, plain.classifier.weight)
    assert all(p.grad is None for p in adapted.model.parameters())


def test_the_main_trainings_optimizer_has_states_for_k_values_and_nothing_else_moves():
    adapted = attached()
    count, plain = adapted.count(), backbone("bert")
    optimizer = torch.optim.AdamW(adapted.trainable().values(), lr=0.1, weight_decay=0.5)
    adapted.model.train()
    with adapted.lifecycle(5) as life:
        for _ in range(5):
            life.step_start()
            adapted.model(**batch("bert")).loss.backward()
            life.gradients()
            optimizer.step()
            optimizer.zero_grad()
            life.step_end()
    held = sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.dim())
    assert held == 2 * count.trained
    for name, tensor in dense(adapted).items():
        changed = tensor != plain.get_parameter(name)
        assert not (changed & ~_mask(adapted, name)).any()
    assert sum(int((t != plain.get_parameter(n)).sum()) for n, t in dense(adapted).items()) > 0.99 * count.method


def test_the_warmup_training_reads_as_many_epochs_or_steps_as_it_is_told():
    class Counted(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            for part in super().__iter__():
                self.read = getattr(self, "read", 0) + 1
                yield part

    for options, passes, read in (({"epochs": 3}, 3, 6), ({"epochs": 0.5}, 1, 1), ({"steps": 5}, 3, 5)):
        data = Counted(halves())
        attached(batches=data, **options)
        assert (data.passes, data.read) == (passes, read)
    once = attached(batches=(part for part in halves()), epochs=2)
    again = attached(epochs=2)
    assert all(torch.equal(once.state()[n], t) for n, t in again.state().items())


def test_the_file_holds_k_values_with_their_indices(tmp_path):
    adapted = attached(density=0.01)
    train(adapted, batch("bert"))
    folder, count = adapted.save(tmp_path / "task"), adapted.count()
    tensors = load_file(folder / "adapter.safetensors")
    assert sum(t.numel() for n, t in tensors.items() if n.endswith(".values")) == count.method
    assert sum(t.numel() * t.element_size() for t in tensors.values()) <= 8 * count.method + 4 * count.head
    loaded = peftlib.load(backbone("bert"), folder)
    assert train(loaded, batch("bert")) == train(adapted, batch("bert"))


# Vectors


@pytest.fixture
def folders(tmp_path):
    """A task's and a language's vector, learned on different data, that share some entries."""
    for name, part in zip(("task", "language"), halves()):
        adapted = attached(batches=[part], density=0.1)
        train(adapted, part, steps=4)
        adapted.save(tmp_path / name)
    return tmp_path / "task", tmp_path / "language"


def test_task_and_language_add_exactly_in_either_order(folders):
    start, found = dict(backbone("bert").named_parameters()), []
    vectors = [dense(peftlib.load(backbone("bert"), folder)) for folder in folders]
    for first, second in (folders, folders[::-1]):
        adapted = peftlib.load(backbone("bert"), first)
        peftlib.add_vector(adapted, second)
        found.append(dense(adapted))
    shared = 0
    for name, total in found[0].items():
        zero, task, language = start[name].detach().double(), *(v[name].double() for v in vectors)
        assert torch.equal(total, (zero + (task - zero) + (language - zero)).float())
        assert torch.equal(total, found[1][name])
        assert torch.equal(total[language == zero], vectors[0][name][language == zero]), "not bit for bit"
        shared += int(((task != zero) & (language != zero)).sum())
    assert shared > 100


def test_a_sum_trains_saves_loads_and_leaves_like_any_vector(folders, tmp_path):
    adapted = peftlib.load(backbone("bert"), folders[0])
    alone = adapted.count().method
    head = adapted.model.classifier.weight.clone()
    peftlib.add_vector(adapted, folders[1])
    assert torch.equal(adapted.model.classifier.weight, head)
    assert alone < adapted.count().method < 2 * alone
    loaded = peftlib.load(backbone("bert"), adapted.save(tmp_path / "sum"))
    assert train(loaded, batch("bert")) == train(adapted, batch("bert"))
    plain = backbone("bert").state_dict()
    assert all(torch.equal(t, plain[n]) for n, t in adapted.detach().state_dict().items())


def test_a_vector_of_a_language_model_adds_to_a_classifier(tmp_path):
    data, model = batch("bert", "masked_lm"), backbone("bert", "masked_lm")
    model.bert.load_state_dict(backbone("bert").bert.state_dict(), strict=False)  # all but the pooler
    language = peftlib.attach(model, "lt_sft", density=0.02)
    language.calibrate([data])
    train(language, data)
    folder = language.save(tmp_path / "language")
    adapted = attached()
    before = dense(adapted)
    peftlib.add_vector(adapted, folder)
    assert any(not torch.equal(before[n], t) for n, t in dense(adapted).items())


def test_what_cannot_be_added_is_refused(folders, tmp_path):
    adapted = peftlib.load(backbone("bert"), folders[0])
    before = dense(adapted)
    with pytest.raises(LoadError, match="no config"):
        peftlib.add_vector(adapted, tmp_path / "nowhere")
    lora = peftlib.attach(backbone("bert"), "lora")
    with pytest.raises(LoadError, match="does not choose from"):
        peftlib.add_vector(adapted, lora.save(tmp_path / "lora"))
    with pytest.raises(StateError, match="lora has no sparse vector"):
        peftlib.add_vector(lora, folders[0])
    with pytest.raises(StateError, match="lt_sft has no sparse vector"):
        peftlib.add_vector(peftlib.attach(backbone("bert"), "lt_sft"), folders[0])
    other = backbone("bert")
    with torch.no_grad():
        other.bert.encoder.layer[0].attention.self.query.weight.add_(1)
    elsewhere = peftlib.attach(other, "lt_sft")
    elsewhere.calibrate(halves())
    with pytest.raises(LoadError, match="one backbone only"):
        peftlib.add_vector(adapted, elsewhere.save(tmp_path / "elsewhere"))
    assert all(torch.equal(before[n], t) for n, t in dense(adapted).items())


def test_bad_settings_and_data():
    with pytest.raises(TargetError, match="are not of norms"):
        attached(density=1.0)
    for options in ({"density": 0.0}, {"l1": -1.0}, {"epochs": 0}, {"steps": 0}, {"first_rate": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            attached(**options)
    with pytest.raises(TargetError, match=r"density=1e-07 of \S+ entries is 0"):
        attached(density=1e-7)
    with pytest.raises(DataError, match="warm-up training on: the calibration batches are empty"):
        attached(batches=[])
    with pytest.raises(DataError, match="no labels"):
        attached(batches=[{k: v for k, v in batch("bert").items() if k != "labels"}])
    with pytest.raises(DataError, match="warm-up training is not finite"):
        attached(first_rate=1e30)
