"""transformers' own calls on a model while a method is attached."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import peftlib
from peftlib.conformance.case import Case, backbone, logits, supported_family
from peftlib.conformance.checks import assert_same_structure, structure_of
from peftlib.errors import LoadError, StateError
from tests.methods.helpers import perturb

BERT = Case("lora", "bert")
ON_EMBEDDINGS = (
    "fish_mask",
    "lt_sft",
    "child_tuning_f",
    "child_tuning_d",
    "diff_pruning",
    "sam",
    "intrinsic_said",
    "full",
)
PLAIN = ("bitfit", "child_tuning_f", "full", "head")


@pytest.mark.parametrize("method", peftlib.methods())
def test_what_save_pretrained_writes_loads_as_what_it_was_or_is_refused(method, tmp_path):
    case = Case(method, "bert")
    adapted = case.attach()
    perturb(adapted)
    tuned = case.logits(adapted.model)
    if method not in PLAIN:
        for call in (adapted.model.save_pretrained, adapted.model.push_to_hub):
            with pytest.raises(StateError, match=rf"{method} is attached.*adapted\.save\(folder\).*adapted\.merge\(\)"):
                call(tmp_path / "model")
        assert not list(tmp_path.iterdir())
        return
    adapted.model.save_pretrained(tmp_path)
    assert torch.equal(case.logits(AutoModelForSequenceClassification.from_pretrained(tmp_path)), tuned)


@pytest.mark.parametrize("method", ["lora", "full", "krona"])
def test_merged_or_detached_the_model_is_saved_as_ever(method, tmp_path):
    case = Case(method, "bert")
    for leave in ("merge", "detach"):
        adapted = case.attach()
        perturb(adapted)
        model = getattr(adapted, leave)()
        model.save_pretrained(tmp_path / leave)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / leave)
        assert torch.equal(case.logits(loaded), case.logits(model))


def test_while_it_is_disabled_nothing_is_written_or_resized(tmp_path):
    for method in ("lora", "full"):
        adapted = Case(method, "bert").attach()
        with adapted.disabled() as model:
            with pytest.raises(StateError, match=f"{method} is"):
                model.save_pretrained(tmp_path)
            with pytest.raises(StateError, match=f"{method} is disabled"):
                model.resize_token_embeddings(300)


def test_a_deep_copy_refuses_by_itself(tmp_path):
    adapted = BERT.attach()
    twin = copy.deepcopy(adapted.model)
    twin.peftlib_adapted.merge()
    twin.save_pretrained(tmp_path)
    with pytest.raises(StateError, match="lora is attached"):
        adapted.model.save_pretrained(tmp_path)


def test_the_trainer_resumes_from_its_checkpoints_and_saves_no_bare_model(tmp_path):
    adapted = BERT.attach()
    rows = [{k: v[i] for k, v in BERT.batch().items()} for i in range(8)]
    args = TrainingArguments(
        tmp_path,
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(adapted.model, args, train_dataset=rows, callbacks=[adapted.callback()])
    trainer.train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    for cls in (type(adapted.model), AutoModelForSequenceClassification):
        with pytest.raises(Exception, match="of a model to which lora was attached by peftlib"):
            cls.from_pretrained(tmp_path / "checkpoint-2", local_files_only=True)
    with pytest.raises(StateError, match=r"adapted\.save\(folder\)"):
        trainer.save_model(str(tmp_path / "out"))
    state = {n: t.clone() for n, t in adapted.state().items()}
    perturb(adapted)
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(t, state[n]) for n, t in adapted.state().items())


# A vocabulary that grows


def grown(family: str, head: str = "classification") -> torch.nn.Module:
    return resized(backbone(family, head))


def resized(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    model.resize_token_embeddings(260)
    return model


@pytest.mark.parametrize(
    ("method", "family"),
    [
        *((method, supported_family(method)) for method in peftlib.methods()),
        *((method, family) for method in ("lora", "prompt_tuning", "full", "fish_mask") for family in ("llama", "t5")),
    ],
)
def test_the_vocabulary_grows_beside_a_method_or_the_call_is_refused(method, family, tmp_path):
    case = Case(method, family)
    adapted = case.attach()
    perturb(adapted)
    structure = structure_of(adapted.model)
    if method in ON_EMBEDDINGS:
        with pytest.raises(StateError, match="token embeddings"):
            resized(adapted.model)
        assert_same_structure(structure_of(adapted.model), structure)
        return
    resized(adapted.model)
    tuned = case.logits(adapted.model)
    adapted.save(tmp_path)
    loaded = peftlib.load(grown(family), tmp_path)
    assert torch.equal(case.logits(loaded.model), tuned)
    assert loaded.count().total == adapted.count().total
    for one in (adapted, loaded):
        assert torch.equal(case.logits(one.detach()), case.logits(grown(family)))
    with pytest.raises(
        LoadError, match=r"made for a backbone with 260 token embeddings.*resize_token_embeddings\(260\)"
    ):
        peftlib.load(backbone(family), tmp_path)


def test_a_resize_that_fails_leaves_all_as_it_was(monkeypatch):
    adapted = BERT.attach()
    structure, before = structure_of(adapted.model), BERT.logits(adapted.model)
    monkeypatch.setattr(type(adapted.model), "tie_weights", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        resized(adapted.model)
    assert_same_structure(structure_of(adapted.model), structure)
    assert adapted.model.config.vocab_size == adapted.host.anatomy.embeddings.num_embeddings == 256
    assert torch.equal(BERT.logits(adapted.model), before)
    monkeypatch.undo()
    assert resized(adapted.model).get_input_embeddings().num_embeddings == 260


def test_asking_for_the_embeddings_changes_nothing():
    adapted = BERT.attach()
    assert adapted.model.resize_token_embeddings() is adapted.model.get_input_embeddings()


def test_a_file_says_how_large_the_vocabulary_is(tmp_path):
    adapted = peftlib.attach(resized(backbone("bert")), "lora")
    adapted.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["backbone"]["vocabulary"] == 260
    assert logits(peftlib.load(grown("bert"), tmp_path).model, **BERT.inputs()).shape == (8, 2)
