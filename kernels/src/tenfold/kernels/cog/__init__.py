"""Cog attention: attention whose weights carry the sign of their query-key product (arXiv 2411.07176)."""

import math

import torch
from torch import Tensor

from ..backend import autocast, choose_backend, refuse_tangents, require_tensors
from . import cpu, reference

__all__ = ["cog_attention"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_SCALE = 1e38  # times log₂e, still a float32


def cog_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention with negative weights: magnitude from a softmax over |s|, sign from s itself.

    For query row i and attended keys j (Eq. 3 of arXiv 2411.07176):

        s_ij = scale · q_i · k_j
        w_ij = sign(s_ij) · exp(|s_ij|) / Σ_k exp(|s_ik|)
        o_i  = Σ_j w_ij v_j

    so Σ_j |w_ij| = 1, and one head can add some tokens and subtract others. sign(0) is 0, as in torch: a
    score of exactly 0 has weight 0 but keeps its share of the denominator. The weight jumps where s crosses
    0; the gradient is the almost-everywhere derivative, 0 at s = 0. Forward and backward never hold a Tq×Tk
    matrix.

    Args:
        query: `(B, Hq, Tq, D)`, float32, bfloat16, float16, or float64 (not on the triton backend).
        key: `(B, Hkv, Tk, D)`, `Hq % Hkv == 0`: query head h reads key head `h // (Hq // Hkv)`.
        value: `(B, Hkv, Tk, D)`.
        causal: row i attends keys `j ≤ i + Tk - Tq`: the last query is aligned with the last key, so that
            decoding and chunked prefill against a cache need no mask.
        mask: bool, broadcastable to `(B, Hq, Tq, Tk)`, True = attend; both it and `causal` must allow a key.
            Whatever an unattended key or value holds, NaN included, changes nothing.
        scale: of the scores; `1/√D` by default.

    Returns:
        `(B, Hq, Tq, D)` in the query's dtype. A row that attends no key is zero, with zero gradient.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or scale, before anything is computed.
        NotImplementedError: forward-mode differentiation; there is no second derivative either.

    Example:
        >>> q, k, v = torch.randn(3, 1, 8, 128, 64).unbind()
        >>> cog_attention(q, k, v, causal=True).shape
        torch.Size([1, 8, 128, 64])

    """
    require_tensors(query=query, key=key, value=value)
    if mask is not None:
        require_tensors(mask=mask)
    query, key, value = autocast(query, key, value)
    _check(query, key, value, mask)
    if not isinstance(causal, bool):
        raise TypeError(f"causal: expected a bool, got {causal!r}")
    if isinstance(scale, (Tensor, str)):  # a tensor's gradient would be lost
        raise TypeError(f"scale: expected a number, got {type(scale).__name__}")
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    if not -math.inf < scale < math.inf:  # torch.compile cannot trace math.isfinite
        raise ValueError(f"scale: must be finite, got {scale}")
    if query.dtype != torch.float64 and abs(scale) > _MAX_SCALE:
        raise ValueError(f"scale: must be at most {_MAX_SCALE:.0e} in magnitude for {query.dtype}, got {scale}")
    if mask is not None:
        mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])

    backend = choose_backend(query)
    if backend == "reference":  # plain torch, with torch's own autograd
        return reference.cog_attention(query, key, value, causal=causal, mask=mask, scale=scale)
    if backend == "triton" and query.dtype == torch.float64:
        raise TypeError("query: float64 is not supported by the triton backend; use_backend('reference') takes it")
    refuse_tangents(query=query, key=key, value=value)
    return _forward(query, key, value, mask, causal, scale, backend)[0]


@torch.library.custom_op("tenfold::cog_attention", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """The output, and what the same backend's backward needs of each row: triton's log Σ_j exp(|s_ij|)."""
    if backend == "cpu":
        return cpu.forward(query, key, value, mask, causal, scale), query.new_empty(0, dtype=torch.float32)
    from . import triton

    return triton.forward(query, key, value, mask, causal, scale)


@_forward.register_fake
def _(query, key, value, mask, causal, scale, backend):
    rows = query.shape[:-1] if backend == "triton" else (0,)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return out, query.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("tenfold::cog_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "cpu":
        return cpu.backward(grad, query, key, value, out, mask, causal, scale)
    from . import triton

    return triton.backward(grad, query, key, value, out, lse, mask, causal, scale)


@_backward.register_fake
def _(grad, query, key, value, mask, out, lse, causal, scale, backend):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))


def _save(ctx, inputs, output):
    query, key, value, mask, ctx.causal, ctx.scale, ctx.backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, mask, out, lse)


def _differentiate(ctx, grad_out, grad_lse):
    query, key, value, mask, out, lse = ctx.saved_tensors
    grads = _backward(grad_out, query, key, value, mask, out, lse, ctx.causal, ctx.scale, ctx.backend)
    return *grads, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise ValueError(f"{name}: expected (batch, heads, time, dim), got shape {tuple(x.shape)}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name}: dtype {x.dtype} is not supported; accepted: {', '.join(map(str, _DTYPES))}")
        if x.dtype != query.dtype:
            raise TypeError(f"{name}: dtype {x.dtype} differs from query's {query.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name}: is on {x.device}, query on {query.device}")
    B, Hq, Tq, D = query.shape
    Hkv, Tk = key.shape[1:3]
    if key.shape != (B, Hkv, Tk, D):
        raise ValueError(f"key: expected ({B}, heads, time, {D}) to go with query, got shape {tuple(key.shape)}")
    if value.shape != key.shape:
        raise ValueError(f"value: expected key's shape {tuple(key.shape)}, got {tuple(value.shape)}")
    if D == 0:
        raise ValueError("query: the last dimension is 0")
    if Hkv == 0 or Hq % Hkv:
        raise ValueError(f"key: {Hkv} heads do not divide query's {Hq}")
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool tensor, True = attend, got {mask.dtype}")
    if mask.device != query.device:
        raise ValueError(f"mask: is on {mask.device}, query on {query.device}")
    if mask.dim() > 4 or any(m not in (1, n) for m, n in zip(mask.shape[::-1], (Tk, Tq, Hq, B), strict=False)):
        raise ValueError(f"mask: shape {tuple(mask.shape)} does not broadcast to {(B, Hq, Tq, Tk)}")
