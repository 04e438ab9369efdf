"""Which elements share a scale, and what the scale is."""

import math
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from .formats import FloatFormat


def split(x: Tensor, scale: str | None, block_size: int, axis: int) -> Tensor:
    """`x` as `(rows, length, columns)`: the elements along the middle dimension share a scale."""
    x = x.contiguous()
    if scale in (None, "tensor"):
        return x.view(1, -1, 1)
    length = x.shape[axis] if scale == "axis" else block_size
    return x.view(-1, length, math.prod(x.shape[axis:][1:]))


def scale_shape(shape: torch.Size, scale: str | None, block_size: int, axis: int) -> tuple[int, ...]:
    """The shape in which the scales are given to the user."""
    if scale in (None, "tensor"):
        return ()
    count = 1 if scale == "axis" else shape[axis] // block_size
    return tuple(count if i == axis % len(shape) else n for i, n in enumerate(shape))


def split_scale(given: Tensor, shape: torch.Size) -> tuple[Tensor, tuple[int, int, int]]:
    """A scale that broadcasts to `shape`, as `(rows, 1, columns)`, and the `(rows, length, columns)` it is for.

    The length is that of the longest run of dimensions along which the scale is constant.
    """
    given = given.view((1,) * (len(shape) - given.dim()) + tuple(given.shape))
    best, first = (0, 0), 0
    while first < len(shape):
        last = first
        while last < len(shape) and given.shape[last] == 1:
            last += 1
        best = max(best, (first, last), key=lambda run: math.prod(shape[run[0] : run[1]]) * (run[0] < run[1]))
        first = last + 1
    a, b = best
    rows, length, columns = math.prod(shape[:a]), math.prod(shape[a:b]), math.prod(shape[b:])
    expanded = given.expand(*shape[:a], *(1,) * (b - a), *shape[b:])
    return expanded.reshape(rows, 1, columns), (rows, length, columns)


def scales_of(absmax: Tensor, format: FloatFormat, scale_rounding: str, dtype: torch.dtype) -> Tensor:
    """S = max / absmax, in float32 (float64 for float64), for groups of elements of `dtype`.

    1 for a group of zeros, NaN for one with NaN or infinity in it.
    """
    absmax = absmax.to(torch.promote_types(dtype, torch.float32))
    top = scaled_limit(format, absmax.dtype)
    low, high = scale_bounds(format, scale_rounding, dtype)
    if scale_rounding == "mx":
        scales = _power(math.frexp(top)[1] - torch.frexp(absmax).exponent)
    else:
        # A number over a tensor would be its reciprocal times the number: two roundings.
        scales = (torch.full_like(absmax, top) / absmax).clamp(max=high)
        if scale_rounding == "power_of_two":
            scales = _power(torch.frexp(scales).exponent - 1)
    scales = scales.clamp(low, high).to(absmax.dtype)
    scales = torch.where(absmax == 0, 1.0, scales)
    return torch.where(absmax < torch.inf, scales, torch.nan)


def scaled_limit(format: FloatFormat, dtype: torch.dtype) -> float:
    """The largest number of the format that `dtype` has, and float32."""
    return format.largest_within(min(torch.finfo(dtype).max, torch.finfo(torch.float32).max))


@lru_cache
def scale_bounds(format: FloatFormat, scale_rounding: str, dtype: torch.dtype) -> tuple[float, float]:
    """The smallest and the largest scale that are used for elements of `dtype`.

    `max / S` must be finite in `dtype`, and so must S itself. The lower bound matters to groups with numbers next to
    the largest of all, the upper to subnormal ones.
    """
    wide = torch.promote_types(dtype, torch.float32)
    least = Fraction(scaled_limit(format, wide)) / Fraction(torch.finfo(dtype).max)
    if scale_rounding == "exact":
        nearest = torch.tensor(float(least), dtype=torch.float64).to(wide)
        above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
        low = float(nearest if Fraction(float(nearest)) >= least else above)
    else:
        power = math.frexp(float(least))[1] - 1
        low = 2.0 ** (power if Fraction(2) ** power >= least else power + 1)
    return low, 2.0 ** (math.frexp(torch.finfo(wide).max)[1] - 1)


def _power(exponent: Tensor) -> Tensor:
    """Powers of two, in float64: torch.ldexp loses float32's subnormal ones."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)
