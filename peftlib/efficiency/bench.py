"""What a training step costs with each method, on this machine: beside the frozen backbone, and beside HF peft.

The floor of a method that trains something below the first layer is a frozen backbone that carries gradients from the
loss to its embeddings and computes none for its weights. The contestants take turns, step by step, so that whatever
else the machine does meets all of them; the ratios are medians over the turns.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from peftlib import backbones, taxonomy
from peftlib.adapted import Adapted, attach
from peftlib.methods.base import MethodConfig, SavedAdapter
from peftlib.methods.registry import config, stand_ins


@dataclass(frozen=True)
class Step:
    """One contestant's forward and backward pass: median ``seconds``, median ``ratio`` to the floor's step of the same
    turn, and the ``kept`` bytes that autograd held between forward and backward (parameters not counted)."""

    seconds: float
    ratio: float
    kept: int


@dataclass(frozen=True)
class Row:
    """A method's step, the floor's and, where HF peft is installed and has the method, HF peft's."""

    name: str
    trained: int
    ours: Step
    floor: Step
    peft: Step | None


def cases() -> list[tuple[str, MethodConfig]]:
    """What is measured by default: every method with its defaults, and LoRA on all linear maps."""
    found = [(name, config(name)) for name in taxonomy.methods()]
    found.insert(
        1 + [name for name, _ in found].index("lora"), ("lora, all linear", config("lora", targets="all-linear"))
    )
    return found


