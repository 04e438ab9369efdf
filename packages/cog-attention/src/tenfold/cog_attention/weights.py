"""The attention weights themselves, for looking at them; computing with them is `cog_attention`'s job."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Kind = Literal["cog", "softmax"]


def attention_weights(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    *,
    kind: Kind = "cog",
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads queries keys"]:
    """Weights of every query on every key: `sign(s)·softmax(|s|)` for Cog, `softmax(s)` for softmax.

    Arguments as for `tenfold.kernels.cog_attention`. A row that attends no key is zero.
    """
    group = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * query @ key.repeat_interleave(group, dim=1).transpose(-2, -1)
    Tq, Tk = scores.shape[-2:]
    attended = torch.ones(Tq, Tk, dtype=torch.bool, device=query.device)
    if causal:
        attended = attended.tril(Tk - Tq)
    if mask is not None:
        attended = attended & mask
    magnitude = scores.abs() if kind == "cog" else scores
    weights = magnitude.masked_fill(~attended, -torch.inf).softmax(-1).masked_fill(~attended, 0.0)
    return weights * scores.sign() if kind == "cog" else weights
