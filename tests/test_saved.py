"""Saved adapters: written whole or not at all, read strictly, never unpickled."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftlib
from peftlib import saved as module
from peftlib.conformance.case import Case, backbone, inputs, logits, train
from peftlib.errors import LoadError, StateError
from tests.methods.helpers import perturb

LORA = Case("lora", "bert")


@pytest.fixture
def saved(tmp_path) -> Path:
    return LORA.trained().save(tmp_path / "adapter")


def rewrite(folder: Path, weights: dict | None = None, **changes) -> None:
    """Change what is saved and sign it again, as someone could who knows the format."""
    path = folder / module.CONFIG
    document = {**json.loads(path.read_text()), **changes}
    if weights is not None:
        save_file(weights, folder / module.WEIGHTS, metadata={"format": "pt"})
    document.pop("sha256")
    document["sha256"] = module._sha256(folder / module.WEIGHTS, document)
    path.write_text(json.dumps(document))


def refused(folder: Path, match: str, model: torch.nn.Module | None = None) -> None:
    """Loading raises LoadError and leaves the backbone as it was."""
    model = backbone("bert") if model is None else model
    before = {n: t.clone() for n, t in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(LoadError, match=match):
        peftlib.load(model, folder)
    assert not hasattr(model, "peftlib_adapted")
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags


# Writing


def test_the_file_is_as_large_as_the_count_says(tmp_path):
    adapted = LORA.trained()
    folder = adapted.save(tmp_path / "deep" / "er" / "adapter")
    weights = (folder / "adapter.safetensors").stat().st_size
    count = adapted.count()
    assert count.stored == count.trained == 2 * 2 * 8 * (32 + 32) + count.head
    assert count.stored_bytes == 4 * count.stored
    assert 0 <= weights - count.stored_bytes < 4096
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"], "scratch files are left"


def test_saving_again_replaces_what_was_there(tmp_path):
    first = LORA.trained()
    folder = first.save(tmp_path / "adapter")
    train(first, LORA.batch())
    assert first.save(folder) == folder
    loaded = peftlib.load(backbone("bert"), folder)
    assert torch.equal(LORA.logits(loaded.model), LORA.logits(first.model))
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_an_exception_while_writing_leaves_the_old_one(tmp_path, monkeypatch):
    adapted = LORA.trained()
    folder = adapted.save(tmp_path / "adapter")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    train(adapted, LORA.batch())

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    for broken in ("save_file", "_swap"):
        with monkeypatch.context() as patch:
            patch.setattr(module, broken, fail)
            with pytest.raises(OSError, match="No space"):
                adapted.save(folder)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
        assert [p.name for p in tmp_path.iterdir()] == ["adapter"], "scratch files are left"


def test_without_an_exchange_of_folders_two_renames_do_it(tmp_path, monkeypatch):
    adapted = LORA.trained()
    folder = adapted.save(tmp_path / "adapter")
    train(adapted, LORA.batch())
    monkeypatch.setattr(module, "_exchange", lambda a, b: False)
    adapted.save(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    loaded = peftlib.load(backbone("bert"), folder)
    assert torch.equal(LORA.logits(loaded.model), LORA.logits(adapted.model))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_one(tmp_path):
    """A child saves without end and is killed twenty times at different moments."""
    adapted = LORA.attach()
    folder = adapted.save(tmp_path / "adapter")
    values = list(adapted.trainable().values())
    replaced = 0
    for round_ in range(20):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork() and torch's threads; the child starts none
            child = os.fork()
        if child == 0:
            with torch.no_grad():
                while True:
                    for value in values:
                        value.add_(1.0)
                    adapted.save(folder)
        first = (folder / module.WEIGHTS).stat().st_ino
        while (folder / module.WEIGHTS).stat().st_ino == first:
            time.sleep(0.001)
        time.sleep(0.0037 * round_)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert sorted(p.name for p in folder.iterdir()) == ["adapter.safetensors", "config.json"]
        state = peftlib.load(backbone("bert"), folder).trainable()
        steps = {float((state[n].detach() - p.detach()).mean().round()) for n, p in adapted.trainable().items()}
        assert len(steps) == 1, "the file holds parts of two adapters"
        replaced += steps != {0.0}
    assert replaced >= 10, "the child was killed before it saved anything"


def test_a_folder_with_other_files_or_a_file_is_not_overwritten(tmp_path):
    adapted = LORA.attach()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(StateError, match="holds other files"):
        adapted.save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "x"
    with pytest.raises(StateError, match="is a file"):
        adapted.save(tmp_path / "thesis" / "chapter.tex")


# Reading


def test_the_head_is_kept_and_restored(tmp_path):
    adapted = LORA.trained()
    head = {n: adapted.trainable()[n].detach().clone() for n in adapted.head_names}
    assert head
    folder = adapted.save(tmp_path / "adapter")
    other = peftlib.backbones.load("tiny-bert", seed=5, dropout=0.0).model
    assert not any(torch.equal(dict(other.named_parameters())[n], t) for n, t in head.items() if t.dim() > 1)
    loaded = peftlib.load(other, folder)
    assert all(torch.equal(loaded.trainable()[n], t) for n, t in head.items())
    assert torch.equal(LORA.logits(other), LORA.logits(adapted.model))
    original = {n: t.clone() for n, t in peftlib.backbones.load("tiny-bert", seed=5).model.state_dict().items()}
    loaded.detach()
    assert all(torch.equal(t, original[n]) for n, t in other.state_dict().items()), "detach() keeps the loaded head"


def test_without_a_trained_head_the_file_has_none(tmp_path):
    adapted = LORA.trained(train_head=False)
    folder = adapted.save(tmp_path / "adapter")
    assert not [n for n in load_file(folder / "adapter.safetensors") if "lora" not in n]
    loaded = peftlib.load(backbone("bert"), folder)
    assert loaded.head_names == ()
    assert torch.equal(LORA.logits(loaded.model), LORA.logits(adapted.model))


def test_loaded_it_trains_on(saved):
    loaded = peftlib.load(backbone("bert"), saved)
    before = LORA.logits(loaded.model)
    losses = train(loaded, LORA.batch(), steps=5)
    assert losses[-1] < losses[0]
    assert not torch.equal(LORA.logits(loaded.model), before)


def test_other_weights_under_the_same_shapes_are_a_warning(saved):
    model = backbone("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.weight.mul_(1.1)
    with pytest.warns(UserWarning, match="other weights"):
        peftlib.load(model, saved)


@pytest.mark.parametrize("keep", [0, 10, 100, -100, -1])
def test_a_truncated_weight_file_is_refused(saved, keep):
    path = saved / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(saved, "truncated")


def test_a_changed_byte_is_refused(saved):
    path = saved / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    refused(saved, "changed after saving")


@pytest.mark.parametrize(
    "change", [{"method": "full"}, {"config": {"rank": 8, "alpha": 32.0}}, {"head": []}, {"backbone": {}}]
)
def test_a_changed_config_is_refused(saved, change):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(saved, "changed after saving")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}'])
def test_a_config_that_is_none_is_refused(saved, text):
    (saved / "config.json").write_text(text)
    refused(saved, "config")


def test_another_format_is_refused(saved):
    rewrite(saved, format=2)
    refused(saved, "format 2; this peftlib reads format 1")


@pytest.mark.parametrize("name", ["adapter.safetensors", "config.json"])
def test_a_missing_file_is_refused(saved, name):
    (saved / name).unlink()
    refused(saved, f"has no {name}")


def test_a_folder_that_is_none_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "nowhere has no config.json")


class Trap:
    def __reduce__(self):
        return (open, (str(Trap.path), "w"))

    path: Path


def test_nothing_is_unpickled(saved, tmp_path):
    """A pickle in the place of the weights, even one with a right hash, is not opened."""
    Trap.path = tmp_path / "sprung"
    (saved / "adapter.safetensors").write_bytes(pickle.dumps(Trap()))
    refused(saved, "changed after saving")
    rewrite(saved)
    refused(saved, "not a readable safetensors file")
    torch.save({"x": Trap()}, saved / "adapter.safetensors")
    rewrite(saved)
    refused(saved, "not a readable safetensors file")
    (saved / "adapter.safetensors").rename(saved / "adapter.bin")
    refused(saved, "has no adapter.safetensors")
    assert not Trap.path.exists()


def test_tensors_that_are_missing_left_over_or_misshapen_are_named(saved):
    state = load_file(saved / "adapter.safetensors")
    name = next(n for n in state if n.endswith("lora.A"))
    rewrite(saved, weights={n: t for n, t in state.items() if n != name})
    refused(saved, rf"1 tensors are missing.*{name}")
    rewrite(saved, weights=state | {"bert.more": torch.zeros(2)})
    refused(saved, r"1 are left over.*bert\.more")
    rewrite(saved, weights=state | {name: torch.zeros(3, 3)})
    refused(saved, rf"{name} has shape \(3, 3\)")
    rewrite(saved, weights={n: t for n, t in state.items() if n != "classifier.weight"})
    refused(saved, r"classifier\.weight")


@pytest.mark.parametrize("family", ["roberta", "gpt2", "t5"])
def test_a_file_for_another_backbone_is_refused(saved, family):
    refused(saved, rf"made for a bert backbone.*this is {family}.*Load the backbone it was made for", backbone(family))


def test_a_file_for_another_size_of_the_same_family_is_refused(saved):
    config = backbone("bert").config
    config.hidden_size = 16
    refused(saved, "made for a bert backbone", type(backbone("bert"))(config))


def test_a_head_of_another_size_is_refused(saved):
    model = peftlib.backbones.load("tiny-bert", num_labels=3).model
    refused(saved, r"classifier.*shape \(2.*\) in adapter, \(3.*same number of labels", model)


def test_a_head_in_a_model_without_one_is_refused(saved, tmp_path):
    refused(saved, "BertForSequenceClassification.*BertForMaskedLM", backbone("bert", "masked_lm"))
    folder = Case("lora", "gpt2").trained().save(tmp_path / "gpt2")
    refused(folder, r"score\.weight.*head=False", backbone("gpt2", "causal_lm"))


def test_an_unknown_method_or_option_in_the_file_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())["config"]
    rewrite(saved, method="lorax")
    refused(saved, "does not describe a method of this peftlib.*lorax")
    rewrite(saved, method="lora", config=config | {"depth": 3})
    refused(saved, "depth")
    rewrite(saved, config=config | {"rank": -1})
    refused(saved, "rank")
    rewrite(saved, config="rank 8")
    refused(saved, "does not describe a method")


def test_another_methods_file_does_not_fit(saved):
    """The weights of LoRA under the name of another method."""
    rewrite(saved, method="full", config={"last_layers": None})
    refused(saved, "left over")


def test_loading_onto_an_attached_model_is_an_error(saved):
    model = backbone("bert")
    peftlib.load(model, saved)
    with pytest.raises(StateError, match="lora is already attached"):
        peftlib.load(model, saved)
    assert torch.isfinite(logits(model, **inputs("bert"))).all()


def test_what_is_read_is_what_was_taken(tmp_path):
    adapted = Case("lora", "bert").trained()
    read, taken = peftlib.read(adapted.save(tmp_path / "mine")), adapted.snapshot()
    assert read.name == "mine" and read.config == taken.config == adapted.config
    assert read.head == taken.head and read.backbone == taken.backbone
    assert read.state.keys() == taken.state.keys()
    assert all(torch.equal(read.state[n], taken.state[n]) for n in read.state)
    before = Case("lora", "bert").logits(adapted.model)
    perturb(adapted)
    again = peftlib.load(backbone("bert"), taken)
    assert torch.equal(Case("lora", "bert").logits(again.model), before)


def _save(folder: str, start) -> None:
    adapted = peftlib.attach(peftlib.backbones.load("tiny-bert").model, "lora")
    for turn in range(4):
        start.wait()
        adapted.save(f"{folder}/{turn}/adapter")


@pytest.mark.parametrize("exchanges", [True, False])
def test_several_processes_save_to_one_folder(exchanges, tmp_path, monkeypatch):
    """Both have come as far as putting their folder in its place; threads do here what processes do."""
    rename, meet, start = os.rename, threading.Barrier(2), threading.Barrier(2)

    def together(*names):
        with contextlib.suppress(threading.BrokenBarrierError):
            meet.wait(timeout=0.2)
        return rename(*names)

    monkeypatch.setattr(os, "rename", together)
    if not exchanges:
        monkeypatch.setattr(module, "_exchange", lambda a, b: False)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: _save(str(tmp_path), start), range(2)))
    for turn in range(4):
        assert peftlib.read(tmp_path / str(turn) / "adapter").config.method == "lora"
        assert [p.name for p in (tmp_path / str(turn)).iterdir()] == ["adapter"]
