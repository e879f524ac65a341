"""What every method must do, one function a check.

A check raises AssertionError where the promise does not hold, ``Declined`` where the method's card says that it cannot
(after having seen that it really cannot), and UnsupportedError where the backbone cannot.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from peftlib.adapted import Adapted, load
from peftlib.conformance.case import ENCODERS, FAMILIES, Case, cut, lm_head, logits, train
from peftlib.errors import MergeError, StateError, UnsupportedError
from peftlib.methods.registry import find
from peftlib.taxonomy import entry


class Declined(Exception):
    """The method's card says that it cannot, and it was seen that it does not."""


@contextlib.contextmanager
def refused(error: type[Exception], match: str) -> Iterator[None]:
    """What happens inside ``with`` must be refused by an error of this kind, whose message matches."""
    said = None
    try:
        yield
    except error as raised:
        said = str(raised)
    assert said is not None, f"no {error.__name__} was raised"
    assert re.search(match, said), f"{error.__name__} says {said!r}, without {match!r}"


@dataclass(frozen=True)
class Check:
    """A row of the matrix. ``families`` is where it runs; None: the first family that the method supports."""

    name: str
    title: str
    run: Callable[[Case, Path], None]
    families: tuple[str, ...] | None
    language_model: bool

    def case(self, method: str, family: str) -> Case:
        return Case(method, family, lm_head(family) if self.language_model else "classification")


CHECKS: dict[str, Check] = {}


def check(title: str, *, families: tuple[str, ...] | None = FAMILIES, language_model: bool = False):
    """Put a function into the table; its name is the check's name."""

    def enter(function: Callable[[Case, Path], None]):
        name = function.__name__
        CHECKS[name] = Check(name, title, function, families, language_model)
        return function

    return enter


# Attaching


@check("The start is as promised")
def start(case: Case, tmp: Path) -> None:
    model = case.backbone()
    before = case.logits(model)
    case.attach(model)
    after = case.logits(model)
    promise = entry(case.method).start
    if promise == "identity":
        assert torch.equal(before, after), f"the start moved the logits by {(after - before).abs().max():.1e}"
        return
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after), f"the card says {promise!r} and the start is the identity"
    if promise == "near":
        distance = float((after - before).norm() / before.norm())
        assert distance < FARTHER.get(case.method, NEAR), f"the start moved the logits by {distance:.2f} of their norm"


@check("The trained parameters are as many as the formula says", families=ENCODERS)
def count(case: Case, tmp: Path) -> None:
    adapted = case.attach()
    parts, size = adapted.host.anatomy, adapted.count()
    values = {
        "L": parts.num_layers,
        "d": parts.d,
        "f": parts.f,
        "H": parts.heads,
        "V": parts.vocabulary,
        "total": size.total - size.head,
        "head": size.head,
        "pooler": int(getattr(parts.base, "pooler", None) is not None),
        "sources": adapted.method.sources,
    }
    card = entry(case.method)
    assert size.method == card.trained(**values, **dataclasses.asdict(case.config)), card.count


@check("The same seed gives the same parameters; the global random state is left alone")
def seed(case: Case, tmp: Path) -> None:
    state = torch.random.get_rng_state()
    first, second, other = (case.attach(seed=s).state() for s in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state), "attach() drew from the global random state"
    assert first.keys() == second.keys()
    # Where a calibration draws, it may choose other tensors with another seed.
    assert first.keys() == other.keys() or find(case.method).calibrates
    assert all(torch.equal(first[n], second[n]) for n in first)


# Training


@check("Every trained parameter moves within three steps, also right after an evaluation pass")
def moves(case: Case, tmp: Path) -> None:
    adapted = case.attach()
    for when in ("at the start", "after an evaluation pass"):
        before = {n: p.detach().clone() for n, p in adapted.trainable().items()}
        dead = set(before)

        def look(step: int, dead: set[str] = dead) -> None:
            dead -= {n for n, p in adapted.trainable().items() if p.grad is not None and p.grad.abs().max() > 0}

        start = 0
        for stage in adapted.method.stages(100):
            train(adapted, case.batch(), steps=3, total=100, start=start, rate=1e-2, watch=[look])
            start += stage.steps
        still = [n for n, p in adapted.trainable().items() if n in before and torch.equal(p, before[n])]
        assert before, "nothing trains"
        assert not dead, f"{when}: no gradient reaches {sorted(dead)[:5]}"
        assert not still, f"{when}: three steps did not move {still[:5]}"
        case.logits(adapted.model)


