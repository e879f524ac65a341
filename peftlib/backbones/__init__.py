"""Backbones: pretrained or tiny models with their tokenizers, from a hub, a folder or an installed package.

>>> import peftlib.backbones
>>> backbone = peftlib.backbones.load("tiny-bert", num_labels=3)
>>> backbone.model.config.num_labels, backbone.family, backbone.source
(3, 'bert', 'tiny')
"""

from peftlib.backbones.loading import EMBEDDED, HEADS, Backbone, load, names, shapes
from peftlib.backbones.sentences import embed

__all__ = ["EMBEDDED", "HEADS", "Backbone", "embed", "load", "names", "shapes"]
