"""Quantization on the CPU: a piece that fits the caches at a time, with the bits of float32 as integers.

Around x, with exponent e, the numbers of the format are multiples of `step = 2^(max(e, e_min) - M)`. Adding
`c = 1.5 · 2^23 · step` to x leaves float32 no bits below `step`: the addition itself rounds to the nearest, ties to
even, and subtracting c again is exact. The bits of c are those of x's exponent plus a constant. A piece goes
through about ten simple passes in the caches; main memory is read twice (once for the largest magnitudes) and
written once.

The formats of 8 exponent bits have float32's own exponents, for which c would overflow; there rounding is integer
arithmetic on x's bits. What is left, stochastic rounding and ties away from zero in those formats, and
formats without mantissa bits, is computed by the definition, in pieces too.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import reference
from .formats import FloatFormat
from .philox import random_words

PIECE = 1 << 19  # elements: 2 MB of float32. Smaller ones are no faster, as each pass waits for its last thread
EXPONENT, SIGN, MAGNITUDE = 0x7F800000, -(1 << 31), 0x7FFFFFFF
NAN = 0x7FC00000
BELOW_HALF = 0.5 - 2.0**-25  # added to k + 1/2 in float32 it gives k + 1, to anything less it does not


def absmax(groups: Tensor) -> Tensor:
    """The largest magnitude of each group, `(rows, 1, columns)`; NaN where there is one."""
    if len(groups) == 1 and groups.shape[2] == 1:
        low, high = torch.aminmax(groups.view(-1))
        return torch.maximum(-low, high).view(1, 1, 1)
    # As integers magnitudes have the same order, with NaN at the top.
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[groups.element_size()]
    rows, _, columns = groups.shape
    found = torch.zeros(rows, 1, columns, dtype=kind)
    scratch = torch.empty(_largest(groups), dtype=kind)
    for (row, _), part in _pieces(groups):
        magnitudes = scratch[: part.numel()].view(part.shape)
        torch.bitwise_and(part.view(kind), torch.iinfo(kind).max, out=magnitudes)
        torch.maximum(found[row], magnitudes.amax(1, keepdim=True), out=found[row])
    return found.view(groups.dtype)


def fake_quantize(
    groups: Tensor, scales: Tensor | None, format: FloatFormat, limit: float, rounding: str, seed: Tensor | None
) -> Tensor:
    """`round(x · S) / S` for contiguous groups `(rows, length, columns)` and scales `(rows, 1, columns)`."""
    out = torch.empty_like(groups)
    wide = out if groups.dtype in (torch.float32, torch.float64) else None
    for place, y, s in rounded(groups, scales, format, limit, rounding, seed, out=wide):
        if s is not None:
            y.div_(s)
        if wide is None:
            out[place].copy_(y)
    return out


def rounded(
    groups: Tensor,
    scales: Tensor | None,
    format: FloatFormat,
    limit: float,
    rounding: str,
    seed: Tensor | None,
    *,
    out: Tensor | None = None,
) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor | None]]:
    """`round(x · S)` piece by piece, with its place among the groups, and its scales; in scratch memory or `out`."""
    wide = torch.promote_types(groups.dtype, torch.float32)
    scratch = torch.empty(2 if out is not None else 3, _largest(groups), dtype=wide)
    direct = wide == torch.float32 and format.mantissa_bits > 0 and (format.exponent_bits < 8 or rounding == "even")
    first = 0
    for place, part in _pieces(groups):
        a, b, *rest = (s[: part.numel()].view(part.shape) for s in scratch)
        y = rest[0] if out is None else out[place]
        s = None if scales is None else scales[place[0]]
        if s is None or part.dtype != wide:
            y.copy_(part)
        if s is not None:
            torch.mul(y if part.dtype != wide else part, s.item() if s.numel() == 1 else s, out=y)
        words = random_words(seed, first, part.numel()).view(part.shape) if rounding == "stochastic" else None
        first += part.numel()
        if direct:
            _round(y, a, b, format, limit, rounding, words)
        else:
            y.copy_(reference.round_to_format(y, format, limit, rounding, words))
        yield place, y, s


def _round(
    y: Tensor, a: Tensor, sign: Tensor, format: FloatFormat, limit: float, rounding: str, words: Tensor | None
) -> None:
    """Round `y`, float32, where it is. `a` and `sign` are scratch memory."""
    M = format.mantissa_bits
    y.clamp_(-limit, limit)
    bits, exponent, sign = (t.view(torch.int32) for t in (y, a, sign))
    torch.bitwise_and(bits, SIGN, out=sign)
    if format.exponent_bits == 8:
        y.mul_(1.0)  # gives NaN its top mantissa bit, if it had only others, which are about to go
        bits.bitwise_and_(MAGNITUDE).clamp_(max=NAN)
        torch.bitwise_right_shift(bits, 23 - M, out=exponent)
        bits.add_(exponent.bitwise_and_(1)).add_((1 << (22 - M)) - 1).bitwise_and_(-1 << (23 - M))
    else:
        torch.bitwise_and(bits, EXPONENT, out=exponent)
        exponent.clamp_(min=(127 + format.min_exponent) << 23)
        if rounding == "even":
            exponent.add_(((23 - M) << 23) | 0x400000)
            y.add_(a).sub_(a)
        else:
            exponent.sub_(M << 23).neg_().add_(254 << 23)  # a = 1 / step
            y.abs_().mul_(a)
            if rounding == "away":
                y.add_(BELOW_HALF).floor_()
            else:
                k = y.floor()
                k += (words >> 8).float().mul_(2.0**-24) < y.sub_(k)
                y.copy_(k)
            y.div_(a)
    bits.bitwise_or_(sign)


def _largest(groups: Tensor) -> int:
    """Elements of the largest piece."""
    return min(groups.numel(), max(PIECE, groups.shape[2]))


def _pieces(groups: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Views of consecutive elements, and their places: some rows, or part of one, of all columns."""
    rows, length, columns = groups.shape
    if groups.numel() == 0:
        return
    if length * columns <= PIECE:
        step = PIECE // (length * columns)
        for i in range(0, rows, step):
            yield (slice(i, i + step), slice(None)), groups[i : i + step]
        return
    step = max(1, PIECE // columns)
    for i in range(rows):
        for j in range(0, length, step):
            yield (slice(i, i + 1), slice(j, j + step)), groups[i : i + 1, j : j + step]
