"""The ops of the Tenfold packages: one definition each, computed by Triton, on the CPU, or as written."""

from .backend import use_backend
from .cog import cog_attention
from .latent import PackedLatents, fake_pack_latents, latent_attention, pack_latents, unpack_latents
from .logprob import linear_logprob

__all__ = [
    "PackedLatents",
    "cog_attention",
    "fake_pack_latents",
    "latent_attention",
    "linear_logprob",
    "pack_latents",
    "unpack_latents",
    "use_backend",
]
