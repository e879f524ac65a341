"""What happens in one call stays in it: whoever calls, however it ends, and whatever runs beside it."""

import copy
import functools
import inspect
import threading

import accelerate
import pytest
import torch

import peftlib
from peftlib import anatomy
from peftlib.conformance.case import Case, logits, supported_family
from peftlib.errors import DataError, StateError
from peftlib.mechanisms import tasks
from tests.methods.helpers import backbone, inputs, perturb

METHODS = peftlib.methods()


def moved(adapted):
    """The model with every trained parameter away from its start."""
    perturb(adapted, std=0.1)
    return adapted.model.eval()


def halves(family):
    """Two batches of unlike rows and lengths."""
    whole = inputs(family)
    return {k: v[:2] for k, v in whole.items()}, {
        k: v[2:, : int(whole["attention_mask"][2].sum())] for k, v in whole.items()
    }


def replica(root):
    """As torch.nn.parallel.replicate does it, on one device."""
    copies = {module: module._replicate_for_data_parallel() for module in root.modules()}
    for module, twin in copies.items():
        for name, child in module._modules.items():
            if child is not None:
                setattr(twin, name, copies[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                twin._parameters[name] = None
            else:
                twin._parameters.pop(name, None)
                setattr(twin, name, parameter.detach().clone().requires_grad_(parameter.requires_grad))
    return copies[root]


@torch.no_grad()
def crossed(model, first, second):
    """What two threads get, of which the second runs as a whole while the first is before its last layer."""
    here, answers = threading.current_thread(), {}
    inside, done = threading.Event(), threading.Event()

    def wait(module, args):
        if threading.current_thread() is not here:
            inside.set()
            assert done.wait(60)

    @torch.no_grad()
    def serve():
        try:
            answers["first"] = model(**first).logits
        finally:
            inside.set()

    handle = anatomy.of(model).layers[-1].module.register_forward_pre_hook(wait)
    thread = threading.Thread(target=serve)
    thread.start()
    assert inside.wait(60)
    try:
        answers["second"] = model(**second).logits
    finally:
        done.set()
        thread.join()
        handle.remove()
    return answers["first"], answers["second"]


@pytest.mark.parametrize("method", METHODS)
def test_a_call_is_the_same_by_forward_beside_another_thread_after_a_failed_one_and_in_a_replica(method):
    with tasks.unnamed_rows(0):
        one = Case(method, supported_family(method))
        _a_call_is_the_same(one, moved(one.attach()))


def _a_call_is_the_same(one, model):
    first, second = halves(one.family)
    want = [logits(model, **given) for given in (first, second)]
    with torch.no_grad():
        torch.testing.assert_close(model.forward(**first).logits, want[0])

    for got, expected in zip(crossed(model, first, second), want, strict=True):
        torch.testing.assert_close(got, expected)

    last = anatomy.of(model).layers[-1].module
    handle = last.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model, **first)
    handle.remove()
    torch.testing.assert_close(logits(model, **second), want[1])

    trained = [p for p in model.parameters() if p.requires_grad]
    if model.forward.refusal:
        with pytest.raises(StateError, match="DistributedDataParallel"):
            replica(model)
        return
    twin = replica(model)
    answer = twin(**first).logits
    torch.testing.assert_close(answer.detach(), want[0])
    answer.square().sum().backward()
    assert all(p.grad is None for p in trained), "the replica computed with parameters of the original"


class Body(torch.nn.Module):
    """A user's model, which calls the body of a backbone and reads its first state."""

    def __init__(self, backbone):
        super().__init__()
        self.body = backbone.base_model

    def forward(self, **given):
        return self.body(**given)[0][:, -1]


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    ("method", "options"), [("moelora", {"tasks": 2, "rank": 8}), ("mpt", {"tasks": 2, "length": 3})]
)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_body_that_is_called_past_its_model_takes_task_ids(family, method, options, direct):
    model = moved(peftlib.attach(backbone(family), method, **options))
    own = Body(model).eval()
    if direct:
        own.body.__call__ = None  # nothing but forward is called
        own.forward = lambda **given: own.body.forward(**given)[0][:, -1]
    given, ids = inputs(family), torch.tensor([0, 1, 1])
    with torch.no_grad():
        mixed = own(**given, task_ids=ids)
        zeros, ones = (own(**given, task_ids=torch.full_like(ids, i)) for i in (0, 1))
        with model.peftlib_adapted.task(1):
            torch.testing.assert_close(own(**given), ones)
        with pytest.raises(DataError, match="serves 2 tasks"):
            own(**given)
    torch.testing.assert_close(mixed, torch.where((ids == 0)[:, None], zeros, ones))
    assert (zeros - ones).abs().min(dim=-1).values.max() > 0


