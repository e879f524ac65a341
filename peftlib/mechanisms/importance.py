"""How much each entry of a network's tensors matters to a task, from gradients on a stream of batches.

Three kinds of score, on any backbone: the diagonal of the Fisher information (:func:`per_example`, :func:`per_batch`),
the mean gradient (:func:`per_batch`, "signed"), and the first-order estimate of what setting an entry back would cost
(:func:`first_order`).

Memory does not grow with the number of batches. Beside the model and one forward pass it is one float32 accumulator an
entry and the gradient of a single tensor, which is added and dropped as soon as the backward pass has formed it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import nn

from peftlib.errors import DataError, UnsupportedError
from peftlib.mechanisms.outputs import logits_of

T = TypeVar("T")
Batch = dict[str, torch.Tensor]
Kind = Literal["empirical", "expected"]
Form = Literal["square", "absolute", "signed"]

_FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "square": torch.square,
    "absolute": torch.abs,
    "signed": lambda gradient: gradient,
}


class GradientSums:
    """Inside ``with``, each backward pass adds ``weight * f(gradient)`` of the parameters to ``sums``.

    ``form`` says what f is: "square", "absolute" or "signed" (the gradient itself). ``max_norm`` first scales each
    tensor's gradient down to that norm, ``max_total_norm`` all of them together with those of ``beside``; the latter
    takes a backward pass of its own. The parameters require gradients inside only, and keep none.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        form: Form = "square",
        max_norm: float | None = None,
        max_total_norm: float | None = None,
        beside: Iterable[nn.Parameter] = (),
    ):
        self.parameters = list(parameters)
        self.beside = list(beside)
        self.sums = [torch.zeros(p.shape, device=p.device) for p in self.parameters]
        self.form = _FORMS[form]
        self.max_norm = max_norm
        self.max_total_norm = max_total_norm
        self.weight: float | torch.Tensor = 1.0
        self.passes = 0
        self._squares: list[torch.Tensor] | None = None
        self._scale: float | torch.Tensor = 1.0

    def __enter__(self) -> GradientSums:
        every = [*self.parameters, *self.beside]
        self._flags = [p.requires_grad for p in every]
        for parameter in every:
            parameter.requires_grad_(True)
        self._hooks = [
            p.register_post_accumulate_grad_hook(partial(self._add, total))
            for p, total in zip(every, [*self.sums, *(None for _ in self.beside)])
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for parameter, flag in zip([*self.parameters, *self.beside], self._flags):
            parameter.requires_grad_(flag)

    def backward(self, loss: torch.Tensor, again: bool = False) -> None:
        """One backward pass, into these parameters only; ``again`` keeps the graph for another one."""
        if self.max_total_norm is not None:
            self._squares = []
            loss.backward(inputs=[*self.parameters, *self.beside], retain_graph=True)
            norm = torch.stack(self._squares).sum().sqrt()
            self._squares, self._scale = None, (self.max_total_norm / (norm + 1e-6)).clamp(max=1)
        loss.backward(inputs=self.parameters, retain_graph=again)
        self.passes += 1

    def _add(self, total: torch.Tensor | None, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None  # the hook runs where one was accumulated
        gradient, parameter.grad = parameter.grad.float(), None
        if self._squares is not None:
            self._squares.append(gradient.square().sum())
            return
        assert total is not None, "the second pass is for the parameters alone"
        if self.max_norm is not None:
            gradient = gradient * (self.max_norm / (gradient.norm() + 1e-6)).clamp(max=1)
        total.add_(self.weight * self.form(self._scale * gradient))


def per_example(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Iterable[Batch],
    examples: int,
    kind: Kind = "empirical",
    absolute: bool = False,
) -> list[torch.Tensor]:
    """Sums, over the first ``examples`` rows, of each row's own squared (or absolute) gradient of -log p(y | x).

    "empirical": y is the row's label. "expected": all classes, weighted by the model's own probabilities; for heads
    with one row of class scores an example. Returns float32 tensors of the parameters' shapes.

    Raises DataError for data without rows, without labels or with a gradient that is not finite, UnsupportedError for
    an expectation that cannot be formed.
    """
    with GradientSums(parameters, "absolute" if absolute else "square") as sums:
        for row in _shown(_rows(batches, examples), examples, "gradients, row by row"):
            if kind == "empirical":
                sums.backward(loss(model, row))
            else:
                _expected(model, row, sums)
    return _checked(sums)


def per_batch(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Iterable[Batch],
    limit: int | None = None,
    form: Form = "square",
    **clipping: Any,
) -> list[torch.Tensor]:
    """Means, over the batches (or the first ``limit``), of f(gradient of the batch's loss).

    ``form`` and ``clipping`` are those of :class:`GradientSums`. Returns and raises as :func:`per_example`.
    """
    with GradientSums(parameters, form, **clipping) as sums:
        for batch in _shown(islice(batches, limit), limit, "gradients, batch by batch"):
            sums.backward(loss(model, batch))
    return [total.div_(sums.passes) for total in _checked(sums)]


def first_order(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Iterable[Batch],
    limit: int | None = None,
    starts: Iterable[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """``(parameter - start) * gradient``, of the mean loss over the batches (or the first ``limit``), entry by entry.

    Setting one entry back to its start changes the loss by minus this, to first order, and setting a whole group back
    by minus the sum over the group. The absolute values of entries or of such sums are scores for pruning a change.
    ``starts`` None: zeros, as for parameters that were added (SNIP's score at their present values). Returns and
    raises as :func:`per_example`.
    """
    parameters = list(parameters)
    means = per_batch(model, parameters, batches, limit, "signed")
    with torch.no_grad():
        zeros: list[torch.Tensor | int] = [0] * len(parameters)
        for mean, parameter, start in zip(means, parameters, starts or zeros, strict=True):
            mean.mul_(parameter - start)
    return means


def _rows(batches: Iterable[Batch], limit: int) -> Iterator[Batch]:
    """The first rows of a stream of batches, each as a batch of one."""
    rows = ({k: v[i : i + 1] for k, v in batch.items()} for batch in batches for i in range(len(batch["input_ids"])))
    return islice(rows, limit)


@contextmanager
def in_training_mode(model: nn.Module, seed: int) -> Iterator[None]:
    """Inside ``with``, the model drops out as in training, drawn from a seed; the global random state stays."""
    mode, device = model.training, next(model.parameters()).device
    model.train()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        model.train(mode)


def first_rows(batches: Iterable[Batch], limit: int | None) -> Iterator[Batch]:
    """The batches, up to the first ``limit`` rows of them all (None: all); the last one may be cut."""
    left = limit
    for batch in batches:
        if left is None:
            yield batch
            continue
        size = len(batch["input_ids"])
        yield batch if size <= left else {k: v[:left] for k, v in batch.items()}
        left -= size
        if left <= 0:
            return


def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The model's loss on a batch; DataError where it gives none."""
    value = model(**batch).loss
    if value is None:
        raise DataError("importance is the gradient of a loss, and the batches have no labels")
    return value


def _expected(model: nn.Module, row: Batch, sums: GradientSums) -> None:
    logits = logits_of(model(**{k: v for k, v in row.items() if k != "labels"}))
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise UnsupportedError(
            f"the expected Fisher information needs one row of class scores an example; {type(model).__name__} gives "
            f"logits of shape {tuple(logits.shape)}. Use the empirical one, or a classification head."
        )
    log_p = F.log_softmax(logits[0].float(), dim=-1)
    for label, probability in enumerate(log_p.detach().exp()):
        sums.weight = probability
        sums.backward(-log_p[label], again=label + 1 < len(log_p))


def _shown(items: Iterable[T], total: int | None, what: str) -> Iterable[T]:
    """``items``, with a progress bar where someone watches a terminal."""
    return track(items, what, total=total, transient=True, disable=not sys.stdout.isatty())


def _checked(sums: GradientSums) -> list[torch.Tensor]:
    if not sums.passes:
        raise DataError("there is nothing to choose entries from: the calibration batches are empty")
    if not all(bool(total.isfinite().all()) for total in sums.sums):
        raise DataError("a gradient on the calibration batches is not finite; look at the labels and the precision")
    return sums.sums
