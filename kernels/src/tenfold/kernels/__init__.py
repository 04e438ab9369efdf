"""The ops of the Tenfold packages: one definition each, computed by Triton, on the CPU, or as written."""

from .backend import use_backend
from .cog import cog_attention
from .logprob import linear_logprob
from .quant import FloatFormat, Quantized, dequantize, fake_quantize, quant_matmul, quantize

__all__ = [
    "FloatFormat",
    "Quantized",
    "cog_attention",
    "dequantize",
    "fake_quantize",
    "linear_logprob",
    "quant_matmul",
    "quantize",
    "use_backend",
]
