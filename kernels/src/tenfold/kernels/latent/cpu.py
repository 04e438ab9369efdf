"""Attention over latents on the CPU."""

from torch import Tensor

from . import reference
from .packing import PackedLatents

Latents = Tensor | PackedLatents


def forward(
    query_latent: Tensor,
    query_rope: Tensor | None,
    latent: Latents,
    rope: Latents | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """z, `(B, H, Tq, Dc)`."""
    return reference.latent_attention(query_latent, query_rope, latent, rope, scale=scale, causal=causal, mask=mask)
