"""Quantization to a small floating-point format by its definition: plain torch. The tests' oracle."""

import torch
from torch import Tensor

from .formats import FloatFormat


def round_to_format(x: Tensor, format: FloatFormat, limit: float, rounding: str, words: Tensor | None) -> Tensor:
    """Each element as the neighbouring number of the format that `rounding` chooses, at most `limit` in magnitude.

    Around x the numbers are multiples of `step = 2^(e - M)`, where e is x's own exponent, or the format's smallest:

        x / step = k + f,  0 ≤ f < 1   →   (k + 1) · step  if f is over a half, else k · step

    A tie, f = 1/2, goes to the even code or away from zero; stochastic rounding compares f with the upper 24 of the
    32 random bits in `words`. NaN stays NaN, and zeros keep their sign.
    """
    magnitude = x.double().abs().clamp(max=limit)
    exponent = torch.frexp(magnitude).exponent - 1
    above = (exponent - format.min_exponent).clamp(min=0)  # binades above the subnormal numbers
    step = torch.ldexp(torch.ones_like(magnitude), above + format.min_exponent - format.mantissa_bits)
    k = (magnitude / step).floor()
    f = magnitude / step - k
    if rounding == "stochastic":
        up = (words >> 8).view(x.shape) * 2.0**-24 < f
    elif rounding == "away":
        up = f >= 0.5
    else:
        odd = (k + above * 2**format.mantissa_bits) % 2 == 1  # the code; without mantissa bits k is always 1
        up = (f > 0.5) | (f.eq(0.5) & odd)
    rounded = ((k + up) * step).clamp(max=limit)
    return rounded.copysign(x).to(x.dtype)


def fake_quantize(
    groups: Tensor, scales: Tensor | None, format: FloatFormat, limit: float, rounding: str, words: Tensor | None
) -> Tensor:
    """`round(x · S) / S`, with a scale for each group along the middle dimension of `(rows, length, columns)`."""
    x = groups.to(torch.promote_types(groups.dtype, torch.float32))
    if scales is not None:
        x = x * scales
    y = round_to_format(x, format, limit, rounding, words)
    return (y if scales is None else y / scales).to(groups.dtype)
