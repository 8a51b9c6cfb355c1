"""Cleaning: every rule is a small pure function with its section of the config beside it."""

from training.data.clean.config import CleanConfig
from training.data.clean.decide import decide, outlier_scores
from training.data.clean.judge import Judgement, judge
from training.data.clean.measures import Measures
from training.data.clean.size import too_many_bytes
from training.data.clean.tools import Tools, fingerprint

__all__ = [
    "CleanConfig",
    "Judgement",
    "Measures",
    "Tools",
    "decide",
    "fingerprint",
    "judge",
    "outlier_scores",
    "too_many_bytes",
]
