"""Other people's loops: plain PyTorch, accelerate, Lightning, ``transformers.Trainer`` and TRL's end where ``fit`` ends,
for one method of every seam, with two batches a step and with one."""

from __future__ import annotations

import functools
import logging
import warnings

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import peftlib
from peftlib import tasks
from peftlib.conformance.case import LABELS, Case, batch, logits, texts, tokenizer

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


def loader(method: str, passes: int) -> DataLoader:
    return DataLoader(rows(method), batch_size=8 // passes)


@functools.cache
def by_fit(method: str) -> torch.Tensor:
    """Steps of all eight rows at once."""
    adapted = attached(method)
    data = {"text": texts(), "label": list(LABELS), "task_id": [i % 2 for i in range(8)]}
    task = tasks.Task(
        "eight", "classification", {"train": Dataset.from_dict(data)}, "custom", ("accuracy",), ("a", "b")
    )
    if "tasks" in SEAMS[method]:
        both = [{k: v[i::2] for k, v in data.items() if k != "task_id"} for i in range(2)]
        task = tasks.mix(
            [
                tasks.Task(
                    f"part {i}", "classification", {"train": Dataset.from_dict(d)}, "custom", ("accuracy",), ("a", "b")
                )
                for i, d in enumerate(both)
            ]
        )
    options = {"steps": STEPS, "batch_size": 8, "learning_rate": RATE, "warmup": 0.0, "evaluate_on": None}
    peftlib.fit(adapted, task, tokenizer=tokenizer("bert"), progress=False, **options)
    return final(adapted, method)


def plainly(adapted: peftlib.Adapted, method: str, passes: int, folder) -> None:
    optimizer = torch.optim.AdamW(adapted.trainable().values(), lr=RATE, weight_decay=0.0)
    life = adapted.lifecycle(STEPS, accumulation=passes)
    schedule = life.scheduler(optimizer, peftlib.Schedule("linear"))
    adapted.model.train()
    with life:
        for _ in range(STEPS):
            life.step_start()
            for part in loader(method, passes):
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
