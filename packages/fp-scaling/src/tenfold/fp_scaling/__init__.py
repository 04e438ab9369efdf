"""Floating-point quantized training and its scaling law (arXiv 2501.02423)."""

from .baselines import ChinchillaLaw, PrecisionLaw
from .fitting import Estimate, extrapolation_error, held_out_error
from .law import Allocation, ScalingLaw, Split
from .linear import QuantLinear, dequantize_, quant_linear, quantize_linears_
from .module import QuantizedLM
from .recipe import QuantRecipe
from .table import RunTable

__all__ = [
    "Allocation",
    "ChinchillaLaw",
    "Estimate",
    "PrecisionLaw",
    "QuantLinear",
    "QuantRecipe",
    "QuantizedLM",
    "RunTable",
    "ScalingLaw",
    "Split",
    "dequantize_",
    "extrapolation_error",
    "held_out_error",
    "quant_linear",
    "quantize_linears_",
]
