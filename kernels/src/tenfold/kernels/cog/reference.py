"""Cog attention by its definition: plain torch, differentiable, correct in float64: the oracle of tests."""

import torch
from torch import Tensor


def cog_attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, mask: Tensor | None, scale: float
) -> Tensor:
    """`sign(s) · softmax(|s|) @ value` with `s = scale · query @ keyᵀ`, over each row's attended keys."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    attended = attended_keys(query, key, causal=causal, mask=mask)

    # Masking acts on |s|: a -inf added to s itself would make the masked key the largest of all.
    scores = scale * (query @ key.transpose(-2, -1))
    magnitude = scores.abs().masked_fill(~attended, -torch.inf)
    softmax = magnitude.softmax(dim=-1).masked_fill(~attended, 0.0)  # also a row without keys, all NaN, to 0
    weights = scores.masked_fill(~attended, 0.0).sign() * softmax
    return weights @ value


def attended_keys(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None) -> Tensor:
    """`(…, Tq, Tk)` bool, True = attend: `mask`, and under `causal` no key after the query's."""
    Tq, Tk = query.shape[-2], key.shape[-2]
    attended = torch.ones(Tq, Tk, dtype=torch.bool, device=query.device)
    if causal:
        attended = attended.tril(diagonal=Tk - Tq)  # the last query is aligned with the last key
    return attended if mask is None else attended & mask
