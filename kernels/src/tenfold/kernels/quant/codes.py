"""Numbers of a format as their codes, and codes packed to their real width."""

import math

import torch
from torch import Tensor

from .formats import FloatFormat


def encode(x: Tensor, format: FloatFormat) -> Tensor:
    """The codes, int32, of numbers that are in the format. NaN gets the code of NaN, or of 0 if there is none."""
    M = format.mantissa_bits
    x = x.float()  # which has all the numbers
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    if format.exponent_bits == 8:  # float32's own exponents
        code = magnitude >> (23 - M)
    else:
        lowest = (127 + format.min_exponent) << 23
        exponent = (magnitude & 0x7F800000).clamp_(min=lowest)
        step = exponent - (M << 23)
        steps = x.abs() * ((254 << 23) - step).view(torch.float32)
        code = steps.to(torch.int32) + ((exponent - lowest) >> (23 - M))
    code |= (bits < 0).to(torch.int32) << (format.bits - 1)
    return torch.where(magnitude > 0x7F800000, nan_code(format), code)


def nan_code(format: FloatFormat) -> int:
    """The code of a quiet NaN, without its sign; that of 0 in formats that have none."""
    infinity = format.max_code + 1
    return {"none": 0, "nan": infinity, "ieee": infinity + 2**format.mantissa_bits // 2}[format.specials]


def decode(codes: Tensor, format: FloatFormat, dtype: torch.dtype) -> Tensor:
    """The numbers of integer codes; infinity for those of e8m* that are beyond `dtype`."""
    table = format.values().to(codes.device, dtype)
    return table.index_select(0, codes.reshape(-1)).view(codes.shape)


def pack(codes: Tensor, bits: int) -> Tensor:
    """`(…, n)` codes of 2 to 16 bits as `(…, ceil(n · bits / 8))` bytes: one bit stream per row, low bits first."""
    period, width = _period(bits)
    n = codes.shape[-1]
    groups = torch.nn.functional.pad(codes, (0, -n % period)).unflatten(-1, (-1, period))
    packed = groups.new_empty(*groups.shape[:-1], width, dtype=torch.uint8)
    for byte in range(width):
        value = torch.zeros_like(groups[..., 0])
        for i in range(8 * byte // bits, min(period, (8 * byte + 7) // bits + 1)):
            shift = i * bits - 8 * byte
            value |= groups[..., i] << shift if shift >= 0 else groups[..., i] >> -shift
        packed[..., byte] = (value & 0xFF).to(torch.uint8)
    return packed.flatten(-2)[..., : packed_length(n, bits)].contiguous()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The first `n` codes of each row, int32."""
    period, width = _period(bits)
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % width))
    groups = padded.unflatten(-1, (-1, width)).to(torch.int32)
    codes = groups.new_empty(*groups.shape[:-1], period)
    for i in range(period):
        value = torch.zeros_like(groups[..., 0])
        for byte in range(i * bits // 8, ((i + 1) * bits - 1) // 8 + 1):
            shift = i * bits - 8 * byte
            value |= groups[..., byte] >> shift if shift >= 0 else groups[..., byte] << -shift
        codes[..., i] = value & (2**bits - 1)
    return codes.flatten(-2)[..., :n]


def packed_length(n: int, bits: int) -> int:
    """Bytes of a row of `n` codes."""
    return -(-n * bits // 8)


def _period(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and how many bytes."""
    period = 8 // math.gcd(8, bits)
    return period, period * bits // 8
