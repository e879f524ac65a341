"""Modules with parametrized tensors in a pickle."""

import pickle

import torch
from torch import nn
from torch.nn.utils import parametrize

from peftlib.conformance.case import backbone, inputs, logits
from peftlib.mechanisms.host import Host


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_a_parametrized_module_comes_back_and_is_taken_back():
    model = backbone("bert")
    plain = logits(model, **inputs("bert"))
    host = Host(model)
    first = model.bert.encoder.layer[0].attention.self.query
    host.parametrize(first.weight, Doubled())
    expected = logits(model, **inputs("bert"))
    assert not torch.equal(expected, plain)
    again = pickle.loads(pickle.dumps(model))
    query = again.bert.encoder.layer[0].attention.self.query
    assert isinstance(query, nn.Linear) and parametrize.is_parametrized(query, "weight")
    assert torch.equal(logits(again, **inputs("bert")), expected)
    parametrize.remove_parametrizations(query, "weight", leave_parametrized=False)
    assert torch.equal(logits(again, **inputs("bert")), plain)
    host.remove()
    assert torch.equal(logits(model, **inputs("bert")), plain)
