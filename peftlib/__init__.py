"""Parameter-efficient fine-tuning, the whole taxonomy of arXiv:2312.12148 on one core.

>>> import peftlib
>>> adapted = peftlib.attach(model, "lora", rank=8)
>>> peftlib.fit(adapted, task, tokenizer=tokenizer)
>>> adapted.save("my-adapter")
"""

from __future__ import annotations

from peftlib import backbones, tasks
from peftlib.adapted import Adapted, Count, attach, load
from peftlib.bank import Bank
from peftlib.errors import PeftlibError
from peftlib.interchange import from_hf_peft, to_hf_peft
from peftlib.methods import config, find
from peftlib.methods.base import ConfigError, Method, MethodConfig, SavedAdapter, TrainingState
from peftlib.methods.combination import combine
from peftlib.saved import read
from peftlib.taxonomy import Entry, methods
from peftlib.taxonomy import entry as card
from peftlib.training import FitResult, fit
from peftlib.vectors import add_vector

__version__ = "0.1.0"

__all__ = [
    "Adapted",
    "Bank",
    "ConfigError",
    "Count",
    "Entry",
    "FitResult",
    "Method",
    "MethodConfig",
    "PeftlibError",
    "SavedAdapter",
    "TrainingState",
    "add_vector",
    "attach",
    "backbones",
    "card",
    "combine",
    "config",
    "find",
    "fit",
    "from_hf_peft",
    "load",
    "methods",
    "read",
    "tasks",
    "to_hf_peft",
]


def __getattr__(name: str):
    """``peftlib.LoRAConfig`` and the like: each available method's config class, imported when asked for."""
    for method in methods() if name.endswith("Config") else ():
        if method.replace("_", "") + "config" == name.lower() and find(method).Config.__name__ == name:
            return find(method).Config
    raise AttributeError(f"module 'peftlib' has no attribute {name!r}")
