"""Keys and values of one's own in the cache of a backbone that generates."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from peftlib.errors import UnsupportedError


def grow(cache: Any, layers: int) -> None:
    """Make room for ``layers`` layers, those of the backbone first, so that whatever reorders, crops or repeats a cache
    while generating does it to all. Raises UnsupportedError for a cache of fixed size."""
    both = isinstance(cache, EncoderDecoderCache)
    for part in (cache.self_attention_cache, cache.cross_attention_cache) if both else (cache,):
        if not isinstance(part, DynamicCache):
            raise UnsupportedError(
                f"additional keys and values are kept in a DynamicCache, and this one is a {type(part).__name__}; "
                'generate with cache_implementation="dynamic" or use_cache=False'
            )
        while len(part.layers) < layers:
            like = part.layers[0] if part.layers else None
            sliding = like.sliding_window if isinstance(like, DynamicSlidingWindowLayer) else None
            layer: Any = DynamicLayer() if sliding is None else DynamicSlidingWindowLayer(sliding)
            if getattr(like, "record_past", False):  # wrong guesses of assisted decoding are cut back
                layer.activate_past_recording()
            part.layers.append(layer)
