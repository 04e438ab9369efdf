"""A matrix product of operands that are quantized on the way in."""

from typing import Literal

import torch
from torch import Tensor

from ..backend import autocast, choose_backend
from .formats import Format

Scale = Literal["tensor", "axis", "block"]


def quant_matmul(
    a: Tensor,
    b: Tensor,
    *,
    a_format: Format | None = None,
    b_format: Format | None = None,
    scale: Scale | None = "block",
    block_size: int = 128,
    rounding: Literal["even", "away"] = "even",
    scale_rounding: Literal["exact", "power_of_two", "mx"] = "exact",
) -> Tensor:
    """`Q(a) @ Q(b)ᵀ`, where Q is `fake_quantize` along the dimension that is summed over (arXiv 2501.02423, Eq. 8)."""
    from . import fake_quantize

    a, b = autocast(a, b)
    options = {"scale": scale, "block_size": block_size, "rounding": rounding, "scale_rounding": scale_rounding}
    a, b = (x if f is None else fake_quantize(x, f, **options) for x, f in ((a, a_format), (b, b_format)))
    if choose_backend(a) == "cpu" and a.dtype != torch.float64:
        return (a.float() @ b.float().t()).to(a.dtype)
    return a @ b.t()
