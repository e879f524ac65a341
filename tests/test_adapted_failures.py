"""What fails in the middle leaves the model as it was, and a second try is right."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import peftlib
from peftlib.conformance.case import Case, supported_family
from peftlib.conformance.checks import assert_same_structure, structure_of
from peftlib.mechanisms import tasks
from peftlib.taxonomy import entry
from tests.methods.helpers import perturb

METHODS = peftlib.methods()
MERGING = [name for name in METHODS if entry(name).merge != "no"]
CALIBRATING = [name for name in METHODS if peftlib.find(name).calibrates]


@pytest.fixture(autouse=True)
def rows_are_of_task_zero():
    with tasks.unnamed_rows(0):
        yield


class Fails(TorchDispatchMode):
    """Counts operations, and fails once: at that of number ``at``."""

    def __init__(self, at: int = 0, error: type[BaseException] = torch.OutOfMemoryError):
        super().__init__()
        self.at, self.error, self.seen = at, error, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += 1
        if self.seen == self.at:
            raise self.error("a test's")
        return function(*args, **(kwargs or {}))


def everything(model) -> dict[str, tuple]:
    """Values, flags and gradients of all parameters and buffers, by name."""
    return {n: (t.detach().clone(), t.requires_grad) for n, t in (*model.named_parameters(), *model.named_buffers())}


def assert_untouched(model, structure, before) -> None:
    assert_same_structure(structure_of(model), structure)
    for name, (values, flag) in everything(model).items():
        assert torch.equal(values, before[name][0]), f"{name} has other values"
        assert flag == before[name][1], f"{name} has another flag"


def operations(function) -> int:
    with Fails() as counted:
        function()
    return counted.seen


def fail(function, at: int, error: type[BaseException] = torch.OutOfMemoryError) -> None:
    with pytest.raises(error, match="a test's"), Fails(at, error):
        function()


@pytest.mark.parametrize("method", METHODS)
def test_attach(method):
    case = Case(method, supported_family(method))
    model, other = case.backbone(), case.backbone()
    case.start().detach()  # makes the sources
    total = operations(lambda: case.start(other))
    structure, before = structure_of(model), everything(model)
    for at in sorted({max(1, total // 3), max(1, 2 * total // 3), total}):
        fail(lambda: case.start(model), at)
        assert_untouched(model, structure, before)
    assert case.start(model).state().keys() == case.start().state().keys()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt], ids=["memory", "ctrl-c"])
@pytest.mark.parametrize("method", MERGING)
def test_merge(method, error):
    case = Case(method, supported_family(method))
    twin, adapted = case.attach(), case.attach()
    for one in (twin, adapted):
        perturb(one)
    structure, before = structure_of(adapted.model), everything(adapted.model)
    total = operations(twin.merge)
    for at in sorted({max(1, total // 2), max(1, total - 1)}):
        fail(adapted.merge, at, error)
        assert_untouched(adapted.model, structure, before)
    assert torch.equal(case.logits(adapted.merge()), case.logits(twin.model))


@pytest.mark.parametrize("method", CALIBRATING)
def test_calibrate(method):
    case = Case(method, supported_family(method))
    twin, adapted = case.start(), case.start()
    structure, before = structure_of(adapted.model), everything(adapted.model)
    total = operations(lambda: twin.calibrate([case.batch()]))
    for at in sorted({max(1, total // 2), max(1, total - 2)}):
        fail(lambda: adapted.calibrate([case.batch()]), at)
        assert_untouched(adapted.model, structure, before)
        assert not adapted.calibrated
    adapted.calibrate([case.batch()])
    state = twin.state()
    assert adapted.state().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapted.state().items())


@pytest.mark.parametrize("method", METHODS)
def test_load_and_detach(method):
    case = Case(method, supported_family(method))
    adapted = case.attach()
    perturb(adapted)
    saved, tuned = adapted.snapshot(), case.logits(adapted.model)
    model = case.backbone()
    structure, before = structure_of(model), everything(model)
    other = case.backbone()
    total = operations(lambda: peftlib.load(other, saved))
    for at in (total // 2, total):
        fail(lambda: peftlib.load(model, saved), at)
        assert_untouched(model, structure, before)
    loaded = peftlib.load(model, saved)
    assert torch.equal(case.logits(model), tuned)
    attached = structure_of(model)
    fail(loaded.detach, max(1, operations(adapted.detach) // 2))
    assert_same_structure(structure_of(model), attached)
    loaded.detach()
    assert_untouched(model, structure, before)
