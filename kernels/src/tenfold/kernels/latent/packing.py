"""Vectors in 4 or 8 bits a number, a scale for each group along the last axis: how latents are cached."""

from typing import NamedTuple

import torch
from torch import Tensor

_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class PackedLatents(NamedTuple):
    """Vectors of `width` numbers, c ≈ code · scale of its group.

    Every vector stands for itself: slicing, concatenating and gathering `codes` and `scales` alike, along any
    axis but the last, does the same to the vectors. `packed._replace(codes=…, scales=…)` keeps the rest.
    """

    # uint8, two's complement. In 8 bits (…, width). In 4 bits (…, ⌈width/2⌉): the low half of byte i is code i,
    # the high half code i + ⌈width/2⌉, so that a row unpacks into two runs and nothing is interleaved.
    codes: Tensor
    scales: Tensor  # (…, ⌈width/group_size⌉)
    width: int
    bits: int
    group_size: int

    @property
    def shape(self) -> torch.Size:
        """Of the tensor that was packed."""
        return torch.Size((*self.scales.shape[:-1], self.width))


def pack_latents(
    x: Tensor, *, bits: int = 4, group_size: int = 128, scale_dtype: torch.dtype = torch.float16
) -> PackedLatents:
    """Round vectors to symmetric `bits`-bit integers, one scale for each `group_size` numbers of a vector.

    With m = 2^(bits-1) - 1 (7 or 127), for each group of the last axis:

        s = max|x| / m, rounded up to `scale_dtype`
        z = round(x / s), in -m…m, ties to even; 0 in a group of zeros

    so |x - z·s| ≤ s/2. Rounded up, because a scale rounded down would clip the group's largest number, by far
    where half precision is subnormal. A group that holds NaN or infinity, or more than m times the largest
    `scale_dtype`, reads back as NaN. A last group may be shorter than the others; it has a scale of its own.

    In 4 bits this is also the floating-point format E1M2, whose eight magnitudes are evenly spaced.

    Args:
        x: `(…, D)`, any floating-point dtype; computed in float32, or float64 for float64.
        bits: 4 or 8.
        group_size: numbers that share a scale.
        scale_dtype: float16, bfloat16 or float32.

    Returns:
        The codes and scales, `bits/8 + itemsize(scale_dtype)/group_size` bytes a number.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or option.

    Example:
        >>> packed = pack_latents(torch.randn(2, 10, 512))
        >>> packed.codes.shape, packed.scales.shape
        (torch.Size([2, 10, 256]), torch.Size([2, 10, 4]))
    """
    _check(x, bits, group_size, scale_dtype)
    top = 2 ** (bits - 1) - 1
    groups = _grouped(x.to(torch.promote_types(x.dtype, torch.float32)), group_size)
    peak = groups.abs().amax(-1)
    scales = (peak / top).to(scale_dtype)
    scales = torch.where(scales.to(peak.dtype) * top < peak, _next_up(scales), scales)
    divisor = scales.to(peak.dtype).unsqueeze(-1)
    codes = (groups / divisor).nan_to_num(0.0).round().clamp(-top, top)  # 0/0, and what becomes NaN anyway
    codes = codes.flatten(-2)[..., : x.shape[-1]].to(torch.int8).view(torch.uint8)
    if bits == 4:
        if x.shape[-1] % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        low, high = codes.chunk(2, -1)
        codes = (low & 15) | (high << 4)
    return PackedLatents(codes, scales, x.shape[-1], bits, group_size)


def unpack_latents(packed: PackedLatents, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The vectors that `packed` stands for, `(…, width)`: code times scale.

    Exact in float32 and float64; narrower dtypes round once.

    Raises:
        ValueError, TypeError: codes and scales that do not belong together, or a dtype that is not floating.
    """
    check_packed("packed", packed)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
    wide = torch.promote_types(dtype, torch.float32)
    codes = packed.codes.view(torch.int8)
    if packed.bits == 4:
        codes = torch.cat([(codes << 4) >> 4, codes >> 4], -1)[..., : packed.width]
    groups = _grouped(codes.to(wide), packed.group_size) * packed.scales.to(wide).unsqueeze(-1)
    return groups.flatten(-2)[..., : packed.width].to(dtype)


def fake_pack_latents(
    x: Tensor, *, bits: int = 4, group_size: int = 128, scale_dtype: torch.dtype = torch.float16
) -> Tensor:
    """`unpack_latents(pack_latents(x))` in x's dtype, with the gradient of the identity.

    What training sees, so that it sees what inference reads: the values are the same to the bit. The gradient
    is the straight-through estimate, also where a value is clipped.

    Raises:
        ValueError, TypeError: as `pack_latents`.
    """
    _check(x, bits, group_size, scale_dtype)
    return _StraightThrough.apply(x, bits, group_size, scale_dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bits, group_size, scale_dtype):
        packed = pack_latents(x, bits=bits, group_size=group_size, scale_dtype=scale_dtype)
        return unpack_latents(packed, dtype=x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None, None


def check_packed(name: str, packed: PackedLatents) -> None:
    """That codes and scales belong together.

    Raises:
        ValueError, TypeError: they do not.
    """
    codes, scales, width, bits, group_size = packed
    if bits not in (4, 8):
        raise ValueError(f"{name}.bits: expected 4 or 8, got {bits}")
    bytes_each = (width * bits + 7) // 8
    if codes.dtype != torch.uint8:
        raise TypeError(f"{name}.codes: expected torch.uint8, got {codes.dtype}")
    if scales.dtype not in _SCALE_DTYPES:
        raise TypeError(f"{name}.scales: dtype {scales.dtype} is not supported; accepted: {_names(_SCALE_DTYPES)}")
    if codes.device != scales.device:
        raise ValueError(f"{name}.scales: is on {scales.device}, the codes on {codes.device}")
    expected = (*codes.shape[:-1], -(-width // group_size))
    if codes.dim() == 0 or codes.shape[-1] != bytes_each:
        raise ValueError(f"{name}.codes: expected (…, {bytes_each}) for {width} numbers, got {tuple(codes.shape)}")
    if tuple(scales.shape) != expected:
        raise ValueError(f"{name}.scales: expected {expected} to go with the codes, got {tuple(scales.shape)}")


def _check(x: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected (…, width) with width at least 1, got shape {tuple(x.shape)}")
    if bits not in (4, 8):
        raise ValueError(f"bits: expected 4 or 8, got {bits}")
    if group_size < 1:
        raise ValueError(f"group_size: expected at least 1, got {group_size}")
    if scale_dtype not in _SCALE_DTYPES:
        raise TypeError(f"scale_dtype: {scale_dtype} is not supported; accepted: {_names(_SCALE_DTYPES)}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(map(str, dtypes))


def _grouped(x: Tensor, group_size: int) -> Tensor:
    """`(…, D)` as `(…, groups, size)`, the last group filled up with zeros."""
    size = min(group_size, x.shape[-1])
    if x.shape[-1] % size:
        x = torch.nn.functional.pad(x, (0, -x.shape[-1] % size))
    return x.unflatten(-1, (-1, size))


def _next_up(x: Tensor) -> Tensor:
    """The next larger number of x's dtype, for x at least 0: torch.nextafter knows no half precision."""
    bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)
    return (bits + 1).view(x.dtype)
