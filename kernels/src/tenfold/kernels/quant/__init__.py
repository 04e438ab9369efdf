"""Quantization to any small floating-point format, and matrix products of quantized operands (arXiv 2501.02423)."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..backend import choose_backend, refuse_tangents
from . import codes as coding
from . import cpu, reference
from .formats import FloatFormat, Format
from .matmul import quant_matmul
from .philox import random_words
from .scales import scale_shape, scaled_limit, scales_of, split, split_scale

__all__ = ["FloatFormat", "Format", "Quantized", "dequantize", "fake_quantize", "quant_matmul", "quantize"]

Scale = Literal["tensor", "axis", "block"]
Rounding = Literal["even", "away", "stochastic"]
ScaleRounding = Literal["exact", "power_of_two", "mx"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Quantized(NamedTuple):
    """What `quantize` returns and `dequantize` takes."""

    codes: Tensor  # uint8, (…, ceil(n · bits / 8)): along the last dimension a stream of codes, low bits first
    scales: Tensor | None  # float32; one per tensor, slice or block, as x's shape says; None: no scaling
    format: FloatFormat
    shape: tuple[int, ...]
    dtype: torch.dtype
    scale: Scale | None  # None also if the scales were given
    block_size: int
    axis: int

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and the scales, as they are stored."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales) if t is not None)


def fake_quantize(
    x: Tensor,
    format: Format,
    *,
    scale: Scale | Tensor | None = None,
    block_size: int = 128,
    axis: int = -1,
    rounding: Rounding = "even",
    scale_rounding: ScaleRounding = "exact",
    generator: torch.Generator | None = None,
) -> Tensor:
    """X as it would be after a trip through a small floating-point format, in x's own dtype.

    For each group of elements that share a scale (Eq. 7 of arXiv 2501.02423):

        S = max(format) / max|x|
        y = round(x · S) / S

    Both products and `S` are float32 (float64 for float64). `round` takes the nearest number of the format, and
    magnitudes beyond its largest become the largest: it saturates. The gradient is passed straight through.

    What is not a number: without a scale, NaN stays NaN and infinity saturates. With one, a group that
    holds NaN or infinity has no scale, and becomes NaN as a whole. A group of zeros stays zeros; zeros keep
    their sign. A scale is kept inside the range in which neither it nor `max / S` is infinite, which changes
    groups whose largest magnitude is the largest of x's dtype or, nearly, subnormal.

    Args:
        x: any shape; float32, bfloat16, float16, or float64 (not on the triton backend).
        format: a `FloatFormat` or its name, such as `"e4m3"`, `"e2m1"`, `"e4m3fn"`.
        scale: `None`: S = 1. `"tensor"`: one. `"axis"`: one for each slice along `axis`. `"block"`: one for each
            `block_size` consecutive elements along `axis`. A tensor: S itself, which must broadcast to x's
            shape and be positive; it gets no gradient.
        block_size: must divide x's size along `axis`. Read only if `scale` is `"block"`.
        axis: along which a slice or block lies: for a matrix product, the one that is summed over.
        rounding: of ties `"even"`, to the even code, as hardware and IEEE 754 do; `"away"` from zero, as QPyTorch,
            the paper's simulator, does. `"stochastic"`: up or down, with probabilities that make the expectation x
            (to 24 bits); the same elements and the same seed give the same result on every device.
        scale_rounding: `"exact"`; `"power_of_two"`: S is rounded down to a power of two, so that nothing
            saturates; `"mx"`: the power of two by the rule of the OCP MX specification, which takes the largest
            magnitude to the format's top binade, where what is beyond its largest number saturates.
        generator: of the seed for stochastic rounding; torch's own by default.

    Returns:
        x's shape and dtype, contiguous. float16 and bfloat16 results are rounded to x's dtype once more, which
        changes nothing if it has the scaled number.

    Raises:
        ValueError, TypeError: a format that cannot exist, a wrong dtype, axis, scale or option, or blocks that
            do not divide the axis, before anything is computed.

    Example:
        >>> fake_quantize(torch.tensor([0.3, 1.0, 2.5, -100.0]), "e2m1")
        tensor([ 0.5000,  1.0000,  2.0000, -6.0000])
    """
    arguments = _checked(x, format, scale, block_size, axis, rounding, scale_rounding, generator)
    refuse_tangents(x=x)
    return _fake_quantize(x, *arguments, _backend(x))


def quantize(
    x: Tensor,
    format: Format,
    *,
    scale: Scale | Tensor | None = None,
    block_size: int = 128,
    axis: int = -1,
    rounding: Rounding = "even",
    scale_rounding: ScaleRounding = "exact",
    generator: torch.Generator | None = None,
) -> Quantized:
    """X as codes of a small floating-point format, packed to their real width, and scales.

    `dequantize(quantize(x, …))` is `fake_quantize(x, …)`, bit for bit. Memory is `bits / 8` bytes per element, each
    row along the last dimension rounded up to whole bytes, and 4 per scale: `nbytes` counts it.

    Without a scale or with a given one, NaN has a code only in formats that have one; in the others it makes the
    scales NaN, and so the whole of the dequantized tensor. No gradient.

    Args and errors: as for `fake_quantize`.

    Example:
        >>> q = quantize(torch.randn(1024, 1024), "e3m2", scale="block", block_size=128)
        >>> q.nbytes / 1024**2
        0.78125
    """
    arguments = _checked(x, format, scale, block_size, axis, rounding, scale_rounding, generator)
    packed, scales = _quantize(x.detach(), *arguments, _backend(x))
    kind = None if isinstance(scale, Tensor) else scale
    if scale is None and FloatFormat.parse(format).specials != "none":
        scales = None
    return Quantized(packed, scales, FloatFormat.parse(format), tuple(x.shape), x.dtype, kind, block_size, axis)


def dequantize(quantized: Quantized) -> Tensor:
    """The numbers that codes and scales stand for, in the dtype that was quantized. No gradient."""
    codes, scales, format, shape, dtype, scale, block_size, axis = quantized
    return _dequantize(codes, scales, format.name, shape, dtype, scale, block_size, axis)


@torch.library.custom_op("tenfold::fake_quantize", mutates_args=())
def _fake_quantize(
    x: Tensor,
    given: Tensor | None,
    seed: Tensor | None,
    format: str,
    scale: str | None,
    block_size: int,
    axis: int,
    rounding: str,
    scale_rounding: str,
    backend: str,
) -> Tensor:
    fmt = FloatFormat.parse(format)
    groups, scales = _groups(x, given, scale, block_size, axis)
    limit = _limit(fmt, x.dtype, scaled=given is not None or scale is not None)
    if backend == "triton":
        from . import triton

        scaling = None if scale is None else scale_rounding
        options = {"scale_rounding": scaling, "output": "number", "dtype": x.dtype}
        out, _ = triton.quantize(groups, scales, seed, fmt, limit, rounding, **options)
        return out.view(x.shape)
    if scale is not None:
        scales = _scales(groups, fmt, scale_rounding, backend)
    if backend == "cpu":
        return cpu.fake_quantize(groups, scales, fmt, limit, rounding, seed).view(x.shape)
    return reference.fake_quantize(groups, scales, fmt, limit, rounding, _words(x, seed)).view(x.shape)


@_fake_quantize.register_fake
def _(x, given, seed, format, scale, block_size, axis, rounding, scale_rounding, backend):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _straight_through(ctx, grad):
    return grad, *(None,) * 9


_fake_quantize.register_autograd(_straight_through)


@torch.library.custom_op("tenfold::quantize", mutates_args=())
def _quantize(
    x: Tensor,
    given: Tensor | None,
    seed: Tensor | None,
    format: str,
    scale: str | None,
    block_size: int,
    axis: int,
    rounding: str,
    scale_rounding: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Packed codes and scales; a scale of 1, or NaN, if there is none."""
    fmt = FloatFormat.parse(format)
    wide = torch.promote_types(x.dtype, torch.float32)
    groups, scales = _groups(x, given, scale, block_size, axis)
    limit = _limit(fmt, x.dtype, scaled=given is not None or scale is not None)
    kind = torch.int16 if fmt.bits > 8 else torch.uint8
    if backend == "triton":
        from . import triton

        scaling = None if scale is None else scale_rounding
        options = {"scale_rounding": scaling, "output": "code", "dtype": kind}
        codes, scales = triton.quantize(groups, scales, seed, fmt, limit, rounding, **options)
    else:
        if scale is not None:
            scales = _scales(groups, fmt, scale_rounding, backend)
        codes = torch.empty(groups.shape, dtype=kind, device=x.device)
        if backend == "cpu":
            for place, y, _ in cpu.rounded(groups, scales, fmt, limit, rounding, seed):
                codes[place].copy_(coding.encode(y, fmt))
        else:
            scaled = groups.to(wide) if scales is None else groups.to(wide) * scales
            codes.copy_(coding.encode(reference.round_to_format(scaled, fmt, limit, rounding, _words(x, seed)), fmt))
    packed = coding.pack(codes.view(x.shape if x.dim() else (1,)), fmt.bits)
    if scale is None:
        scales = torch.ones((), device=x.device) if given is None else given
        if fmt.specials == "none":
            scales = torch.where(x.isnan().any(), torch.nan, scales)
        scales = scales.to(wide, copy=True)
    else:
        scales = scales.reshape(scale_shape(x.shape, scale, block_size, axis))
    return packed, scales


