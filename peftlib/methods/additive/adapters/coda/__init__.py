"""CODA (Lei et al. 2023, arXiv:2304.04947)."""

from peftlib.methods.additive.adapters.coda.method import CODA, CODAConfig

__all__ = ["CODA", "CODAConfig"]