def test_generate_takes_task_ids_for_all_beams_and_the_signature_names_them():
    model = moved(peftlib.attach(backbone("t5", "seq2seq"), "moelora", tasks=2, rank=8))
    assert "task_ids" in inspect.signature(model.forward).parameters
    assert "task_ids" not in inspect.signature(backbone("t5").forward).parameters
    given, ids = inputs("t5"), torch.tensor([1, 0, 1])
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    for more in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        got = model.generate(**given, **settings, **more, task_ids=ids)
        rows = more.get("num_return_sequences", 1)
        for task in (0, 1):
            with model.peftlib_adapted.task(task):
                want = model.generate(**given, **settings, **more)
            mine = (ids == task).repeat_interleave(rows)
            assert torch.equal(got[mine], want[mine])


def test_copies_and_pickles_have_a_forward_and_a_state_of_their_own(tmp_path):
    model = moved(peftlib.attach(backbone("bert"), "prompt_tuning", length=3))
    given = inputs("bert")
    want = logits(model, **given)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        with torch.no_grad():
            next(p for n, p in other.named_parameters() if "prompt" in n).zero_()
            assert not torch.allclose(other.forward(**given).logits, want)
            torch.testing.assert_close(model.forward(**given).logits, want)
        other.peftlib_adapted.detach()
        assert "forward" not in vars(other) and "forward" in vars(model)
        torch.testing.assert_close(logits(model, **given), want)
    model.peftlib_adapted.detach()
    assert not {"forward", "generate", "_replicate_for_data_parallel"} & vars(model).keys()


@pytest.fixture
def accelerate_anew():
    """accelerate keeps one precision a process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_another_library_s_forward_stays_below_and_above(accelerate_anew):
    model = backbone("bert")
    called = []

    @functools.wraps(model.forward)
    def below(*args, **kwargs):
        called.append("below")
        return type(model).forward(model, *args, **kwargs)

    model.forward = below
    plain = logits(model, **inputs("bert"))
    adapted = peftlib.attach(model, "prompt_tuning", length=3)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    assert "input_ids" in inspect.signature(prepared.forward).parameters
    assert not torch.allclose(logits(prepared, **inputs("bert")), plain, atol=1e-3)
    model = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert not torch.allclose(logits(model, **inputs("bert")), plain, atol=1e-3)
    adapted.detach()
    called.clear()
    torch.testing.assert_close(logits(model, **inputs("bert")), plain)
    assert called == ["below"]


@pytest.mark.parametrize("threads", [1, 2])
def test_what_a_backward_pass_in_its_own_thread_repeats_has_the_batch_s_tasks(threads):
    """As on an accelerator, where gradient checkpointing repeats a layer in a thread of autograd's."""
    model = moved(peftlib.attach(backbone("bert"), "moelora", tasks=2, rank=8, dropout=0.0))
    given = inputs("bert") | {"task_ids": torch.tensor([1, 0, 1]), "labels": torch.tensor([0, 1, 0])}
    model(**given).loss.backward()
    names = [n for n, p in model.named_parameters() if p.grad is not None]
    want = [model.get_parameter(n).grad.clone() for n in names]
    model.zero_grad()
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    loss, errors = model(**given).loss, []

    def run(function):
        def caught():
            try:
                function()
            except StateError as error:
                errors.append(error)

        thread = threading.Thread(target=caught)
        thread.start()
        thread.join()

    if threads == 2:
        stay = threading.Event()
        other = threading.Thread(target=lambda: (model(**given), stay.wait(60)))
        other.start()
        while len(model.peftlib_adapted.host.tasks._given._by_thread) < 2:
            pass
    run(loss.backward)
    if threads == 2:
        stay.set()
        other.join()
        assert "2 threads have trained this model" in str(errors[0])
        return
    assert not errors
    for name, gradient in zip(names, want, strict=True):
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def test_a_second_pass_is_plain_also_where_another_library_has_wrapped_the_forward():
    model = peftlib.attach(backbone("bert"), "adamix").model
    inner, calls = model.forward, []

    def wrapped(*args, **kwargs):
        calls.append(kwargs)
        return inner(*args, **kwargs)

    model.forward = wrapped
    model.train()
    with model.peftlib_adapted.lifecycle(1):
        assert model(**inputs("bert"), labels=torch.tensor([0, 1, 0])).loss.isfinite()
    assert len(calls) == 1
