"""Parameter-efficient fine-tuning, the whole taxonomy of arXiv:2312.12148 on one core.

>>> import peftlib
>>> adapted = peftlib.attach(model, "lora", rank=8)
>>> peftlib.fit(adapted, task, tokenizer=tokenizer)
>>> adapted.save("my-adapter")
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from peftlib.errors import ConfigError, EntryError, PeftlibError
from peftlib.taxonomy import Entry
from peftlib.taxonomy import entry as card

if TYPE_CHECKING:
    from peftlib import backbones, methods, tasks
    from peftlib.adapted import Adapted, Count, attach, load
    from peftlib.bank import Bank
    from peftlib.conversion import convert
    from peftlib.interchange import from_adapters, from_hf_peft, inspect, to_hf_peft
    from peftlib.mechanisms.schedules import Schedule, Stage
    from peftlib.methods.base import ForwardPass, Method, MethodConfig, SavedAdapter, TrainingState
    from peftlib.methods.combination import combine
    from peftlib.methods.registry import config, find, register
    from peftlib.saved import read
    from peftlib.training import FitResult, fit
    from peftlib.training.callback import PeftCallback
    from peftlib.vectors import add_vector

__version__ = "0.1.0"

__all__ = [
    "Adapted",
    "Bank",
    "ConfigError",
    "Count",
    "Entry",
    "EntryError",
    "FitResult",
    "ForwardPass",
    "Method",
    "MethodConfig",
    "PeftCallback",
    "PeftlibError",
    "SavedAdapter",
    "Schedule",
    "Stage",
    "TrainingState",
    "add_vector",
    "attach",
    "backbones",
    "card",
    "combine",
    "config",
    "convert",
    "find",
    "fit",
    "from_adapters",
    "from_hf_peft",
    "inspect",
    "load",
    "methods",
    "read",
    "register",
    "tasks",
    "to_hf_peft",
]

# Imported when asked for, so that what needs no torch (the list of methods, the cards) does not wait for it.
_PLACES = {
    "adapted": ("Adapted", "Count", "attach", "load"),
    "bank": ("Bank",),
    "conversion": ("convert",),
    "interchange": ("from_adapters", "from_hf_peft", "inspect", "to_hf_peft"),
    "mechanisms.schedules": ("Schedule", "Stage"),
    "methods.base": ("ForwardPass", "Method", "MethodConfig", "SavedAdapter", "TrainingState"),
    "methods.combination": ("combine",),
    "methods.registry": ("config", "find", "register"),
    "saved": ("read",),
    "training": ("FitResult", "fit"),
    "training.callback": ("PeftCallback",),
    "vectors": ("add_vector",),
}
_PLACE_OF = {name: f"peftlib.{module}" for module, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    """The public names; ``peftlib.LoRAConfig`` and the like, each method's config class; the modules of the package."""
    if name in _PLACE_OF:
        return getattr(importlib.import_module(_PLACE_OF[name]), name)
    if name.endswith("Config"):
        find = importlib.import_module("peftlib.methods.registry").find
        for method in importlib.import_module("peftlib.taxonomy").methods():
            if method.replace("_", "") + "config" == name.lower() and find(method).Config.__name__ == name:
                return find(method).Config
    elif not name.startswith("_") and importlib.util.find_spec(f"peftlib.{name}"):
        return importlib.import_module(f"peftlib.{name}")
    raise AttributeError(f"module 'peftlib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
