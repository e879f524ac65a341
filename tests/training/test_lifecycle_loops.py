"""Other people's loops: plain PyTorch, accelerate, Lightning, ``transformers.Trainer`` and TRL's end where ``fit``
ends, for one method of every seam, with two batches a step and with one."""

from __future__ import annotations

import functools
import logging
import warnings
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

import peftlib
from peftlib import tasks
from peftlib.conformance.case import LABELS, Case, batch, logits, texts, tokenizer
from peftlib.errors import StateError
from tests.methods.helpers import perturb

STEPS, RATE = 3, 1e-2
SEAMS = {
    "lora": {},
    "prompt_tuning": {},
    "prefix_tuning": {},
    "intrinsic_said": {},
    "bitfit": {},
    "fish_mask": {},
    "adalora": {},
    "increlora": {},
    "moelora": {"tasks": 2, "experts": 2, "rank": 4},
}


def attached(method: str, family: str = "bert", head: str = "classification") -> peftlib.Adapted:
    adapted = Case(method, family, head, options=SEAMS[method]).attach()
    adapted.host.tasks.default = None
    return adapted


def rows(method: str, family: str = "bert", head: str = "classification") -> list[dict[str, torch.Tensor]]:
    data = batch(family, head)
    if "tasks" in SEAMS[method]:
        data["task_ids"] = torch.arange(8) % 2
    return [{k: v[i] for k, v in data.items()} for i in range(8)]


def final(adapted: peftlib.Adapted, method: str) -> torch.Tensor:
    data = {"task_ids": torch.arange(8) % 2} if "tasks" in SEAMS[method] else {}
    return logits(adapted.model, **{k: v for k, v in batch("bert").items() if k != "labels"}, **data)


def loader(method: str, passes: int, *which: str) -> DataLoader:
    return DataLoader(rows(method, *which), batch_size=8 // passes)


@functools.cache
def by_fit(method: str) -> torch.Tensor:
    """Steps of all eight rows at once."""
    adapted = attached(method)

    def task(columns: dict, name: str = "eight") -> tasks.Task:
        made = {"train": Dataset.from_dict(columns)}
        return tasks.Task(name, "classification", made, "custom", ("accuracy",), ("a", "b"))

    data = {"text": texts(), "label": list(LABELS)}
    parts = [{k: v[i::2] for k, v in data.items()} for i in range(2)]
    chosen = (
        tasks.mix([task(part, name) for part, name in zip(parts, ("even", "odd"))])
        if "tasks" in SEAMS[method]
        else task(data)
    )
    options = {"steps": STEPS, "batch_size": 8, "learning_rate": RATE, "warmup": 0.0, "evaluate_on": None}
    peftlib.fit(adapted, chosen, tokenizer=tokenizer("bert"), progress=False, **options)
    return final(adapted, method)


def plainly(adapted: peftlib.Adapted, method: str, passes: int, folder, *which: str) -> None:
    optimizer = torch.optim.AdamW(adapted.trainable().values(), lr=RATE, weight_decay=0.0)
    life = adapted.lifecycle(STEPS, accumulation=passes)
    schedule = life.scheduler(optimizer, peftlib.Schedule("linear"))
    adapted.model.train()
    with life:
        for _ in range(STEPS):
            life.step_start()
            for part in loader(method, passes, *which):
                (adapted.model(**part).loss / passes).backward()
            torch.nn.utils.clip_grad_norm_(adapted.trainable().values(), 1.0)
            life.gradients()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            life.step_end()


def by_accelerate(adapted: peftlib.Adapted, method: str, passes: int, folder) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=passes)
    optimizer = torch.optim.AdamW(adapted.trainable().values(), lr=RATE, weight_decay=0.0)
    life = adapted.lifecycle(STEPS, accumulation=passes)
    schedule = life.scheduler(optimizer, peftlib.Schedule("linear"))
    model, optimizer, batches = accelerator.prepare(adapted.model, optimizer, loader(method, passes))
    model.train()
    with life:
        for _ in range(STEPS):
            life.step_start()
            for part in batches:
                with accelerator.accumulate(model):
                    accelerator.backward(model(**part).loss)
            accelerator.clip_grad_norm_(adapted.trainable().values(), 1.0)
            life.gradients()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            life.step_end()


