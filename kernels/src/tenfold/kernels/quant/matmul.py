"""A matrix product of operands that are quantized on the way in."""

from typing import Literal, get_args

import torch
from torch import Tensor

from ..backend import autocast, choose_backend, refuse_tangents, require_tensors
from .formats import FloatFormat, Format

Scale = Literal["tensor", "axis", "block"]
Rounding = Literal["even", "away"]
ScaleRounding = Literal["exact", "power_of_two", "mx"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def quant_matmul(
    a: Tensor,
    b: Tensor,
    *,
    a_format: Format | None = None,
    b_format: Format | None = None,
    scale: Scale | None = "block",
    a_scale: Scale | Literal["same"] | None = "same",
    b_scale: Scale | Literal["same"] | None = "same",
    block_size: int = 128,
    rounding: Rounding = "even",
    scale_rounding: ScaleRounding = "exact",
) -> Tensor:
    """`Q(a) @ Q(b)ᵀ`: a product of quantized operands, as in each of the three of Eq. 8 of arXiv 2501.02423.

    Q is `fake_quantize` along the last axis of both, the one that is summed over: blocks and slices lie along it. An
    operand without a format is not quantized. The sum is float32 and is rounded once, to the dtype of the result.

    The gradients pass straight through the quantizers: `da = g @ Q(b)`, `db = gᵀ @ Q(a)`, with the operands as the
    forward had them. Where backward operands need formats of their own, call three products.

    How it is computed. On the CPU: `fake_quantize`, then a float32 product. In Triton, `round(x · S)` enters
    the product, and the scales are divided out of its sums, one block at a time: the numbers are exact in the tensor
    cores' dtypes, and `Q`'s own rounding of `round(x · S) / S` is not made. Operands are quantized as they are
    loaded; one that more than a few tiles would load again is quantized once before, into the narrowest dtype that
    has its numbers. If both formats fit, that is float8, whose tensor cores multiply them where the chip has such:
    `e4m3fn` and `e5m2ocp`, and every format whose numbers are among theirs: `e2m1`, `e2m3`, `e3m2`, …; the paper's
    `e4m3`, whose top is 480, and its `e5m2` are not and take bfloat16's. Formats of 7 and 8 exponent bits, more
    mantissa bits than the dtype has, and blocks that 16 does not divide are quantized before, as Q says.

    Args:
        a: `(…, M, K)`, float32, bfloat16, float16, or float64 (not on the triton backend).
        b: `(N, K)`, a's dtype.
        a_format: of a; None leaves it as it is.
        b_format: of b.
        scale: as for `fake_quantize`: `None`, `"tensor"`, `"axis"` (one per row), `"block"`.
        a_scale: of a alone, where it differs.
        b_scale: of b alone.
        block_size: must divide K if there are blocks.
        rounding: of ties; not stochastic.
        scale_rounding: as for `fake_quantize`.

    Returns:
        `(…, M, N)`, a's dtype.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device, format or option, before anything is computed.

    Example:
        >>> x, weight = torch.randn(2, 16, 256), torch.randn(512, 256)
        >>> quant_matmul(x, weight, b_format="e2m1", scale="block", block_size=128).shape
        torch.Size([2, 16, 512])
    """
    require_tensors(a=a, b=b)
    a, b = autocast(a, b)
    formats = [None if f is None else FloatFormat.parse(f).name for f in (a_format, b_format)]
    scales = [scale if s == "same" else s for s in (a_scale, b_scale)]
    _check(a, b, scales, block_size, rounding, scale_rounding)
    for name, fmt, kind in zip("ab", formats, scales, strict=True):
        if fmt is not None and kind == "block" and (block_size < 1 or a.shape[-1] % block_size):
            raise ValueError(f"block_size: {block_size} does not divide {name}'s last dimension, {a.shape[-1]}")
    backend = choose_backend(a)
    if backend == "triton" and a.dtype == torch.float64:
        raise TypeError("a: float64 is not supported by the triton backend; use_backend('reference') takes it")
    refuse_tangents(a=a, b=b)
    out = _matmul(a.reshape(-1, a.shape[-1]), b, *formats, *scales, block_size, rounding, scale_rounding, backend)
    return out.view(*a.shape[:-1], len(b))


@torch.library.custom_op("tenfold::quant_matmul", mutates_args=())
def _matmul(
    a: Tensor,
    b: Tensor,
    a_format: str | None,
    b_format: str | None,
    a_scale: str | None,
    b_scale: str | None,
    block_size: int,
    rounding: str,
    scale_rounding: str,
    backend: str,
) -> Tensor:
    options = (block_size, rounding, scale_rounding)
    if backend == "triton" and (a_format or b_format):
        from . import triton_matmul

        formats = [f and FloatFormat.parse(f) for f in (a_format, b_format)]
        return triton_matmul.matmul(a, b, *formats, a_scale, b_scale, *options)
    a = _quantized(a, a_format, a_scale, *options, backend)
    b = _quantized(b, b_format, b_scale, *options, backend)
    return _product(a, b.t(), backend)


@_matmul.register_fake
def _(a, b, a_format, b_format, a_scale, b_scale, block_size, rounding, scale_rounding, backend):
    return torch.empty(a.shape[0], b.shape[0], dtype=a.dtype, device=a.device)


def _save(ctx, inputs, output):
    a, b, *ctx.options = inputs
    ctx.save_for_backward(a, b)


def _differentiate(ctx, grad):
    a, b = ctx.saved_tensors
    a_format, b_format, a_scale, b_scale, *options = ctx.options
    da = db = None
    if ctx.needs_input_grad[0]:
        da = _product(grad, _quantized(b, b_format, b_scale, *options), options[-1])
    if ctx.needs_input_grad[1]:
        db = _product(grad.t(), _quantized(a, a_format, a_scale, *options), options[-1])
    return da, db, *(None,) * 8


_matmul.register_autograd(_differentiate, setup_context=_save)


def _quantized(x, format, scale, block_size, rounding, scale_rounding, backend) -> Tensor:
    if format is None:
        return x
    options = (scale, block_size, 1, rounding, scale_rounding, backend)
    return torch.ops.tenfold.fake_quantize(x, None, None, format, *options)


def _product(a: Tensor, b: Tensor, backend: str) -> Tensor:
    """`a @ b`; on the CPU in float32, as half-precision products are far slower on most."""
    if backend == "cpu" and a.dtype in (torch.bfloat16, torch.float16):
        return (a.float() @ b.float()).to(a.dtype)
    return a @ b


def _check(a, b, scales, block_size, rounding, scale_rounding) -> None:
    for name, x in (("a", a), ("b", b)):
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name}: dtype {x.dtype} is not supported; accepted: {', '.join(map(str, _DTYPES))}")
    if a.dtype != b.dtype:
        raise TypeError(f"b: dtype {b.dtype} differs from a's {a.dtype}")
    if a.device != b.device:
        raise ValueError(f"b: is on {b.device}, a on {a.device}")
    if a.dim() < 1 or a.shape[-1] == 0:
        raise ValueError(f"a: expected (..., K) with K at least 1, got shape {tuple(a.shape)}")
    if b.dim() != 2 or b.shape[1] != a.shape[-1]:
        raise ValueError(f"b: expected (N, {a.shape[-1]}) to go with a, got shape {tuple(b.shape)}")
    for name, kind in zip(("a_scale", "b_scale"), scales, strict=True):
        if kind is not None and kind not in get_args(Scale):
            raise ValueError(f"{name}: unknown {kind!r}; accepted: None, {', '.join(get_args(Scale))}")
    for name, value, accepted in (
        ("rounding", rounding, get_args(Rounding)),
        ("scale_rounding", scale_rounding, get_args(ScaleRounding)),
    ):
        if value not in accepted:
            raise ValueError(f"{name}: unknown {value!r}; accepted: {', '.join(accepted)}")
