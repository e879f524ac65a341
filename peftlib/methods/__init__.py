"""One small file a method, in folders that are the survey's taxonomy. The taxonomy is the registry."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType

from peftlib import taxonomy
from peftlib.errors import UnknownNameError
from peftlib.methods.base import ConfigError, Method, MethodConfig, SavedAdapter, TrainingState
from peftlib.methods.combination import Combination

__all__ = ["ConfigError", "Method", "MethodConfig", "TrainingState", "config", "find", "resolve", "stand_ins"]


def find(name: str) -> type[Method]:
    """The class of a method by its name.

    Raises UnknownNameError with the nearest names; for a method of the survey that has no file yet it says so.
    """
    if name == "combination":
        return Combination
    available = taxonomy.methods()
    if name not in available:
        planned = name in taxonomy.methods(available=False)
        raise UnknownNameError(
            "method", name, available, hint="It is in the survey's taxonomy but not in peftlib yet." if planned else ""
        )
    module = importlib.import_module(taxonomy.entry(name).module)
    (cls,) = (c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, Method) and _of(c, module))
    return cls


def _of(cls: type, module: ModuleType) -> bool:
    """Whether a class is defined in a module, or in ``method.py`` of a package."""
    return cls.__module__ in (module.__name__, f"{module.__name__}.method")


def config(name: str, **options) -> MethodConfig:
    """A method's config from its name and options.

    Raises UnknownNameError for a method or an option that does not exist, ConfigError for a value it cannot have.
    """
    cls = find(name).Config
    fields = list(inspect.signature(cls).parameters)
    for option in options:
        if option not in fields:
            raise UnknownNameError(f"option of {name}", option, fields)
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def resolve(method: str | MethodConfig, **options) -> Method:
    """A fresh, unattached method from a name and options, or from a config."""
    if isinstance(method, MethodConfig):
        if options:
            raise TypeError(f"options {sorted(options)} belong into the {type(method).__name__} that was given")
        chosen = method
    else:
        chosen = config(method, **options)
    return find(chosen.method)(chosen)


def stand_ins(name: str) -> list[SavedAdapter]:
    """As many adapters as a method has to build on, of the first kind that it can: what they are, without tensors.
    They suffice to count."""
    cls = find(name)
    kinds = cls.source_methods[:1] * cls.fewest_sources
    return [SavedAdapter(f"source {i + 1}", config(kind)) for i, kind in enumerate(kinds)]