def row(
    name: str,
    method: MethodConfig,
    *,
    backbone: str = "minilm-l6",
    batch_size: int = 8,
    length: int = 64,
    turns: int = 7,
    device: str | torch.device | None = None,
) -> Row:
    """Measure one method.

    Args:
        name: the row's label.
        method: the method's config.
        backbone: a name of :func:`peftlib.backbones.load`, given a two-class head and no dropout.
        batch_size, length: rows and tokens of the batch, without padding.
        turns: how many steps each contestant takes, after one that is not counted.
        device: default: CUDA where there is one, else the CPU, with torch's number of threads.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    load = partial(loaded, backbone, device)
    model = load()
    batch = random_batch(model, batch_size, length, torch.Generator().manual_seed(0))
    adapted = attach(model, method, sources=untrained_sources(method.method, load))
    adapted.calibrate([batch])
    adapted.model.train()
    models: dict[str, nn.Module] = {"floor": _floor(load()), "ours": model}
    if (theirs := _peft(load, adapted)) is not None:
        models["peft"] = theirs.to(device).train()
    with adapted.lifecycle(turns + 1) as life:
        life.step_start()
        kept = {who: _kept(m, batch) for who, m in models.items()}
        seconds = take_turns({who: partial(_step, m, batch) for who, m in models.items()}, turns, device)
    steps = {
        who: Step(
            statistics.median(taken),
            statistics.median(mine / floor for mine, floor in zip(taken, seconds["floor"])),
            kept[who],
        )
        for who, taken in seconds.items()
    }
    return Row(name, adapted.count().trained, steps["ours"], steps["floor"], steps.get("peft"))


def loaded(backbone: str, device: torch.device) -> PreTrainedModel:
    """A backbone of :func:`peftlib.backbones.load` without dropout, in training mode on the device."""
    model = backbones.load(backbone, dropout=0.0).model
    cast(nn.Module, model).to(device)  # PreTrainedModel.to has lost its signature
    return model.train()


def untrained_sources(method: str, load: Callable[[], nn.Module]) -> list[SavedAdapter]:
    """As many fresh adapters as the method has to build on."""
    return [attach(load(), source.config).snapshot() for source in stand_ins(method)]


def random_batch(
    model: PreTrainedModel, batch_size: int, length: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Rows of random tokens without padding, with labels of two classes, on the model's device."""
    ids = torch.randint(10, model.config.vocab_size, (batch_size, length), generator=generator)
    labels = torch.randint(0, 2, (batch_size,), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def table(rows: Iterable[Row]) -> Table:
    """The rows as a table for a terminal."""
    rows = list(rows)
    shown = Table(
        title="A training step: forward and backward",
        caption="x floor: time over that of a frozen backbone with gradients to its embeddings "
        f"({1e3 * statistics.median(r.floor.seconds for r in rows):.0f} ms, {_mb(rows[0].floor)} MB kept); "
        "MB kept: held for the backward pass; peft: HF peft",
    )
    shown.add_column("method", no_wrap=True)
    for heading in ("trained", "ms", "x floor", "peft x floor", "MB kept", "peft MB"):
        shown.add_column(heading, justify="right")
    for r in rows:
        theirs = ("", "") if r.peft is None else (f"{r.peft.ratio:.2f}", _mb(r.peft))
        milliseconds = f"{1e3 * r.ours.seconds:.0f}"
        shown.add_row(r.name, f"{r.trained:,}", milliseconds, f"{r.ours.ratio:.2f}", theirs[0], _mb(r.ours), theirs[1])
    return shown


def compare(methods: Iterable[str] = (), *, threads: int = 1, **options: Any) -> Iterator[Row]:
    """Measure methods (default: all of :func:`cases`) one after the other; ``options`` are those of :func:`row`.

    One thread by default: with more, what other processes do on the machine shows in the times.
    """
    wanted = {config(name).method for name in methods}
    chosen = [case for case in cases() if not wanted or case[1].method in wanted]
    for name, method in track(chosen, "measuring", transient=True):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            measured = row(name, method, **options)
        finally:
            torch.set_num_threads(before)
        yield measured


def _mb(step: Step) -> str:
    return f"{step.kept / 2**20:.1f}"


def _floor(model: PreTrainedModel) -> nn.Module:
    for parameter in model.base_model.parameters():
        parameter.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    return model


def _peft(load: Callable[[], PreTrainedModel], adapted: Adapted) -> nn.Module | None:
    """The same method by HF peft, on the same sites; None where it is not installed or has no such method."""
    # peft imports bitsandbytes, which logs that a CPU kernel which nothing here uses is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import peft
    except ImportError:
        return None
    c: Any = adapted.config
    method: Any = adapted.method
    made: peft.PeftConfig
    name, task = adapted.name, peft.TaskType.SEQ_CLS
    if name == "lora":
        modules = sorted({site.path for site in method.updates})
        made = peft.LoraConfig(task_type=task, r=c.rank, lora_alpha=c.alpha, target_modules=modules)
    elif name == "adalora":
        modules = sorted({site.path for site in method.updates})
        made = peft.AdaLoraConfig(
            task_type=task, init_r=c.rank, target_r=c.target_rank, target_modules=modules, total_step=100
        )
    elif name == "ia3":
        sites = adapted.host.anatomy.sites
        inner = sorted({site.path for site in sites(c.inputs)})
        outer = sorted({site.path for site in sites(c.outputs)})
        made = peft.IA3Config(task_type=task, target_modules=[*outer, *inner], feedforward_modules=inner)
    elif name == "prompt_tuning":
        made = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=c.length)
    elif name == "prefix_tuning":
        made = peft.PrefixTuningConfig(
            task_type=task,
            num_virtual_tokens=c.length,
            prefix_projection=c.reparametrize,
            encoder_hidden_size=c.hidden,
        )
    else:
        return None
    return peft.get_peft_model(load(), made)


def _step(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    model(**batch).loss.backward()


def take_turns(steps: Mapping[str, Callable[[], object]], turns: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step in each turn. On a CPU these are the process's CPU seconds divided by the threads, which
    other processes on the machine do not lengthen."""
    seconds: dict[str, list[float]] = {who: [] for who in steps}
    for turn in range(turns + 1):
        for who, step in steps.items():
            start = _now(device)
            step()
            taken = _now(device) - start
            if turn:
                seconds[who].append(taken)
    return seconds


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


def _kept(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves in a forward pass, parameters and buffers not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(found.values())