@check("Only declared parameters get gradients")
def gradients(case: Case, tmp: Path) -> None:
    adapted = case.attach()
    declared = set(adapted.trainable())
    seen: set[str] = set()

    def look(step: int) -> None:
        seen.update(n for n, p in adapted.model.named_parameters() if p.grad is not None)

    train(adapted, case.batch(), watch=[look])
    assert {n for n, p in adapted.model.named_parameters() if p.requires_grad} == set(adapted.trainable())
    assert seen == declared, f"undeclared {sorted(seen - declared)[:5]}, without {sorted(declared - seen)[:5]}"


@check("Frozen parameters and buffers stay bit-identical, with weight decay and momentum on")
def frozen(case: Case, tmp: Path) -> None:
    model = case.backbone()
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    adapted = case.attach(model)
    trained = {id(p) for p in adapted.trainable().values()}
    kept = {n: (t, t.detach().clone()) for n, t in tensors.items() if id(t) not in trained}
    train(adapted, case.batch(), steps=5, weight_decay=0.1)
    # A method may train some entries of a frozen tensor in place; it says which.
    parameters = dict(adapted.model.named_parameters(remove_duplicate=False))
    owned = {id(parameters[n]): mask for n, mask in adapted.host.owned().items()}
    changed = [
        n
        for n, (now, before) in kept.items()
        if not torch.equal(now, torch.where(owned[id(now)], now, before) if id(now) in owned else before)
    ]
    assert not changed, f"{changed[:5]} changed"


@check("A batch of eight is overfitted, the head staying as it is")
def overfits(case: Case, tmp: Path) -> None:
    adapted = case.attach(train_head=False)
    if not adapted.trainable():
        raise Declined("Nothing but a task head trains by gradients.")
    rate = entry(case.method).tiny_rate or max(0.01, 10 * adapted.method.learning_rate)
    data = case.batch()
    for _ in range(15):
        train(adapted, data, steps=20, total=20, rate=rate)
        right = (case.logits(adapted.model).argmax(-1) == data["labels"]).sum()
        if right == len(data["labels"]):
            return
    raise AssertionError(f"after 300 steps {right} of {len(data['labels'])} are right")


@check("Training without the lifecycle is an error where the method acts during training")
def lifecycle(case: Case, tmp: Path) -> None:
    adapted = case.start()
    acts = bool(adapted.method.hooks() or adapted.method.calibrates)
    adapted.model.train()
    if acts:
        with refused(StateError, match=case.method):
            adapted.model(**case.batch())
    else:
        adapted.model(**case.batch()).loss.backward()
    if adapted.method.calibrates:
        with refused(StateError, match="calibrate"), adapted.lifecycle(3):
            pass
    adapted.calibrate([case.batch()])
    called = _watch_hooks(adapted)
    train(adapted, case.batch(), steps=3)
    _assert_called(adapted, called, steps=3, forwards=3)
    if acts:
        adapted.model.train()
        with refused(StateError, match=case.method):
            adapted.model(**case.batch())


# Files


@check("Saved and loaded, the logits are equal; the file holds what was trained and nothing else")
def save_load(case: Case, tmp: Path) -> None:
    model = case.backbone()
    names = {n for n, _ in (*model.named_parameters(), *model.named_buffers())}
    adapted = case.trained()
    before = case.logits(adapted.model)
    folder = adapted.save(tmp / "adapter")
    assert sorted(p.name for p in folder.iterdir()) == ["adapter.safetensors", "config.json"]
    with safetensors.safe_open(folder / "adapter.safetensors", "pt") as file:
        stored = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 - not a dict
    foreign = (stored.keys() & names) - adapted.trainable().keys()
    assert not foreign, f"the file holds frozen parameters: {sorted(foreign)[:5]}"
    size = adapted.count()
    assert sum(t.numel() for t in stored.values()) == size.stored
    assert sum(t.numel() * t.element_size() for t in stored.values()) == size.stored_bytes
    assert set(adapted.head_names) <= stored.keys()
    assert json.loads((folder / "config.json").read_text())["method"] == case.method

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(model, folder)
    assert loaded.config == adapted.config
    after = case.logits(loaded.model)
    assert torch.equal(before, after), f"the logits differ by {(before - after).abs().max():.1e}"
    again = loaded.state()
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[n].cpu(), stored[n]) for n in stored), "saving what was loaded gives another file"


