"""Quantization in Triton: one pass over the data where a group fits a tile.

The arithmetic is that of the CPU path and gives the same bits: float32's exponent read as an integer, one
addition that rounds (see `cpu.py`), and divisions that are rounded correctly. Nothing may be fused (`x · S + c`
rounds once where the definition rounds twice), so every launch has `enable_fp_fusion=False`.

A group is all elements of one row and one column of `(rows, length, columns)`; a tile holds some groups. A scale is
computed from the tile if that holds its groups whole, and else before, by torch's `aminmax`: a second reading.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import interpreting
from .codes import nan_code
from .formats import FloatFormat
from .scales import scale_bounds, scaled_limit, scales_of

TILE = 4096  # elements of a tile; up to twice as many to hold a group whole


def quantize(
    groups: Tensor,
    scales: Tensor | None,
    seed: Tensor | None,
    format: FloatFormat,
    limit: float,
    rounding: str,
    *,
    scale_rounding: str | None,
    output: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Contiguous groups `(rows, length, columns)`, quantized, and their scales `(rows, 1, columns)`.

    Args:
        groups: as said; float32, bfloat16, float16.
        scales: S if it is known; else computed, unless `scale_rounding` is None: then there is none.
        seed: int64, for stochastic rounding.
        format: as said.
        limit: the largest magnitude.
        rounding: `even`, `away`, `stochastic`.
        scale_rounding: as said.
        output: `number` is `round(x · S) / S`, `scaled` is `round(x · S)`, `code` the code of that.
        dtype: of the output.
    """
    rows, length, columns = groups.shape
    out = torch.empty(groups.shape, dtype=dtype, device=groups.device)
    computed = scales is None and scale_rounding is not None
    whole = triton.next_power_of_2(length) * (16 if columns > 1 else 1) <= 2 * TILE
    if groups.numel() == 0:
        return out, torch.ones(rows, 1, columns, device=groups.device) if computed else scales
    if computed and not whole:
        low, high = torch.aminmax(groups, dim=1, keepdim=True)
        scales = scales_of(torch.maximum(-low, high), format, scale_rounding, groups.dtype)
    elif computed:
        scales = torch.empty(rows, 1, columns, device=groups.device)
    block_l = triton.next_power_of_2(length)
    if not (computed and whole):
        block_l = min(block_l, 64 if columns > 1 else TILE)
    block_g = max(1, min(TILE // block_l, triton.next_power_of_2(rows * columns)))
    options = rounding_options(format, limit, rounding)
    if scale_rounding is not None:
        options |= scale_options(format, scale_rounding, groups.dtype)
    grid = (triton.cdiv(rows * columns, block_g), triton.cdiv(length, block_l))
    with torch.cuda.device_of(groups):
        _quantize_kernel[grid](
            *(_readable(groups), scales, seed, _readable(out), rows * columns, length, columns),
            SCALED=scales is not None,
            COMPUTED=computed and whole,
            OUTPUT=output,
            **options,
            BITS=format.bits,
            NAN=nan_code(format),
            BLOCK_G=block_g,
            BLOCK_L=block_l,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out, scales


def _readable(x: Tensor) -> Tensor:
    """`x`, or its bits in the interpreter, which converts bfloat16 wrongly in both directions."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 and interpreting() else x


def rounding_options(format: FloatFormat, limit: float, rounding: str, prefix: str = "") -> dict[str, object]:
    """What `_round` is compiled with."""
    options = {"M": format.mantissa_bits, "LOWEST": 127 + format.min_exponent, "LIMIT": limit, "ROUNDING": rounding}
    return {prefix + name: value for name, value in options.items()}


def scale_options(format: FloatFormat, scale_rounding: str, dtype: torch.dtype, prefix: str = "") -> dict[str, object]:
    """What `_scale` is compiled with."""
    low, high = scale_bounds(format, scale_rounding, dtype)
    options = {"TOP": scaled_limit(format, torch.float32), "LOW": low, "HIGH": high, "SCALE_ROUNDING": scale_rounding}
    return {prefix + name: value for name, value in options.items()}


@triton.jit
def _quantize_kernel(
    x_ptr, scale_ptr, seed_ptr, out_ptr,
    groups, length, columns,
    SCALED: tl.constexpr, COMPUTED: tl.constexpr, OUTPUT: tl.constexpr,
    M: tl.constexpr, LOWEST: tl.constexpr, LIMIT: tl.constexpr, ROUNDING: tl.constexpr,
    BITS: tl.constexpr, NAN: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_L: tl.constexpr,
    TOP: tl.constexpr = 1.0, LOW: tl.constexpr = 1.0, HIGH: tl.constexpr = 1.0, SCALE_ROUNDING: tl.constexpr = "exact",
):  # fmt: skip
    g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    l = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    first = (g // columns).to(tl.int64) * length * columns + g % columns
    places = first[:, None] + l.to(tl.int64)[None, :] * columns
    inside = (g < groups)[:, None] & (l < length)[None, :]
    x = _widened(tl.load(x_ptr + places, mask=inside, other=0.0))
    if SCALED:
        if COMPUTED:
            scale = _scale(_absmax(x), TOP, LOW, HIGH, SCALE_ROUNDING)
            tl.store(scale_ptr + g, scale, mask=g < groups)
        else:
            scale = tl.load(scale_ptr + g, mask=g < groups, other=1.0)
        x = x * scale[:, None]
    words = 0
    if ROUNDING == "stochastic":
        words = _words(tl.load(seed_ptr), places)
    y = _round(x, words, M, LOWEST, LIMIT, ROUNDING)
    kind: tl.constexpr = out_ptr.dtype.element_ty
    if OUTPUT == "code":
        y = _encode(y, M, LOWEST, BITS, NAN).to(kind)
    elif OUTPUT == "number" and SCALED:
        y = _narrowed(tl.div_rn(y, tl.broadcast_to(scale[:, None], [BLOCK_G, BLOCK_L])), kind)
    else:
        y = _narrowed(y, kind)
    tl.store(out_ptr + places, y, mask=inside)


@triton.jit
def _absmax(x):
    """The largest magnitude along the last dimension, as the bits of a float32: in this order NaN is on top."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, len(x.shape) - 1)


@triton.jit
def _scale(absmax, TOP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SCALE_ROUNDING: tl.constexpr):
    """S, float32, from the bits of the largest magnitudes: see `scales.scales_of`."""
    largest = absmax.to(tl.float32, bitcast=True)
    top = tl.full(absmax.shape, TOP, tl.float32)
    if SCALE_ROUNDING == "mx":
        scale = tl.div_rn(_power_below(top), _power_below(largest))
    else:
        scale = tl.minimum(tl.div_rn(top, largest), HIGH)
        if SCALE_ROUNDING == "power_of_two":
            scale = _power_below(scale)
    # As a bare number, a subnormal one would be taken for a float64.
    scale = tl.maximum(tl.minimum(scale, HIGH), tl.full(absmax.shape, LOW, tl.float32))
    scale = tl.where(absmax == 0, 1.0, scale)
    return tl.where(absmax < 0x7F800000, scale, float("nan"))


@triton.jit
def _power_below(x):
    """The largest power of two that is at most x > 0. Subnormal numbers have it in their mantissa: lift them."""
    small = x < 2.0**-126
    lifted = tl.where(small, x * 2.0**64, x)
    power = (lifted.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(small, power * 2.0**-64, power)


@triton.jit
def _words(seed, places):
    """32 random bits for each place: see `philox.random_words`."""
    a, b, c, d = tl.randint4x(seed, places >> 2)
    which = places & 3
    return tl.where(which < 2, tl.where(which == 0, a, b), tl.where(which == 2, c, d)).to(tl.uint32, bitcast=True)


@triton.jit
def _round(x, words, M: tl.constexpr, LOWEST: tl.constexpr, LIMIT: tl.constexpr, ROUNDING: tl.constexpr):
    """The numbers of the format next to x: see `reference.round_to_format`. LOWEST is float32's exponent field."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits & 0x7FFFFFFF) ^ bits
    magnitude = tl.where(tl.abs(x) > LIMIT, LIMIT, tl.abs(x))
    bits = magnitude.to(tl.int32, bitcast=True)
    if LOWEST == 1:  # float32's own exponents
        if ROUNDING == "stochastic":
            below = bits & ((1 << (23 - M)) - 1)
            up = (words >> 8).to(tl.int32) < (below << (M + 1))
            rounded = bits + (up.to(tl.int32) << (23 - M))
        elif ROUNDING == "away":
            rounded = bits + (1 << (22 - M))
        else:
            rounded = bits + ((1 << (22 - M)) - 1) + ((bits >> (23 - M)) & 1)
        rounded = (rounded >> (23 - M)) << (23 - M)
        y = tl.where(magnitude == magnitude, rounded, bits)
    else:
        exponent = tl.maximum(bits & 0x7F800000, LOWEST << 23)
        if ROUNDING == "even" and M > 0:
            c = (exponent + (((23 - M) << 23) | 0x400000)).to(tl.float32, bitcast=True)
            y = ((magnitude + c) - c).to(tl.int32, bitcast=True)
        else:
            step = exponent - (M << 23)
            steps = magnitude * ((254 << 23) - step).to(tl.float32, bitcast=True)
            k = tl.floor(steps)
            f = steps - k
            if ROUNDING == "stochastic":
                up = (words >> 8).to(tl.int32).to(tl.float32) * 2.0**-24 < f
            elif ROUNDING == "away":
                up = f >= 0.5
            else:
                odd = (((exponent >> 23) - LOWEST + k.to(tl.int32)) & 1) == 1
                up = (f > 0.5) | ((f == 0.5) & odd)
            k = tl.where(up, k + 1.0, k)
            y = (k * step.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    return (y | sign).to(tl.float32, bitcast=True)


@triton.jit
def _encode(y, M: tl.constexpr, LOWEST: tl.constexpr, BITS: tl.constexpr, NAN: tl.constexpr):
    """The codes of numbers that are in the format: see `codes.encode`."""
    bits = y.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if LOWEST == 1:
        code = magnitude >> (23 - M)
    else:
        exponent = tl.maximum(magnitude & 0x7F800000, LOWEST << 23)
        step = exponent - (M << 23)
        steps = tl.abs(y) * ((254 << 23) - step).to(tl.float32, bitcast=True)
        code = steps.to(tl.int32) + ((exponent >> (23 - M)) - (LOWEST << M))
    code |= (bits < 0).to(tl.int32) << (BITS - 1)
    return tl.where(magnitude > 0x7F800000, NAN, code)


@triton.jit
def _widened(x):
    """As float32. 16-bit integers are the bits of bfloat16: see `_readable`."""
    if x.dtype == tl.int16:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _narrowed(y, kind: tl.constexpr):
    if kind == tl.int16:
        bits = y.to(tl.int32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        return (tl.where(y == y, rounded, bits) >> 16).to(tl.int16)
    return y.to(kind)
