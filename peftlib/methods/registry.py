"""From a name to a method: the taxonomy says which there are and where their classes stand."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, overload

from peftlib import taxonomy
from peftlib.errors import EntryError, UnknownNameError
from peftlib.methods.base import Method, MethodConfig, SavedAdapter

Class = TypeVar("Class", bound=type[Method])

_REGISTERED: dict[str, type[Method]] = {}


@overload
def register(cls: Class, *, entry: taxonomy.Entry) -> Class: ...
@overload
def register(*, entry: taxonomy.Entry) -> Callable[[Class], Class]: ...
def register(cls: Class | None = None, *, entry: taxonomy.Entry) -> Class | Callable[[Class], Class]:
    """Add a method of your own, with every service that peftlib's own have: attached by name, saved and loaded,
    counted, a card, the conformance suite, sweeps.

    >>> @peftlib.register(entry=peftlib.Entry(name="my_method", category="yours", ...))
    ... class MyMethod(peftlib.Method): ...

    ``register(MyMethod, entry=...)`` does the same. A class that is defined once more in the same module, as in a
    notebook's cell that runs again, takes the place of the one before. Register a method before loading what it saved.

    Raises EntryError that names the field of the entry for a name that is taken, a category or a source that does not
    exist, a formula that names no size or option; TypeError for a class that is no Method with a frozen dataclass as
    ``Config``.
    """
    if cls is None:
        return lambda cls: register(cls, entry=entry)
    if not (inspect.isclass(cls) and issubclass(cls, Method)):
        raise TypeError(f"{cls!r} is not a subclass of peftlib.Method")
    config = getattr(cls, "Config", None)
    if not (inspect.isclass(config) and issubclass(config, MethodConfig) and dataclasses.is_dataclass(config)):
        raise TypeError(f"{cls.__name__}.Config must be a frozen dataclass that inherits from peftlib.MethodConfig")
    if config.__module__ != cls.__module__:
        raise TypeError(f"{config.__name__} is another method's; give {cls.__name__} a Config of its own, beside it")
    entry = dataclasses.replace(entry, origin="yours", location=cls.__module__)
    entry.check_count(field.name for field in dataclasses.fields(config))
    for source in cls.source_methods:
        if source != entry.name and source not in taxonomy.methods():
            raise EntryError(entry.name, "source_methods", f"names {source!r}, which is no method")
    taxonomy.add(entry)
    config.registered_as = entry.name
    _REGISTERED[entry.name] = cls
    return cls


def find(name: str) -> type[Method]:
    """The class of a method by its name. Raises UnknownNameError with the nearest names."""
    if name == "combination":
        return importlib.import_module("peftlib.methods.combination").Combination
    if name in _REGISTERED:
        return _REGISTERED[name]
    (cls,) = _classes(taxonomy.entry(name).module)
    return cls


def named(method: str) -> str:
    """The name of a method that is given by its name, or as ``module:Class``: the module is imported and registers it.

    Raises UnknownNameError where that module or class does not exist, or is not registered.
    """
    module, colon, name = method.partition(":")
    if not colon:
        return method
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UnknownNameError("module", module, (), hint=f"{error}; run it from the folder that holds it.") from error
    cls = getattr(imported, name, None)
    own = {key: value.Config.registered_as for key, value in vars(imported).items() if value in _REGISTERED.values()}
    if cls is None or name not in own:
        raise UnknownNameError(
            f"method of {module}", name, own, hint="Register it there: peftlib.register(cls, entry=...)"
        )
    return own[name]


def outside() -> tuple[str, ...]:
    """The modules that registered methods from outside, for another process to import."""
    return tuple({cls.__module__: None for cls in _REGISTERED.values() if cls.__module__ != "__main__"})


def _classes(module: str) -> Iterator[type[Method]]:
    """The method classes that a module defines, or ``method.py`` of a package."""
    for value in vars(importlib.import_module(module)).values():
        if inspect.isclass(value) and issubclass(value, Method) and value.__module__ in (module, f"{module}.method"):
            yield value


def config(name: str, **options: Any) -> MethodConfig:
    """A method's config from its name and options.

    Raises UnknownNameError for a method or an option that does not exist, ConfigError for a value it cannot have.
    """
    cls = find(name).Config
    fields = list(inspect.signature(cls).parameters)
    for option in options:
        if option not in fields:
            raise UnknownNameError(f"option of {name}", option, fields)
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def resolve(method: str | MethodConfig, **options: Any) -> Method:
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
