"""Claims: sentences of a paper turned into measurements, with seeds, intervals, verdicts and a report."""

from .claim import Claim, Criterion, Interval, above, below, t_interval, within
from .report import render
from .run import SEEDS, TUNING_SEED, Budget, ReproduceError, Run, reproduce

__all__ = [
    "SEEDS",
    "TUNING_SEED",
    "Budget",
    "Claim",
    "Criterion",
    "Interval",
    "ReproduceError",
    "Run",
    "above",
    "below",
    "render",
    "reproduce",
    "t_interval",
    "within",
]