@_quantize.register_fake
def _(x, given, seed, format, scale, block_size, axis, rounding, scale_rounding, backend):
    wide = torch.promote_types(x.dtype, torch.float32)
    last = coding.packed_length(x.shape[-1] if x.dim() else 1, FloatFormat.parse(format).bits)
    shape = scale_shape(x.shape, scale, block_size, axis) if given is None else given.shape
    return x.new_empty((*x.shape[:-1], last), dtype=torch.uint8), x.new_empty(shape, dtype=wide)


@torch.library.custom_op("tenfold::dequantize", mutates_args=())
def _dequantize(
    codes: Tensor,
    scales: Tensor | None,
    format: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    scale: str | None,
    block_size: int,
    axis: int,
) -> Tensor:
    fmt = FloatFormat.parse(format)
    wide = torch.promote_types(dtype, torch.float32)
    last = shape[-1] if len(shape) else 1
    y = torch.empty(math.prod(shape[:-1]), last, dtype=wide, device=codes.device)
    step = max(1, cpu.PIECE // max(1, last)) if codes.device.type == "cpu" else max(1, len(y))
    for i in range(0, len(y), step):
        packed = codes.view(len(y), codes.shape[-1])[i : i + step]
        y[i : i + step] = coding.decode(coding.unpack(packed, fmt.bits, last), fmt, wide)
    y = y.view(list(shape))
    if scale in ("axis", "block"):
        groups = split(y, scale, block_size, axis)
        groups.div_(scales.reshape(groups.shape[0], 1, groups.shape[2]))
    elif scales is not None:
        y.div_(scales)
    return y.to(dtype)


@_dequantize.register_fake
def _(codes, scales, format, shape, dtype, scale, block_size, axis):
    return codes.new_empty(shape, dtype=dtype)


def _groups(x: Tensor, given: Tensor | None, scale: str | None, block_size: int, axis: int):
    """X as `(rows, length, columns)`, and the S that were given, as `(rows, 1, columns)`."""
    if given is None:
        return split(x, scale, block_size, axis), None
    scales, shape = split_scale(given.to(torch.promote_types(x.dtype, torch.float32)), x.shape)
    return x.contiguous().view(shape), scales


def _scales(groups: Tensor, format: FloatFormat, scale_rounding: str, backend: str) -> Tensor | None:
    if groups.numel() == 0:
        wide = torch.promote_types(groups.dtype, torch.float32)
        return groups.new_ones(groups.shape[0], 1, groups.shape[2], dtype=wide)
    absmax = cpu.absmax(groups) if backend == "cpu" else groups.abs().amax(1, keepdim=True)
    return scales_of(absmax, format, scale_rounding, groups.dtype)


def _limit(format: FloatFormat, dtype: torch.dtype, scaled: bool) -> float:
    """The largest magnitude that rounding gives: without a scale, it has to fit x's own dtype."""
    return scaled_limit(format, torch.promote_types(dtype, torch.float32) if scaled else dtype)


def _words(x: Tensor, seed: Tensor | None) -> Tensor | None:
    return None if seed is None else random_words(seed, 0, x.numel())


def _backend(x: Tensor) -> str:
    backend = choose_backend(x)
    if backend == "triton" and x.dtype == torch.float64:
        raise TypeError("x: float64 is not supported by the triton backend; use_backend('reference') takes it")
    return backend


def _checked(x, format, scale, block_size, axis, rounding, scale_rounding, generator) -> tuple[object, ...]:
    """The arguments as the ops take them."""
    fmt = FloatFormat.parse(format)
    if not isinstance(x, Tensor) or x.dtype not in _DTYPES:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: {kind} is not supported; accepted: {', '.join(map(str, _DTYPES))}")
    for name, value, accepted in (
        ("rounding", rounding, get_args(Rounding)),
        ("scale_rounding", scale_rounding, get_args(ScaleRounding)),
    ):
        if value not in accepted:
            raise ValueError(f"{name}: unknown {value!r}; accepted: {', '.join(accepted)}")
    given = scale if isinstance(scale, Tensor) else None
    kind = None if given is not None else scale
    if given is not None:
        if not given.is_floating_point():
            raise TypeError(f"scale: expected a floating-point tensor, got {given.dtype}")
        if given.device != x.device:
            raise ValueError(f"scale: is on {given.device}, x on {x.device}")
        if given.dim() > x.dim() or any(
            m not in (1, n) for m, n in zip(given.shape[::-1], x.shape[::-1], strict=False)
        ):
            raise ValueError(f"scale: shape {tuple(given.shape)} does not broadcast to x's {tuple(x.shape)}")
    elif kind is not None and kind not in get_args(Scale):
        raise ValueError(f"scale: unknown {scale!r}; accepted: None, a tensor, {', '.join(get_args(Scale))}")
    if kind in ("axis", "block"):
        if not -x.dim() <= axis < x.dim():
            raise ValueError(f"axis: {axis} is out of range for x of shape {tuple(x.shape)}")
        axis %= x.dim()
        if kind == "block" and (block_size < 1 or x.shape[axis] % block_size):
            raise ValueError(f"block_size: {block_size} does not divide x's {x.shape[axis]} along axis {axis}")
    seed = None
    if rounding == "stochastic":
        device = x.device if generator is None else generator.device
        seed = torch.randint(2**63 - 1, (), generator=generator, device=device).to(x.device)
    return given, seed, fmt.name, kind, block_size, axis, rounding, scale_rounding
