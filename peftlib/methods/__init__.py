"""One small file a method, in folders that are the taxonomy. The taxonomy says which there are, and
``peftlib.methods()`` lists them; importing this package imports no method and no torch."""

from __future__ import annotations

import sys
from types import ModuleType

from peftlib import taxonomy


class _Listing(ModuleType):
    """``peftlib.methods`` is this package and the function that lists the methods."""

    def __call__(self, category: str | None = None) -> list[str]:
        return taxonomy.methods(category)


sys.modules[__name__].__class__ = _Listing