def by_lightning(adapted: peftlib.Adapted, method: str, passes: int, folder) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.life = adapted.model, adapted.lifecycle(STEPS, accumulation=passes)

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(adapted.trainable().values(), lr=RATE, weight_decay=0.0)
            schedule = self.life.scheduler(optimizer, peftlib.Schedule("linear"))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        def on_train_start(self):
            self.life.__enter__()

        def on_train_batch_start(self, batch, index):
            if index % passes == 0:
                self.life.step_start()

        def training_step(self, part, index):
            return self.model(**part).loss

        def on_before_optimizer_step(self, optimizer):
            torch.nn.utils.clip_grad_norm_(adapted.trainable().values(), 1.0)
            self.life.gradients()

        def on_train_batch_end(self, outputs, batch, index):
            if index % passes == passes - 1:
                self.life.step_end()

        def on_train_end(self):
            self.life.__exit__(None, None, None)

    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = lightning.Trainer(
        max_epochs=STEPS, accelerator="cpu", accumulate_grad_batches=passes, default_root_dir=folder, **quiet
    )
    adapted.model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Module(), loader(method, passes))


def arguments(folder, passes: int, kind=TrainingArguments, **options):
    defaults = {
        "per_device_train_batch_size": 8 // passes,
        "gradient_accumulation_steps": passes,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "linear",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
    }
    return kind(output_dir=str(folder), **(defaults | options))


def by_trainer(adapted: peftlib.Adapted, method: str, passes: int, folder) -> None:
    made = arguments(folder, passes)
    Trainer(adapted.model, made, train_dataset=rows(method), callbacks=[adapted.callback()]).train()


LOOPS = [plainly, by_accelerate, by_lightning, by_trainer]


@pytest.mark.parametrize("method", SEAMS)
@pytest.mark.parametrize("loop", LOOPS)
def test_two_batches_a_step_end_where_fit_ends(loop, method, tmp_path):
    adapted = attached(method)
    start = final(adapted, method)
    loop(adapted, method, 2, tmp_path)
    torch.testing.assert_close(final(adapted, method), by_fit(method), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(start, by_fit(method), atol=1e-3)


@pytest.mark.parametrize("loop", LOOPS)
def test_one_batch_a_step_ends_there_too(loop, tmp_path):
    adapted = attached("adalora")
    loop(adapted, "adalora", 1, tmp_path)
    torch.testing.assert_close(final(adapted, "adalora"), by_fit("adalora"), atol=1e-5, rtol=1e-5)


# Text, of unlike lengths


TEXT = ["lora", "prefix_tuning", "adalora"]


@pytest.mark.parametrize("passes", [1, 2, 3])  # 3: three, three and two rows
@pytest.mark.parametrize("method", TEXT)
def test_seq2seq_trainer_weighs_labels_alike(method, passes, tmp_path):
    one, other = (attached(method, "t5", "seq2seq") for _ in range(2))
    plainly(one, method, 1, tmp_path, "t5", "seq2seq")
    made = arguments(tmp_path, passes, Seq2SeqTrainingArguments, per_device_train_batch_size=-(-8 // passes))
    data = rows(method, "t5", "seq2seq")
    Seq2SeqTrainer(other.model, made, train_dataset=data, callbacks=[other.callback()]).train()
    case = Case(method, "t5", "seq2seq")
    torch.testing.assert_close(case.logits(other.model), case.logits(one.model), atol=1e-5, rtol=1e-4)


def token_lists() -> list[list[int]]:
    data = batch("llama", "causal_lm")
    return [ids[mask.bool()].tolist() for ids, mask in zip(data["input_ids"], data["attention_mask"])]


def sft(adapted: peftlib.Adapted, passes: int, folder):
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        adapted.model,
        arguments(folder, passes, SFTConfig, remove_unused_columns=True, gradient_checkpointing=False),
        train_dataset=Dataset.from_dict({"input_ids": token_lists()}),
        processing_class=tokenizer("llama"),
        callbacks=[adapted.callback()],
    )


def dpo(adapted: peftlib.Adapted, reference, folder):
    from trl import DPOConfig, DPOTrainer

    made = arguments(folder, 1, DPOConfig, gradient_checkpointing=False, beta=0.5, per_device_eval_batch_size=8)
    words = [text.split() for text in texts()]
    pairs = [(" ".join(a[:2]), " " + " ".join(a[2:]), " " + " ".join(b[1:])) for a, b in pairwise(words)]
    data = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in pairs])
    return DPOTrainer(
        adapted.model,
        reference,
        made,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer("llama"),
        callbacks=[adapted.callback()],
    )


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "prefix_tuning", "intrinsic_said"])
def test_sft_trainer_weighs_labels_alike(method, passes, tmp_path):
    one, other = (attached(method, "llama", "causal_lm") for _ in range(2))
    plainly(one, method, 1, tmp_path, "llama", "causal_lm")
    sft(other, passes, tmp_path).train()
    case = Case(method, "llama", "causal_lm")
    torch.testing.assert_close(case.logits(other.model), case.logits(one.model), atol=1e-5, rtol=1e-4)


