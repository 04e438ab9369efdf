"""The ops of the Tenfold packages: one definition each, computed by Triton, on the CPU, or as written."""

from .backend import use_backend
from .cog import cog_attention
from .latent import PackedLatents, fake_pack_latents, latent_attention, pack_latents, unpack_latents
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
    "PackedLatents",
    "cog_attention",
    "fake_pack_latents",
    "latent_attention",
    "linear_logprob",
    "pack_latents",
    "unpack_latents",
    "use_backend",
]
