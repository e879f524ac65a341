"""A method from outside, the example of CONTRIBUTING: registered in a file of its own, then used by name everywhere."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

import peftlib
from peftlib.conformance.case import backbone, batch, logits, train
from peftlib.errors import EntryError, UnknownNameError
from peftlib.methods import registry
from peftlib.taxonomy import YOURS
from tests.project import ROOT

MODULE = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL).group(1)
"""The example in CONTRIBUTING."""

METHOD = "my_scale:OutputScaleMethod"
FAST = ("start", "count", "moves", "save_load", "merge", "detach")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The folder with a module that registers a method, imported; afterwards it is as if it had never been."""
    (tmp_path / "my_scale.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    registry.named("my_scale:OutputScaleMethod")
    yield tmp_path
    registry._REGISTERED.pop("output_scale")
    peftlib.taxonomy._ENTRY_OF.pop("output_scale")
    sys.modules.pop("my_scale")


def test_it_is_attached_counted_saved_and_loaded_by_name(module):
    assert "output_scale" in peftlib.methods() and peftlib.methods("yours") == ["output_scale"]
    assert peftlib.card("output_scale").origin == "yours"
    assert peftlib.find("output_scale").Config().method == "output_scale"
    adapted = peftlib.attach(backbone("bert"), "output_scale")
    assert adapted.count().method == 2 * 2 * 32 == peftlib.card("output_scale").trained(L=2, d=32)
    train(adapted, batch("bert"))
    answer = logits(adapted.model, **batch("bert"))
    adapted.save(module / "adapter")
    loaded = peftlib.load(backbone("bert"), module / "adapter")
    assert torch.equal(logits(loaded.model, **batch("bert")), answer)
    both = peftlib.attach(backbone("bert"), peftlib.combine("output_scale", "bitfit"))
    assert both.count().method > 2


def command(folder, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run(
        [sys.executable, "-m", "peftlib.cli", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_commands_take_it_from_its_module(module):
    card = command(module, "card", "my_scale:OutputScaleMethod")
    assert card.returncode == 0, card.stderr
    assert "Output scale" in card.stdout and "targets=('attention.output'" in card.stdout and "yours" in card.stdout
    suite = command(
        module,
        *("conformance", METHOD, "--family", "bert", "gpt2", "--check"),
        *FAST,
    )
    assert suite.returncode == 0, suite.stdout[-2000:]
    sweep = command(
        module,
        *("sweep", "--profile", "smoke", "--methods", METHOD, "--seeds", "0", "--results", "r"),
    )
    assert sweep.returncode == 0, sweep.stderr
    (run,) = (module / "r" / "smoke").glob("*/*.json")
    assert json.loads(run.read_text())["spec"]["method"] == "output_scale"


def test_a_broken_promise_is_seen_by_the_suite(module):
    (module / "my_scale.py").write_text(MODULE.replace('count="2 * L * d"', 'count="2 * L * d + 1"'))
    found = command(module, "conformance", METHOD, "--family", "bert", "--check", "count", "start")
    assert found.returncode == 1
    assert "count on bert" in found.stdout and "start on bert" not in found.stdout


@pytest.mark.parametrize(
    ("method", "match"),
    [("no_such_module:X", "no_such_module"), ("my_scale:OutputScaleMetod", "did you mean 'OutputScaleMethod'")],
)
def test_a_module_or_class_that_is_not_there_is_named(module, method, match):
    with pytest.raises(UnknownNameError, match=match):
        registry.named(method)


@dataclass(frozen=True)
class MineConfig(peftlib.MethodConfig):
    rank: int = 8


class Mine(peftlib.Method):
    Config = MineConfig


def entry(**changes) -> peftlib.Entry:
    return dataclasses.replace(peftlib.card("lora"), **{"name": "mine", "category": YOURS.path, "count": "L"} | changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"name": "lora"}, "entry of lora: name is taken by a method in peftlib.methods.reparameterized.low_rank.lora"),
        ({"category": "my/own"}, "category is 'my/own'; known are additive"),
        ({"count": "L * ranks"}, "count names 'ranks'; known are L, d, .*, rank"),
    ],
)
def test_a_clash_or_a_wrong_field_is_named(changes, match):
    with pytest.raises(EntryError, match=match):
        registry.register(Mine, entry=entry(**changes))
    assert "mine" not in peftlib.methods()


def test_a_source_that_is_no_method_is_named():
    class Built(Mine):
        source_methods = ("lorra",)

    with pytest.raises(EntryError, match="source_methods names 'lorra'"):
        registry.register(Built, entry=entry())


def test_a_class_that_is_no_method_is_refused():
    with pytest.raises(TypeError, match="not a subclass"):
        registry.register(dict, entry=entry())

    class Borrowed(peftlib.Method):
        Config = peftlib.find("lora").Config

    with pytest.raises(TypeError, match="is another method's"):
        registry.register(Borrowed, entry=entry())
    assert peftlib.LoRAConfig().method == "lora"


def test_a_class_that_is_defined_again_takes_the_place_of_the_first(module):
    first = peftlib.find("output_scale")
    exec(compile(MODULE, "my_scale", "exec"), {"__name__": "my_scale"})
    assert peftlib.find("output_scale") is not first
    assert peftlib.methods().count("output_scale") == 1
