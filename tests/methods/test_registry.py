"""A method from outside: registered in a file of its own, then used by name in every service."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import pytest
import torch

import peftlib
from peftlib.conformance.case import backbone, batch, logits, train
from peftlib.errors import EntryError, UnknownNameError
from peftlib.methods import registry
from peftlib.taxonomy import YOURS

MODULE = textwrap.dedent(
    '''
    """Scales the output of each feed-forward block."""
    from dataclasses import dataclass

    import torch
    from torch import nn

    import peftlib


    @dataclass(frozen=True)
    class BlockScaleConfig(peftlib.MethodConfig):
        start: float = 1.0


    class Scale(nn.Module):
        def __init__(self, start):
            super().__init__()
            self.s = nn.Parameter(torch.tensor(start))

        def forward(self, x, y):
            return self.s * y


    @peftlib.register(
        entry=peftlib.Entry(
            name="block_scale",
            category="yours",
            title="Block scale",
            cite="mine2026",
            arxiv="",
            summary="One number scales each block.",
            equation="y = s W x",
            symbols="$s$: a number.",
            sites=("ffn.down",),
            form="vector",
            insertion="sequential",
            composition="multiplied",
            trains="One number a layer.",
            count="L",
            start="identity",
            start_note="The number starts at one.",
            merge="no",
            merge_note="Not written.",
            tiny_rate=0.1,
            exceptions={"overfits": "A number a layer is too little for eight texts."},
        )
    )
    class BlockScale(peftlib.Method):
        Config = BlockScaleConfig
        learning_rate = 1e-2

        def attach(self, host):
            for site in host.anatomy.sites("ffn.down"):
                host.after(site, "block_scale", Scale(self.config.start))
    '''
)


CHECKS_THAT_ARE_FAST = ("start", "count", "moves", "save_load", "detach")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The folder with a module that registers a method, imported; afterwards it is as if it had never been."""
    (tmp_path / "my_scales.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    registry.named("my_scales:BlockScale")
    yield tmp_path
    registry._REGISTERED.pop("block_scale")
    peftlib.taxonomy._ENTRY_OF.pop("block_scale")
    sys.modules.pop("my_scales")


def test_it_is_attached_counted_saved_and_loaded_by_name(module):
    assert "block_scale" in peftlib.methods() and peftlib.methods("yours") == ["block_scale"]
    assert peftlib.card("block_scale").origin == "yours"
    assert peftlib.find("block_scale").Config().method == "block_scale"
    adapted = peftlib.attach(backbone("bert"), "block_scale")
    assert adapted.count().method == 2 == peftlib.card("block_scale").trained(L=2)
    train(adapted, batch("bert"))
    answer = logits(adapted.model, **batch("bert"))
    adapted.save(module / "adapter")
    loaded = peftlib.load(backbone("bert"), module / "adapter")
    assert torch.equal(logits(loaded.model, **batch("bert")), answer)
    both = peftlib.attach(backbone("bert"), peftlib.combine("block_scale", "bitfit"))
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
    card = command(module, "card", "my_scales:BlockScale")
    assert card.returncode == 0, card.stderr
    assert "Block scale" in card.stdout and "start=1.0" in card.stdout and "yours" in card.stdout
    suite = command(
        module, *("conformance", "my_scales:BlockScale", "--family", "bert", "gpt2", "--check"), *CHECKS_THAT_ARE_FAST
    )
    assert suite.returncode == 0, suite.stdout[-2000:]
    sweep = command(
        module, *("sweep", "--profile", "smoke", "--methods", "my_scales:BlockScale", "--seeds", "0", "--results", "r")
    )
    assert sweep.returncode == 0, sweep.stderr
    (run,) = (module / "r" / "smoke").glob("*/*.json")
    assert json.loads(run.read_text())["spec"]["method"] == "block_scale"


def test_a_broken_promise_is_seen_by_the_suite(module):
    (module / "my_scales.py").write_text(MODULE.replace('count="L"', 'count="L + 1"'))
    found = command(module, "conformance", "my_scales:BlockScale", "--family", "bert", "--check", "count", "start")
    assert found.returncode == 1
    assert "count on bert" in found.stdout and "start on bert" not in found.stdout


@pytest.mark.parametrize(
    ("method", "match"),
    [("no_such_module:X", "no_such_module"), ("my_scales:BlokScale", "did you mean 'BlockScale'")],
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
    first = peftlib.find("block_scale")
    exec(compile(MODULE, "my_scales", "exec"), {"__name__": "my_scales"})
    assert peftlib.find("block_scale") is not first
    assert peftlib.methods().count("block_scale") == 1
