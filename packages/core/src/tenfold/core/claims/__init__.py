"""Claims: sentences of a paper turned into measurements, with seeds, intervals, verdicts and a report."""

from .claim import Claim, Criterion, above, below, within
from .interval import Interval, t_interval
from .report import render
from .run import SEEDS, TUNING_SEED, Budget, Run

__all__ = [
    "SEEDS",
    "TUNING_SEED",
    "Budget",
    "Claim",
    "Criterion",
    "Interval",
    "Run",
    "above",
    "below",
    "render",
    "t_interval",
    "within",
]
