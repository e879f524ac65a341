"""What the methods share that build on saved adapters of one method: that method, attached in the model."""

from __future__ import annotations

from peftlib.mechanisms.host import Host
from peftlib.methods import registry
from peftlib.methods.base import Method, SavedAdapter


def attach_source(source: SavedAdapter, host: Host) -> Method:
    """Attach a fresh method of the source's config; its tensors are not loaded."""
    method = registry.resolve(source.config)
    method.host = host
    method.attach(host)
    return method
