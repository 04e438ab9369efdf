"""Vectors in 4 or 8 bits a number, a scale for each group along the last axis: how latents are cached."""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..quant.formats import FloatFormat

Code = Literal["symmetric", "asymmetric", "float"]

FLOATS = {4: FloatFormat.parse("e2m1"), 8: FloatFormat.parse("e4m3fn")}
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class PackedLatents(NamedTuple):
    """Vectors of `width` numbers, c ≈ code · scale of its group (+ the group's offset).

    Every vector stands for itself: slicing, concatenating and gathering the tensors alike, along any axis but the
    last, does the same to the vectors: `packed.map(lambda x: x[:, 4:9])`.
    """

    # uint8. In 8 bits (…, width). In 4 bits (…, ⌈width/2⌉): the low half of byte i is code i, the high half code
    # i + ⌈width/2⌉, so that a row unpacks into two runs and nothing is interleaved.
    codes: Tensor
    scales: Tensor | None  # (…, ⌈width/group_size⌉); for asymmetric codes twice as many, the offsets after the scales
    width: int
    bits: int
    group_size: int
    code: Code = "symmetric"

    @property
    def shape(self) -> torch.Size:
        """Of the tensor that was packed."""
        return torch.Size(shape_of(self))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored: the codes, and the scales if there are any."""
        return (self.codes,) if self.scales is None else (self.codes, self.scales)

    def map(self, change: Callable[[Tensor], Tensor]) -> "PackedLatents":
        """`change` made to codes and scales alike."""
        return self._replace(codes=change(self.codes), scales=None if self.scales is None else change(self.scales))


def shape_of(x: Tensor | PackedLatents) -> tuple[int, ...]:
    """Of a tensor, or of one that was packed; torch.compile reads no property of a named tuple before torch 2.13."""
    return (*x.codes.shape[:-1], x.width) if isinstance(x, PackedLatents) else tuple(x.shape)


def pack_latents(
    x: Tensor,
    *,
    bits: int = 4,
    group_size: int = 128,
    code: Code = "symmetric",
    scale_dtype: torch.dtype | None = torch.float16,
) -> PackedLatents:
    """Round vectors to numbers of 4 or 8 bits, one scale for each `group_size` numbers of a vector.

    What a code may stand for, and how it is chosen, for each group of the last axis:

    * `"symmetric"`: the integers z in -m…m, m = 2^(bits-1) - 1 (7 or 127); s = max|x| / m and z = round(x / s),
      so |x - z·s| ≤ s/2. In 4 bits this is also the floating-point format E1M2, whose eight magnitudes are evenly
      spaced.
    * `"asymmetric"`: the integers z in 0…m, m = 2^bits - 1 (15 or 255), with an offset: o = min x, rounded down to
      `scale_dtype`, s = (max x - o) / m and z = round((x - o) / s), so |x - (o + z·s)| ≤ s/2.
    * `"float"`: OCP's minifloats, E2M1 (0, ½, 1, 1½, 2, 3, 4, 6 and their negatives) in 4 bits and E4M3 (to 448) in
      8, subnormal numbers included; s = max|x| / m with m = 6 or 448, and z the number nearest to x / s. The code of
      E4M3's NaN is never made.

    Ties go to even codes; a group of zeros has s = 0 and reads back as zeros. Scales are rounded up to
    `scale_dtype`, because a scale rounded down would clip the group's largest number, by far where half precision
    is subnormal. A group with a NaN or infinity in it, or with numbers that the scale or the offset cannot hold,
    reads back as NaN. A last group may be shorter than the others; it has a scale of its own.

    With `scale_dtype=None` nothing is scaled and no scale is stored: z is the number nearest to x itself, and what is
    larger than m is clipped to it, infinity too, and NaN to 0. That is for those who divide x by steps that do not
    depend on the token, and multiply them back elsewhere.

    Args:
        x: `(…, D)`, any floating-point dtype; computed in float32, or float64 for float64.
        bits: 4 or 8.
        group_size: numbers that share a scale.
        code: `"symmetric"`, `"asymmetric"` or `"float"`.
        scale_dtype: float16, bfloat16, float32, or None for no scales; asymmetric codes need some.

    Returns:
        The codes and scales, `bits/8 + itemsize(scale_dtype)/group_size` bytes a number; asymmetric codes have two
        half-precision numbers a group instead of one.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or option.

    Example:
        >>> packed = pack_latents(torch.randn(2, 10, 512))
        >>> packed.codes.shape, packed.scales.shape
        (torch.Size([2, 10, 256]), torch.Size([2, 10, 4]))
    """
    _check(x, bits, group_size, code, scale_dtype)
    numbers, scales = x.to(torch.promote_types(x.dtype, torch.float32)), None
    if scale_dtype is not None:
        groups = _grouped(numbers, group_size)
        offset = -_round_up(-groups.amin(-1), scale_dtype) if code == "asymmetric" else None
        peak = groups.abs().amax(-1) if offset is None else groups.amax(-1) - offset.to(groups.dtype)
        scales = (peak / largest(bits, code)).to(scale_dtype)
        scales = torch.where(scales.to(peak.dtype) * largest(bits, code) < peak, _away(scales), scales)
        if offset is not None:
            groups = groups - offset.to(groups.dtype).unsqueeze(-1)
        numbers = (groups / scales.to(peak.dtype).unsqueeze(-1)).flatten(-2)[..., : x.shape[-1]]
        if offset is not None:
            scales = _lengthened(scales, offset)
    codes = _encode(numbers.nan_to_num(0.0), bits, code)  # 0/0, and what becomes NaN anyway
    if bits == 4:
        if x.shape[-1] % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        low, high = codes.chunk(2, -1)
        codes = (low & 15) | (high << 4)
    return PackedLatents(codes, scales, x.shape[-1], bits, group_size, code)


def unpack_latents(packed: PackedLatents, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The vectors that `packed` stands for, `(…, width)`: code times scale, plus offset.

    Exact in float64, and in float32 with half-precision scales but for the rounding of a sum with an offset; narrower
    dtypes round once more.

    Raises:
        ValueError, TypeError: codes and scales that do not belong together, or a dtype that is not floating.
    """
    check_packed("packed", packed)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
    wide = torch.promote_types(dtype, torch.float32)
    codes = packed.codes
    if packed.bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], -1)[..., : packed.width]
    numbers = _decode(codes, packed.bits, packed.code).to(wide)
    if packed.code == "float":
        numbers = numbers * FLOAT16_POWER[packed.bits]
    if packed.scales is not None:
        scales, *offset = packed.scales.to(wide).unsqueeze(-1).chunk(2 if packed.code == "asymmetric" else 1, -2)
        groups = _grouped(numbers, packed.group_size) * scales
        numbers = (groups + offset[0] if offset else groups).flatten(-2)[..., : packed.width]
    return numbers.to(dtype)


