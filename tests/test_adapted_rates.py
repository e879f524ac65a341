"""Learning rates of parts: the optimizer's groups, in the project's loop and for transformers' Trainer."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

import peftlib
from tests.methods.helpers import backbone, inputs


@pytest.fixture
def adapted(monkeypatch):
    from peftlib.methods.reparameterized.low_rank.lora import LoRA

    def learning_rates(self):
        return {name: 10.0 for name in self.host.trained() if name.endswith("lora.B")}

    monkeypatch.setattr(LoRA, "learning_rates", learning_rates)
    return peftlib.attach(backbone("bert"), "lora")


def rates(adapted, groups):
    by_id = {id(p): group["lr"] for group in groups for p in group["params"]}
    return {name: by_id.pop(id(p)) for name, p in adapted.trainable().items()} | dict.fromkeys(by_id, "left over")


def test_groups_hold_every_trained_parameter_once_at_its_rate(adapted):
    groups = adapted.parameter_groups(1e-3, head_learning_rate=5e-4, weight_decay=0.1)
    assert {group["weight_decay"] for group in groups} == {0.1}
    expected = {
        name: 5e-4 if name in adapted.head_names else 1e-2 if name.endswith("lora.B") else 1e-3
        for name in adapted.trainable()
    }
    assert rates(adapted, groups) == pytest.approx(expected)
    assert rates(adapted, adapted.parameter_groups(1e-3))[adapted.head_names[0]] == 1e-3


def test_a_combination_asks_for_what_its_parts_ask(adapted):
    adapted.detach()
    both = peftlib.attach(backbone("bert"), peftlib.combine("lora", "prompt_tuning"))
    got = rates(both, both.parameter_groups(1e-3))
    assert {n for n, rate in got.items() if rate == pytest.approx(1e-2)} == {n for n in got if n.endswith("lora.B")}


def test_trainer_takes_the_groups(adapted, tmp_path):
    rows = [{k: v[i] for k, v in inputs("bert").items()} | {"labels": torch.tensor(i % 2)} for i in range(3)]
    before = {n: p.detach().clone() for n, p in adapted.trainable().items()}
    optimizer = torch.optim.SGD(adapted.parameter_groups(0.0, head_learning_rate=0.1))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    trainer = Trainer(
        adapted.model, arguments, train_dataset=rows, optimizers=(optimizer, None), callbacks=[adapted.callback()]
    )
    trainer.train()
    moved = {n for n, p in adapted.trainable().items() if not torch.equal(p, before[n])}
    assert moved == set(adapted.head_names)
