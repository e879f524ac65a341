"""Methods that build on saved adapters: what they take, and what a file keeps of it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import peftlib
from peftlib.conformance.case import backbone, inputs, logits
from peftlib.errors import LoadError
from peftlib.methods import base
from peftlib.methods.registry import resolve
from tests.methods.helpers import perturb, registered


@dataclass(frozen=True)
class MeanConfig(base.MethodConfig):
    pass


class Mean(base.Method):
    """A method of the kind that averages its sources' LoRA factors."""

    Config = MeanConfig
    source_methods = ("lora",)

    def attach(self, host):
        self.part = resolve(self.sources[0].config)
        self.part.attach(host)
        if self.sources[0].state is not None:
            names = [n for n in self.sources[0].state if n not in self.sources[0].head]
            with torch.no_grad():
                for name, parameter in host.trained().items():
                    if name in names:
                        parameter.copy_(torch.stack([s.state[name] for s in self.sources]).mean(0))


@pytest.fixture
def mean():
    """Registered as a method for the time of a test."""
    with registered(Mean, "mean"):
        yield


def lora(seed: int, **options):
    adapted = peftlib.attach(backbone("bert"), "lora", seed=seed, **options)
    perturb(adapted, seed=seed)
    return adapted


def test_a_method_builds_on_saved_adapters_and_is_loaded_without_them(mean, tmp_path):
    sources = [lora(1).save(tmp_path / "one"), lora(2).snapshot()]
    adapted = peftlib.attach(backbone("bert"), "mean", sources=sources)
    states = [peftlib.read(sources[0]).state, sources[1].state]
    for name, parameter in adapted.trainable().items():
        if name not in adapted.head_names:
            assert torch.equal(parameter, (states[0][name] + states[1][name]) / 2)
    folder = adapted.save(tmp_path / "mean")
    for file in sources[0].iterdir():
        file.unlink()
    loaded = peftlib.load(backbone("bert"), folder)
    assert [s.name for s in loaded.method.sources] == ["one", "lora"]
    assert [s.config for s in loaded.method.sources] == [peftlib.config("lora")] * 2
    assert torch.equal(logits(loaded.model, **inputs("bert")), logits(adapted.model, **inputs("bert")))
    assert peftlib.read(loaded.save(tmp_path / "again")).state.keys() == peftlib.read(folder).state.keys()


def test_sources_that_do_not_fit_are_named(mean, tmp_path):
    model = backbone("bert")
    with pytest.raises(peftlib.ConfigError, match="lora takes no sources, and 1 were given"):
        peftlib.attach(model, "lora", sources=[lora(1).snapshot()])
    with pytest.raises(peftlib.ConfigError, match="mean builds on at least 2 saved adapters of lora, and 1 were given"):
        peftlib.attach(model, "mean", sources=[lora(1).snapshot()])
    wrong = peftlib.attach(backbone("bert"), "bitfit").snapshot()
    with pytest.raises(peftlib.ConfigError, match="'bitfit' is an adapter of bitfit; mean builds on lora"):
        peftlib.attach(model, "mean", sources=[lora(1).snapshot(), wrong])
    other = peftlib.attach(backbone("roberta"), "lora").snapshot()
    with pytest.raises(LoadError, match="made for a roberta backbone"):
        peftlib.attach(model, "mean", sources=[lora(1).snapshot(), other])
    with pytest.raises(LoadError, match=r"has no config\.json"):
        peftlib.attach(model, "mean", sources=[tmp_path, lora(1).snapshot()])
    assert not hasattr(model, "peftlib_adapted")
