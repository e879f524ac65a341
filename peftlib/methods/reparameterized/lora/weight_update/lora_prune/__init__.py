"""LoRAPrune (Zhang et al. 2024, arXiv:2305.18403)."""

from peftlib.methods.reparameterized.lora.weight_update.lora_prune.method import LoRAPrune, LoRAPruneConfig

__all__ = ["LoRAPrune", "LoRAPruneConfig"]