# Leaving


@check("Merged, the outputs are those of the unmerged model (1e-9 in float64, 1e-5 in float32)")
def merge(case: Case, tmp: Path) -> None:
    card = entry(case.method)
    if card.merge == "no":
        adapted = case.trained()
        before = case.logits(adapted.model)
        with refused(MergeError, match=case.method):
            adapted.merge()
        assert torch.equal(case.logits(adapted.model), before), "the refused merge changed the model"
        raise Declined(card.merge_note)
    plain = case.backbone()
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        adapted = case.trained()
        adapted.model.to(dtype)
        before = case.logits(adapted.model)
        assert not torch.allclose(before, case.logits(plain).to(dtype), atol=1e-3), "training changed nothing"
        merged = adapted.merge()
        after = case.logits(merged)
        assert after.dtype == before.dtype
        distance = float((after - before).abs().max() / before.abs().max())
        assert distance < tolerance, f"{dtype}: the logits differ by {distance:.1e} of the largest"
        assert list(merged.state_dict()) == list(plain.state_dict())
        assert_same_structure(structure_of(merged), structure_of(plain))
        with refused(StateError, match="no longer attached"):
            adapted.count()


@check("Detached, the backbone is what it was, bit for bit")
def detach(case: Case, tmp: Path) -> None:
    model = case.backbone()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
    structure = structure_of(model)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    tensors = {n: id(t) for n, t in (*model.named_parameters(), *model.named_buffers())}
    before = case.logits(model)

    adapted = case.attach(model)
    train(adapted, case.batch())
    assert not torch.equal(case.logits(model), before), "training changed nothing"
    assert adapted.detach() is model

    assert list(model.state_dict()) == list(state)
    changed = [n for n, t in model.state_dict().items() if not torch.equal(t, state[n])]
    assert not changed, f"{changed[:5]} changed"
    assert_same_structure(structure_of(model), structure)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert {n: id(t) for n, t in (*model.named_parameters(), *model.named_buffers())} == tensors
    assert torch.equal(case.logits(model), before)
    case.attach(model).detach()


# Running


@check("Padding does not change a sample's result")
def padding(case: Case, tmp: Path) -> None:
    adapted = case.trained()
    data = case.inputs()
    together = logits(adapted.model, **data)
    for row in (0, 5):
        length = int(data["attention_mask"][row].sum())
        alone = logits(adapted.model, **{k: v[row : row + 1, :length] for k, v in data.items()})
        distance = float((alone[0] - together[row]).abs().max() / together.abs().max())
        assert distance < 1e-5, f"row {row} of length {length}: the logits differ by {distance:.1e} of the largest"


