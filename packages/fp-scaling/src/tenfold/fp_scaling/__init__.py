"""Floating-point quantized training and its scaling law (arXiv 2501.02423)."""

from .baselines import ChinchillaLaw, PrecisionLaw
from .fitting import Estimate, extrapolation_error, held_out_error
from .law import Allocation, ScalingLaw, Split
from .table import RunTable

__all__ = [
    "Allocation",
    "ChinchillaLaw",
    "Estimate",
    "PrecisionLaw",
    "RunTable",
    "ScalingLaw",
    "Split",
    "extrapolation_error",
    "held_out_error",
]