def fake_pack_latents(
    x: Tensor,
    *,
    bits: int = 4,
    group_size: int = 128,
    code: Code = "symmetric",
    scale_dtype: torch.dtype | None = torch.float16,
) -> Tensor:
    """`unpack_latents(pack_latents(x))` in x's dtype, with the gradient of the identity.

    What training sees, so that it sees what inference reads: the values are the same to the bit. The gradient is the
    straight-through estimate; without scales it is 0 where a number was clipped.

    Raises:
        ValueError, TypeError: as `pack_latents`.
    """
    _check(x, bits, group_size, code, scale_dtype)
    return _StraightThrough.apply(x, bits, group_size, code, scale_dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bits, group_size, code, scale_dtype):
        ctx.limit = None if scale_dtype is not None else largest(bits, code)
        if ctx.limit is not None:
            ctx.save_for_backward(x)
        packed = pack_latents(x, bits=bits, group_size=group_size, code=code, scale_dtype=scale_dtype)
        return unpack_latents(packed, dtype=x.dtype)

    @staticmethod
    def backward(ctx, grad):
        if ctx.limit is not None:
            (x,) = ctx.saved_tensors
            grad = grad.masked_fill(x.abs() > ctx.limit, 0.0)
        return grad, None, None, None, None


def largest(bits: int, code: Code) -> float:
    """The largest number that has a code."""
    if code == "float":
        return FLOATS[bits].max
    return 2 ** (bits - (code == "symmetric")) - 1


# A minifloat's code, its sign at the top of an int16, becomes a float16 by a shift to the right: its exponent and
# mantissa then lie where float16's begin, subnormal numbers too, and the value is off by the two biases alone.
FLOAT16_SHIFT = {bits: 5 - f.exponent_bits for bits, f in FLOATS.items()}
FLOAT16_MASK = {bits: ((2 ** (bits - 1) - 1) << (10 - f.mantissa_bits)) - 2**15 for bits, f in FLOATS.items()}
FLOAT16_POWER = {bits: 2.0 ** (15 - f.bias) for bits, f in FLOATS.items()}