@check("generate() with its cache gives what it gives without", language_model=True)
def generate(case: Case, tmp: Path) -> None:
    if case.family in ENCODERS:
        raise UnsupportedError(f"{case.family} models do not generate")
    adapted = case.trained()
    data = {k: v for k, v in case.batch().items() if k in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    one = {k: v[-1:] for k, v in data.items()}
    with_cache, without = (adapted.model.generate(**one, use_cache=u, **options) for u in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences)
    for a, b in zip(with_cache.logits, without.logits):
        assert torch.allclose(a, b, atol=1e-4), f"the logits differ by {(a - b).abs().max():.1e}"
    plain = case.backbone().generate(**one, use_cache=True, **options)
    assert not torch.allclose(plain.logits[0], with_cache.logits[0], atol=1e-3), "generate() ignores the method"


@check("bf16 autocast trains, in float32 parameters, near float32's result")
def autocast(case: Case, tmp: Path) -> None:
    adapted = case.attach()
    dtypes = {p.dtype for p in adapted.trainable().values()}
    finite = []

    def look(step: int) -> None:
        finite.extend(bool(torch.isfinite(p.grad).all()) for p in adapted.trainable().values() if p.grad is not None)

    with torch.autocast("cpu", torch.bfloat16):
        losses = train(adapted, case.batch(), watch=[look])
    assert all(finite)
    assert finite
    assert torch.isfinite(torch.tensor(losses)).all()
    assert {p.dtype for p in adapted.trainable().values()} == dtypes
    exact = case.logits(adapted.model)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = case.logits(adapted.model)
    distance = float((rounded.float() - exact).norm() / exact.norm())
    assert distance < 0.1, f"autocast moves the logits by {distance:.2f} of their norm"


@check("A bf16 backbone keeps the new parameters in float32, and trains")
def bf16_backbone(case: Case, tmp: Path) -> None:
    model = case.backbone().to(torch.bfloat16)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    adapted = case.attach(model)
    assert {p.dtype for p in adapted.trainable().values()} <= {torch.float32}
    losses = train(adapted, case.batch())
    assert torch.isfinite(torch.tensor(losses)).all()
    assert {p.dtype for p in adapted.trainable().values()} <= {torch.float32}
    assert case.logits(model).dtype == torch.bfloat16
    loaded = load(case.backbone().to(torch.bfloat16), adapted.save(tmp / "adapter"))
    assert torch.equal(case.logits(loaded.model), case.logits(model))
    after = adapted.detach().state_dict()
    assert all(t.dtype == before[n].dtype and torch.equal(t, before[n]) for n, t in after.items())


@check("Gradient checkpointing (non-reentrant) gives the same gradients")
def checkpointing(case: Case, tmp: Path) -> None:
    found: list[dict[str, torch.Tensor]] = []
    for on in (False, True):
        torch.manual_seed(0)  # of what the method draws while it trains
        adapted = case.trained()
        if on:
            adapted.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

        def look(step: int, adapted: Adapted = adapted) -> None:
            found.append({n: p.grad.clone() for n, p in adapted.trainable().items() if p.grad is not None})

        torch.manual_seed(0)
        train(adapted, case.batch(), steps=1, watch=[look])
    plain, checkpointed = found
    assert plain
    assert plain.keys() == checkpointed.keys()
    largest = max(float(gradient.abs().max()) for gradient in plain.values())
    for name, gradient in plain.items():
        difference = float((gradient - checkpointed[name]).abs().max())
        assert difference <= 1e-5 * largest, (
            f"{name} differs by {difference:.1e} (the largest gradient is {largest:.1e})"
        )


@check("A deep copy is a model of its own")
def deepcopy(case: Case, tmp: Path) -> None:
    model = case.backbone()
    plain = {n: t.clone() for n, t in model.state_dict().items()}
    adapted = case.attach(model)
    train(adapted, case.batch())
    before = case.logits(model)
    other = copy.deepcopy(model)
    twin = other.peftlib_adapted
    assert twin is not adapted
    assert twin.model is other
    assert torch.equal(case.logits(other), before)
    mine = {id(p) for p in model.parameters()}
    assert twin.trainable().keys() == adapted.trainable().keys()
    assert not mine & {id(p) for p in other.parameters()}

    train(twin, case.batch(), rate=0.05)
    assert not torch.equal(case.logits(other), before), "the copy does not train"
    assert torch.equal(case.logits(model), before), "training the copy changed the original"
    twin.detach()
    assert list(other.state_dict()) == list(plain)
    assert all(torch.equal(t, plain[n]) for n, t in other.state_dict().items())
    assert torch.equal(case.logits(model), before), "detaching the copy changed the original"
    adapted.detach()
    assert all(torch.equal(t, plain[n]) for n, t in model.state_dict().items())


@check("torch.compile takes the whole graph (aot_eager), in training and in evaluation", families=None)
def compiles(case: Case, tmp: Path) -> None:
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        adapted = case.attach(cut(case.backbone(), 1))  # half the time to compile
        model = torch.compile(adapted.model, fullgraph=True, backend="aot_eager") if compiled else adapted.model
        adapted.model.train()
        torch.manual_seed(0)
        with adapted.lifecycle(1) as life:
            life.step_start()
            loss = model(**case.batch()).loss
            loss.backward()
            grads = {n: p.grad.clone() for n, p in adapted.trainable().items() if p.grad is not None}
            life.gradients()
        adapted.model.eval()
        found.append((loss.detach(), grads, logits(model, **case.inputs())))
    torch._dynamo.reset()
    (loss, grads, answer), (loss_, grads_, answer_) = found
    assert torch.allclose(loss, loss_, atol=1e-5)
    assert torch.allclose(answer, answer_, atol=1e-5)
    assert grads.keys() == grads_.keys()
    assert all(torch.allclose(grads[n], grads_[n], atol=1e-4) for n in grads)


@check("transformers' Trainer with the callback runs the training hooks, trains the method, and resumes", families=None)
def trainer(case: Case, tmp: Path) -> None:
    adapted = case.attach()
    before = {n: p.detach().clone() for n, p in adapted.trainable().items()}
    called = _watch_hooks(adapted)
    _train_with_trainer(adapted, case, tmp)
    _assert_called(adapted, called, steps=4, forwards=8)
    still = [n for n, p in adapted.trainable().items() if n in before and torch.equal(p, before[n])]
    assert not still, f"four steps did not move {still[:5]}"
    assert adapted.guard.running is None
    loaded = load(case.backbone(), adapted.save(tmp / "adapter"))
    assert torch.equal(case.logits(loaded.model), case.logits(adapted.model))

    resumed = case.attach()
    _train_with_trainer(resumed, case, tmp, checkpoint=str(tmp / "checkpoint-2"))
    end = adapted.state()
    differ = [n for n, t in resumed.state().items() if not torch.allclose(t.double(), end[n].double(), atol=1e-6)]
    assert not differ, f"resumed from its second step it ends elsewhere: {differ[:5]}"


def _train_with_trainer(adapted: Adapted, case: Case, folder: Path, checkpoint: str | None = None) -> None:
    """Four steps of two forwards each, with a checkpoint after the second."""
    data = case.batch()
    rows = [{k: v[i] for k, v in data.items()} for i in range(len(data["labels"]))]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        save_steps=2,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    run = Trainer(adapted.model, arguments, train_dataset=rows, callbacks=[adapted.callback()])
    with contextlib.redirect_stdout(None):
        run.train(resume_from_checkpoint=checkpoint)
    adapted.model.eval()


# What the checks share

NEAR = 0.25
"""A start that is near the backbone's moves the logits by less than this share of their norm."""

FARTHER: dict[str, float] = {"qlora": 0.6, "qa_lora": 0.6, "sparse_adapter": 0.4}
"""Where a start is near on real backbones and less so on tiny random ones: 4 bits err by a tenth of every weight's
norm, which a random post-norm encoder amplifies; SparseAdapter's norm makes small states as large as any."""


def structure_of(model: nn.Module) -> dict[str, tuple]:
    """Everything of a model but the values: classes, attributes, hooks, shared parameters, attention function."""
    modules = {
        name: (
            type(module).__qualname__,
            tuple(sorted(vars(module))),
            tuple(module._modules),
            tuple(module._parameters),
            tuple(module._buffers),
            tuple(sorted((k, len(v)) for k, v in vars(module).items() if k.endswith("_hooks") and v)),
        )
        for name, module in model.named_modules()
    }
    named = list(model.named_parameters(remove_duplicate=False))
    first = {}
    for name, parameter in named:
        first.setdefault(id(parameter), name)
    shared = tuple((n, first[id(p)]) for n, p in named if first[id(p)] != n)
    modules["(model)"] = (model.config._attn_implementation, shared)
    return modules


def assert_same_structure(now: dict[str, tuple], before: dict[str, tuple]) -> None:
    assert now.keys() == before.keys()
    for name, described in before.items():
        assert now[name] == described, f"{name or 'the model'} is not as it was"


def _watch_hooks(adapted: Adapted) -> Counter:
    """Counts how often each training hook of the attached method is called."""
    called: Counter = Counter()
    for moment in adapted.method.hooks():
        function = getattr(adapted.method, moment)

        def counted(*args, moment: str = moment, function: Callable = function):
            called[moment] += 1
            return function(*args)

        setattr(adapted.method, moment, counted)
    return called


def _assert_called(adapted: Adapted, called: Counter, steps: int, forwards: int) -> None:
    times = {"penalty": forwards, "on_train_end": 1}
    assert dict(called) == {m: times.get(m, steps) for m in adapted.method.hooks()}
