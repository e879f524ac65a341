"""Tasks: labelled text in fixed splits, batches for a tokenizer, metrics.

>>> import peftlib.tasks
>>> task = peftlib.tasks.load("smoke")
>>> task.kind, task.num_labels, task.main_metric, {split: len(rows) for split, rows in task.splits.items()}
('classification', 2, 'accuracy', {'train': 48, 'validation': 16, 'test': 16})
"""

from peftlib.tasks.loading import custom, load, names, texts
from peftlib.tasks.mixing import mix
from peftlib.tasks.task import Task

__all__ = ["Task", "custom", "load", "mix", "names", "texts"]
