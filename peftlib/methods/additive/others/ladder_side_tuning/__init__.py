"""Ladder side-tuning (Sung et al. 2022, arXiv:2206.06522)."""

from peftlib.methods.additive.others.ladder_side_tuning.method import LadderSideTuning, LadderSideTuningConfig

__all__ = ["LadderSideTuning", "LadderSideTuningConfig"]
