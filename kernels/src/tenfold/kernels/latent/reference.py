"""Attention over latents by its definition: plain torch, differentiable, correct in float64: the tests' oracle."""

import torch
from torch import Tensor

from .packing import PackedLatents, unpack_latents

Latents = Tensor | PackedLatents


def latent_attention(
    query_latent: Tensor,
    query_rope: Tensor | None,
    latent: Latents,
    rope: Latents | None,
    *,
    scale: float,
    causal: bool,
    mask: Tensor | None,
) -> Tensor:
    """`softmax(scale · ([q̃; q_R] · [c; k_R])) @ c` over each row's attended keys, zeros where it has none."""
    c = _vectors(latent, query_latent.dtype)
    bad = ~c.isfinite().all(-1, keepdim=True)  # 0·NaN would reach all rows: let those see it that attend it
    scores = query_latent @ c.mT
    if rope is not None:
        scores = scores + query_rope @ _vectors(rope, query_latent.dtype).mT
    scores = scores.masked_fill(bad.mT, torch.nan)
    attended = attended_keys(*scores.shape[-2:], causal=causal, mask=mask, device=scores.device)
    weights = (scale * scores).masked_fill(~attended, -torch.inf).softmax(dim=-1)
    weights = weights.masked_fill(~attended, 0.0)  # also a row without keys, all NaN, to 0
    return weights @ c.masked_fill(bad, 0.0)


def attended_keys(Tq: int, Tk: int, *, causal: bool, mask: Tensor | None, device: torch.device) -> Tensor:
    """`(…, Tq, Tk)` bool, True = attend: `mask`, and under `causal` no key after the query's."""
    attended = torch.ones(Tq, Tk, dtype=torch.bool, device=device)
    if causal:
        attended = attended.tril(diagonal=Tk - Tq)  # the last query is aligned with the last key
    return attended if mask is None else attended & mask


def _vectors(x: Latents, dtype: torch.dtype) -> Tensor:
    """`(B, 1, Tk, D)`: one head of keys for all heads of queries."""
    x = unpack_latents(x, dtype=dtype) if isinstance(x, PackedLatents) else x.to(dtype)
    return x.unsqueeze(1)
