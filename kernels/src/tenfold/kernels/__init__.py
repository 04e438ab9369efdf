"""The ops of the Tenfold packages: one definition each, computed by Triton, on the CPU, or as written."""

from .backend import use_backend
from .cog import cog_attention
from .latent import PackedLatents, fake_pack_latents, latent_attention, pack_latents, unpack_latents
from .logprob import linear_logprob
from .moe import Routing, expert_swiglu, grouped_matmul, grouped_swiglu, permute_tokens, route_tokens, unpermute_tokens
from .quant import FloatFormat, Quantized, dequantize, fake_quantize, quant_matmul, quantize

__all__ = [
    "FloatFormat",
    "PackedLatents",
    "Quantized",
    "Routing",
    "cog_attention",
    "dequantize",
    "expert_swiglu",
    "fake_pack_latents",
    "fake_quantize",
    "grouped_matmul",
    "grouped_swiglu",
    "latent_attention",
    "linear_logprob",
    "pack_latents",
    "permute_tokens",
    "quant_matmul",
    "quantize",
    "route_tokens",
    "unpack_latents",
    "unpermute_tokens",
    "use_backend",
]
