"""Sparse values on a frozen tensor, and the exact choice of the largest entries."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peftlib.errors import LoadError, StateError
from peftlib.mechanisms import bits, sparse
from peftlib.mechanisms.host import Host
from tests.methods.helpers import backbone, inputs


def sorted_choice(scores: list[torch.Tensor], k: int) -> list[torch.Tensor]:
    """The k largest by a plain stable sort of all scores."""
    flat = torch.cat([s.flatten() for s in scores])
    chosen = flat.sort(descending=True, stable=True).indices[:k]
    start, pieces = 0, []
    for s in scores:
        inside = chosen[(chosen >= start) & (chosen < start + s.numel())] - start
        pieces.append(inside.sort().values)
        start += s.numel()
    return pieces


@pytest.mark.parametrize("kind", ["spread", "ties", "zeros", "tiny"])
@pytest.mark.parametrize("k", [1, 7, 500, 1234, 1235])
def test_top_entries_are_those_of_a_stable_sort(kind, k):
    generator = torch.Generator().manual_seed(k)
    shapes = [(20, 30), (5,), (7, 90)]
    scores = [torch.rand(s, generator=generator) for s in shapes]
    if kind == "spread":
        scores = [10 ** (60 * s - 40) for s in scores]
    elif kind == "ties":
        scores = [(4 * s).floor() for s in scores]
    elif kind == "zeros":
        scores = [torch.where(s < 0.9, torch.zeros_like(s), s) for s in scores]
    else:
        scores = [s * 1e-41 for s in scores]
    chosen = sparse.top_entries(scores, k)
    assert sum(len(i) for i in chosen) == k
    assert all(torch.equal(a, b) for a, b in zip(chosen, sorted_choice(scores, k)))


def some_entries(tensor: torch.Tensor, count: int = 11) -> torch.Tensor:
    order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(0))
    return order[:count].sort().values


def test_gradients_are_those_of_the_dense_tensors_entries():
    dense, model, data = backbone("gpt2"), backbone("gpt2"), inputs("gpt2")
    data["labels"] = torch.tensor([1, 0, 1])
    host = Host(model)
    names = ["transformer.h.0.mlp.c_fc.weight", "transformer.wte.weight", "transformer.h.1.attn.c_attn.bias"]
    children = {
        n: sparse.train_entries(host, model.get_parameter(n), some_entries(model.get_parameter(n))) for n in names
    }
    dense(**data).loss.backward()
    model(**data).loss.backward()
    for name, child in children.items():
        expected = dense.get_parameter(name).grad.flatten()[child.indices.long()]
        torch.testing.assert_close(child.values.grad, expected, rtol=0, atol=0)
        assert expected.abs().max() > 0


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_nothing_but_the_entries_ever_moves(optimizer):
    model, data = backbone("bert"), inputs("bert")
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    before = weight.detach().clone()
    host = Host(model)
    child = sparse.train_entries(host, weight, some_entries(weight))
    options = {"AdamW": {"lr": 0.1, "weight_decay": 0.5}, "SGD": {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.5}}
    step = getattr(torch.optim, optimizer)([child.values], **options[optimizer])
    for _ in range(4):
        model(**data, labels=torch.tensor([0, 1, 1])).loss.backward()
        step.step()
        step.zero_grad()
    model(**data)
    changed = weight.detach() != before
    assert torch.equal(changed, child.owned)
    assert torch.equal(weight.detach()[child.owned], child.values.detach())
    assert sum(t.numel() for s in step.state.values() for t in s.values() if t.dim()) <= 2 * len(child.indices)
    host.remove()
    assert torch.equal(weight, before)
    assert model.bert.encoder.layer[0].intermediate.dense.weight is weight


class Allocations(TorchDispatchMode):
    """Counts the operations that give a new tensor of one size."""

    def __init__(self, numel: int):
        super().__init__()
        self.numel, self.storages, self.count = numel, set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for out in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(out, torch.Tensor) and out.numel() == self.numel:
                self.count += out.untyped_storage().data_ptr() not in known
        return result


def test_the_forward_makes_no_copy_of_the_tensor():
    weight = nn.Parameter(torch.randn(123, 77), requires_grad=False)
    child = sparse.SparseValues(weight, some_entries(weight))
    with torch.no_grad():
        child.values.add_(1)
    with Allocations(weight.numel()) as seen:
        spliced = child(weight)
    assert seen.count == 0
    assert spliced.data_ptr() == weight.data_ptr()
    assert torch.equal(spliced.flatten()[child.indices.long()], child.values)


def test_a_tied_embedding_stays_tied_and_gets_both_gradients():
    dense, model = backbone("gpt2", "causal_lm"), backbone("gpt2", "causal_lm")
    data = inputs("gpt2")
    data["labels"] = data["input_ids"]
    host = Host(model)
    tied = model.transformer.wte.weight
    assert model.lm_head.weight is tied
    child = sparse.train_entries(host, tied, torch.arange(tied.numel()))
    dense(**data).loss.backward()
    model(**data).loss.backward()
    expected = dense.transformer.wte.weight.grad.flatten()
    torch.testing.assert_close(child.values.grad, expected, rtol=1e-5, atol=1e-7)
    host.remove()
    assert model.lm_head.weight is model.transformer.wte.weight is tied


def test_a_half_precision_tensor_has_values_in_float32_and_starts_bit_identical():
    weight = nn.Parameter(torch.randn(50, 20).bfloat16(), requires_grad=False)
    before = weight.detach().clone()
    child = sparse.SparseValues(weight, some_entries(weight))
    assert child.values.dtype == torch.float32
    child(weight).float().sum().backward()
    assert child.values.grad.dtype == torch.float32
    assert torch.equal(weight, before)


def test_a_weight_that_is_computed_already_is_refused():
    model = backbone("bert")
    host, weight = Host(model), model.bert.encoder.layer[0].output.dense.weight
    sparse.train_entries(host, weight, some_entries(weight))
    with pytest.raises(StateError, match="another method"):
        sparse.train_entries(host, weight, some_entries(weight))


def stored(count: int, family: str = "bert") -> tuple[Host, dict, dict]:
    model = backbone(family)
    host, name = Host(model), "bert.encoder.layer.0.output.dense.weight"
    parameters = {name: model.get_parameter(name)}
    child = sparse.train_entries(host, parameters[name], some_entries(parameters[name], count))
    with torch.no_grad():
        child.values.add_(1)
    return host, parameters, sparse.state(host, {name: child})


@pytest.mark.parametrize(("count", "form"), [(10, "indices"), (64, "indices"), (65, "bits"), (1000, "bits")])
def test_indices_are_stored_in_the_smaller_form(count, form):
    name = "bert.encoder.layer.0.output.dense.weight"  # 2,048 entries: 256 bytes as bits, 4 bytes an index
    _, _, state = stored(count)
    assert set(state) == {f"{name}.values", f"{name}.{form}"}
    size = sum(t.numel() * t.element_size() for t in state.values())
    assert size == sparse.pending(count, 2048)[2] == 4 * count + min(4 * count, 256)
    model = backbone("bert")
    children = sparse.load_state(Host(model), {name: model.get_parameter(name)}, state)
    assert torch.equal(children[name].indices, some_entries(torch.empty(2048), count))
    assert torch.equal(children[name].values, state[f"{name}.values"])


def test_damaged_entries_are_refused():
    name = "bert.encoder.layer.0.output.dense.weight"
    _, _, sound = stored(10)
    _, _, packed = stored(100)
    indices = sound[f"{name}.indices"]

    def load(state: dict, **changes) -> None:
        model = backbone("bert")
        sparse.load_state(Host(model), {name: model.get_parameter(name)}, state | changes)

    load(sound)
    for bad in (indices.flip(0), indices + 2048, indices - 2048, indices.float(), indices[:, None]):
        with pytest.raises(LoadError, match="ascending positions"):
            load(sound, **{f"{name}.indices": bad})
    with pytest.raises(LoadError, match="incomplete"):
        load(sound, **{f"{name}.values": torch.zeros(9)})
    with pytest.raises(LoadError, match="incomplete"):
        load({k: v for k, v in sound.items() if k.endswith("values")})
    with pytest.raises(LoadError, match="uint8 bytes"):
        load(packed, **{f"{name}.bits": bits.pack(torch.ones(2047, dtype=torch.bool))[:-1]})
    with pytest.raises(LoadError, match="does not choose from"):
        load(sound, **{"bert.pooler.dense.weight.values": torch.zeros(3)})