def _encode(x: Tensor, bits: int, code: Code) -> Tensor:
    """The codes of the numbers nearest to `x`, uint8, in their last bits."""
    top = largest(bits, code)
    if code == "asymmetric":
        return x.round().clamp(0, top).to(torch.uint8)
    x = x.clamp(-top, top)
    if code == "symmetric":
        return x.round().to(torch.int8).view(torch.uint8)
    format = FLOATS[bits]
    exponent = (torch.frexp(x).exponent - 1).clamp(min=format.min_exponent)
    step = torch.ldexp(torch.ones_like(x), exponent - format.mantissa_bits)
    half = ((x / step).round() * step / FLOAT16_POWER[bits]).to(torch.float16).view(torch.int16)
    magnitude = (half & 0x7FFF) >> (10 - format.mantissa_bits)
    return (magnitude | (half < 0).to(torch.int16) << (bits - 1)).to(torch.uint8)


def _decode(codes: Tensor, bits: int, code: Code) -> Tensor:
    """The numbers of uint8 codes, in a narrow dtype; those of minifloats still lack `FLOAT16_POWER`."""
    if code == "asymmetric":
        return codes
    if code == "symmetric":
        return (codes << (8 - bits)).view(torch.int8) >> (8 - bits)
    half = (codes.to(torch.int16) << (16 - bits)) >> FLOAT16_SHIFT[bits]
    return (half & FLOAT16_MASK[bits]).view(torch.float16)


def check_packed(name: str, packed: PackedLatents) -> None:
    """That codes and scales belong together.

    Raises:
        ValueError, TypeError: they do not.
    """
    codes, scales, width, bits, group_size, code = packed
    if bits not in (4, 8):
        raise ValueError(f"{name}.bits: expected 4 or 8, got {bits}")
    if code not in get_args(Code):
        raise ValueError(f"{name}.code: expected {_names(get_args(Code))}, got {code!r}")
    bytes_each = (width * bits + 7) // 8
    if codes.dtype != torch.uint8:
        raise TypeError(f"{name}.codes: expected torch.uint8, got {codes.dtype}")
    if codes.dim() == 0 or codes.shape[-1] != bytes_each:
        raise ValueError(f"{name}.codes: expected (…, {bytes_each}) for {width} numbers, got {tuple(codes.shape)}")
    if scales is None:
        if code == "asymmetric":
            raise ValueError(f"{name}.scales: are None, but asymmetric codes need scales and offsets")
        return
    if scales.dtype not in _SCALE_DTYPES:
        raise TypeError(f"{name}.scales: dtype {scales.dtype} is not supported; accepted: {_names(_SCALE_DTYPES)}")
    if codes.device != scales.device:
        raise ValueError(f"{name}.scales: is on {scales.device}, the codes on {codes.device}")
    expected = (*codes.shape[:-1], -(-width // group_size) * (2 if code == "asymmetric" else 1))
    if tuple(scales.shape) != expected:
        raise ValueError(f"{name}.scales: expected {expected} to go with the codes, got {tuple(scales.shape)}")


def _check(x: Tensor, bits: int, group_size: int, code: Code, scale_dtype: torch.dtype | None) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected (…, width) with width at least 1, got shape {tuple(x.shape)}")
    if bits not in (4, 8):
        raise ValueError(f"bits: expected 4 or 8, got {bits}")
    if group_size < 1:
        raise ValueError(f"group_size: expected at least 1, got {group_size}")
    if code not in get_args(Code):
        raise ValueError(f"code: expected {_names(get_args(Code))}, got {code!r}")
    if scale_dtype is None:
        if code == "asymmetric":
            raise ValueError("scale_dtype: is None, but asymmetric codes need scales and offsets")
    elif scale_dtype not in _SCALE_DTYPES:
        raise TypeError(f"scale_dtype: {scale_dtype} is not supported; accepted: {_names(_SCALE_DTYPES)}, None")


def _names(accepted: tuple) -> str:
    return ", ".join(map(str, accepted))


def _grouped(x: Tensor, group_size: int) -> Tensor:
    """`(…, D)` as `(…, groups, size)`, the last group filled up with its last number."""
    size = min(group_size, x.shape[-1])
    if missing := -x.shape[-1] % size:
        x = _lengthened(x, x[..., -1:].expand(*x.shape[:-1], missing))
    return x.unflatten(-1, (-1, size))


def _lengthened(x: Tensor, more: Tensor) -> Tensor:
    """Both, one after the other: torch.cat, but for autocast, which makes that refuse float16 on a CPU."""
    y = torch.nn.functional.pad(x, (0, more.shape[-1]))
    y[..., x.shape[-1] :] = more
    return y


def _round_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest number of `dtype` that is not below `x`."""
    y = x.to(dtype)
    return torch.where(y.to(x.dtype) < x, torch.where(y < 0, _away(y, -1), _away(y)), y)


def _away(x: Tensor, steps: int = 1) -> Tensor:
    """The number of x's dtype so many steps further from 0: torch.nextafter knows no half precision."""
    bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)
    return (bits + steps).view(x.dtype)
