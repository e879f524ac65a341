"""Training: the project's loop, the lifecycle of a method, and the callback for ``transformers.Trainer``."""

from peftlib.training.evaluation import evaluate_task
from peftlib.training.lifecycle import Lifecycle
from peftlib.training.loop import FitResult, fit

__all__ = ["FitResult", "Lifecycle", "evaluate_task", "fit"]