def likelihood(model, row: dict[str, list[int]], answer: str) -> torch.Tensor:
    """The log probability of an answer."""
    ids = torch.tensor([row["prompt_ids"] + row[answer]])
    found = logits(model, input_ids=ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return found[len(row["prompt_ids"]) - 1 :].sum()


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "prefix_tuning", "intrinsic_said"])
def test_dpo_trainer_compares_with_the_backbone(method, tmp_path):
    adapted, plain = attached(method, "llama", "causal_lm"), Case(method, "llama", "causal_lm").backbone()
    perturb(adapted, std=0.1)
    trainer = dpo(adapted, plain, tmp_path)
    margins = []
    for row in trainer.train_dataset:
        mine, yours = (
            likelihood(model, row, "chosen_ids") - likelihood(model, row, "rejected_ids")
            for model in (adapted.model, plain)
        )
        margins.append(mine - yours)
    expected = -torch.nn.functional.logsigmoid(0.5 * torch.stack(margins)).mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-4)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < expected


@pytest.mark.parametrize("trained", [dpo, sft])
def test_a_penalty_on_a_loss_that_does_not_train_is_refused(trained, tmp_path):
    adapted = attached("adalora", "llama", "causal_lm")
    plain = Case("adalora", "llama", "causal_lm").backbone()
    with pytest.raises(StateError, match=r"adalora adds a penalty to the loss.*the penalty is lost"):
        (trained(adapted, plain, tmp_path) if trained is dpo else sft(adapted, 1, tmp_path)).train()


@pytest.mark.parametrize("method", ["lora", "p_tuning", "prefix_tuning", "moelora"])
def test_a_head_that_is_fused_into_the_loss_sees_the_method(method):
    """TRL's trainers call the model so, and score no logits."""
    from trl.trainer.utils import add_fused_lm_head

    case = Case(method, "llama", "causal_lm", options=SEAMS.get(method, {}))
    adapted, data = case.attach(), case.batch()
    perturb(adapted, std=0.1)
    ids = {"task_ids": torch.arange(8) % 2} if method == "moelora" else {}
    shifted = data["labels"][:, 1:]
    scores = logits(adapted.model, **data, **ids)[:, :-1].log_softmax(-1)
    expected = scores.gather(2, shifted.clamp(min=0)[..., None])[..., 0].masked_fill(shifted == -100, 0)
    add_fused_lm_head(adapted.model)
    found = adapted.model(**data, **ids, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
