"""Metrics by name, as plain floats. Each takes (predictions, probabilities or None, labels) as NumPy arrays."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats
from scipy.special import log_softmax
from sklearn import metrics as sk

from peftlib.errors import UnsupportedError


def accuracy(predictions, probabilities, labels) -> float:
    """Share of right answers."""
    return float(sk.accuracy_score(labels, predictions))


def f1(predictions, probabilities, labels) -> float:
    """F1 of class 1, as GLUE has it; 0 where class 1 is neither predicted nor present."""
    return float(sk.f1_score(labels, predictions, pos_label=1, average="binary", zero_division=0))


def matthews(predictions, probabilities, labels) -> float:
    """Matthews correlation, -1 to 1; 0 for constant predictions."""
    return float(sk.matthews_corrcoef(labels, predictions))


def _correlation(function, predictions, labels) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        value = float(function(predictions, labels).statistic)
    return 0.0 if np.isnan(value) else value


def pearson(predictions, probabilities, labels) -> float:
    """Pearson correlation; 0 for constant predictions, where it is not defined."""
    return _correlation(stats.pearsonr, predictions, labels)


def spearman(predictions, probabilities, labels) -> float:
    """Spearman rank correlation; 0 for constant predictions, where it is not defined."""
    return _correlation(stats.spearmanr, predictions, labels)


def mse(predictions, probabilities, labels) -> float:
    """Mean squared error."""
    return float(sk.mean_squared_error(labels, predictions))


def nll(predictions, probabilities, labels) -> float:
    """Mean negative log-likelihood of the right class, in nats."""
    chosen = np.take_along_axis(probabilities, labels[:, None], axis=1)
    return float(-np.log(np.clip(chosen, np.finfo(np.float64).tiny, None)).mean())


def ece(predictions, probabilities, labels, bins: int = 15) -> float:
    """Expected calibration error: mean gap between confidence and accuracy over equal-width confidence bins."""
    confidence = probabilities.max(axis=1)
    right = predictions == labels
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    weight = np.bincount(index, minlength=bins)
    gap = np.bincount(index, weights=right, minlength=bins) - np.bincount(index, weights=confidence, minlength=bins)
    return float(np.abs(gap).sum() / weight.sum())


CLASS_METRICS: dict[str, Callable] = {"accuracy": accuracy, "f1": f1, "matthews": matthews}
PROBABILITY_METRICS: dict[str, Callable] = {"nll": nll, "ece": ece}
REGRESSION_METRICS: dict[str, Callable] = {"pearson": pearson, "spearman": spearman, "mse": mse}
LOWER_IS_BETTER = {"nll", "ece", "mse", "perplexity"}


def classification(outputs: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Metrics of logits (N, classes), or of predicted classes (N,), which have no nll and no ece."""
    if outputs.ndim == 2:
        probabilities = np.exp(log_softmax(outputs.astype(np.float64), axis=1))
        predictions = outputs.argmax(axis=1)
    else:
        probabilities, predictions = None, outputs
    result = {name: CLASS_METRICS[name](predictions, probabilities, labels) for name in names if name in CLASS_METRICS}
    if probabilities is not None:
        wanted = [name for name in names if name in PROBABILITY_METRICS]
        result |= {name: PROBABILITY_METRICS[name](predictions, probabilities, labels) for name in wanted}
    return result


def regression(outputs: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Metrics of predicted values (N,) or (N, 1)."""
    predictions = outputs.reshape(len(labels)).astype(np.float64)
    return {name: REGRESSION_METRICS[name](predictions, None, labels) for name in names}


def tokens(logits: np.ndarray, labels: np.ndarray, *, shifted: bool) -> dict[str, float]:
    """Per-token metrics of a language model's logits (N, T, V); labels (N, T) are -100 where nothing is asked.

    shifted: the logits at position t predict the label at t + 1, as in causal models.
    """
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    asked = labels != -100
    chosen = labels[asked]
    log = log_softmax(logits[asked].astype(np.float64), axis=-1)
    loss = float(-np.take_along_axis(log, chosen[:, None], axis=1).mean())
    return {
        "nll": loss,
        "perplexity": float(np.exp(loss)),
        "token_accuracy": float((log.argmax(axis=1) == chosen).mean()),
    }


def generated(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU and chrF (0 to 100) of generated texts, by sacrebleu, whose signature makes scores comparable."""
    try:
        import sacrebleu
    except ImportError:
        raise UnsupportedError(
            "BLEU and chrF of generated text need the package sacrebleu: pip install sacrebleu"
        ) from None
    return {
        "bleu": float(sacrebleu.corpus_bleu(list(predictions), [list(references)]).score),
        "chrf": float(sacrebleu.corpus_chrf(list(predictions), [list(references)]).score),
    }
