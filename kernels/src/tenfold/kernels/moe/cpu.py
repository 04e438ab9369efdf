"""Permutation and grouped products on the CPU: one product of a matrix library per group.

Large float32 products go to oneDNN, which compiles a kernel for every shape that it meets and keeps a thousand: so
the number of rows is rounded up, to 8 numbers between a power of 2 and the next. Half-precision products are
computed in float32: bfloat16 matrix products are far slower on most CPUs.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import onednn
from .reference import require_bounds

LARGE = 1 << 18  # multiplications from which on oneDNN's constant cost per call does not count


def permute(x: Tensor, row: Tensor) -> Tensor:
    """`rows[row[t, j]] = x[t]`."""
    rows = x.new_empty(row.numel(), x.shape[1])
    for places in row.unbind(1):
        rows.index_copy_(0, places, x)
    return rows


def permute_backward(grad: Tensor, row: Tensor) -> Tensor:
    """`Σ_j grad[row[t, j]]`."""
    first, *others = row.unbind(1)
    total = grad.index_select(0, first)
    if others:
        total = _wide(total)
        for places in others:
            total += grad.index_select(0, places)
    return total.to(grad.dtype)


def unpermute(y: Tensor, weight: Tensor, row: Tensor, dropped: Tensor) -> Tensor:
    """`Σ_j weight[t, j] · y[row[t, j]]`."""
    total = None
    for places, share, without in zip(row.unbind(1), weight.unbind(1), dropped.unbind(1), strict=True):
        rows = _wide(y.index_select(0, places)).mul_(share[:, None]).masked_fill_(without[:, None], 0.0)
        total = rows if total is None else total.add_(rows)
    return total.to(y.dtype)


def unpermute_backward(grad: Tensor, y: Tensor, weight: Tensor, row: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y and weight."""
    dy, dweight = y.new_empty(y.shape), weight.new_empty(weight.shape)
    wide = _wide(grad)
    for j, (places, without) in enumerate(zip(row.unbind(1), dropped.unbind(1), strict=True)):
        rows = (wide * weight[:, j, None]).masked_fill_(without[:, None], 0.0)
        dy.index_copy_(0, places, rows.to(dy.dtype))
        dweight[:, j] = (wide * y.index_select(0, places)).sum(1).masked_fill_(without, 0.0)
    return dy, dweight


def grouped_matmul(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """A product per group, zeros after the last."""
    out = x.new_empty(len(x), weight.shape[2])
    for e, a, b in _groups(offsets, out):
        _multiply_rows(x, weight[e], out, a, b)
    return out


def grouped_matmul_backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x, rows of dY times the transposed weight, and of weight, Xᵀ dY of each group."""
    grad = grad.contiguous()
    dx = x.new_empty(x.shape) if needed[0] else None
    dweight = torch.empty_like(weight) if needed[1] else None  # in weight's own layout
    for e, a, b in _groups(offsets, dx, dweight):
        if needed[0]:
            _multiply_rows(grad, weight[e].t(), dx, a, b)
        if needed[1]:
            _multiply_over_rows(x, grad, dweight[e], a, b)
    return dx, dweight


def _groups(offsets: Tensor, rows: Tensor | None, weights: Tensor | None = None) -> Iterator[tuple[int, int, int]]:
    """Each group that has rows: its number, first row and end. What belongs to no row becomes 0."""
    bounds = offsets.tolist()
    if rows is not None:
        require_bounds(bounds, len(rows))
        rows[bounds[-1] :] = 0
    for e, (a, b) in enumerate(pairwise(bounds)):
        if a < b:
            yield e, a, b
        elif weights is not None:
            weights[e] = 0


def _multiply_rows(x: Tensor, weight: Tensor, out: Tensor, a: int, b: int) -> None:
    """`out[a:b] = x[a:b] @ weight`."""
    if not _suits_onednn(x, weight, b - a):
        _multiply(x[a:b], weight, out[a:b])
        return
    rows = min(_rounded(b - a), len(x))
    first = min(a, len(x) - rows)  # the rows of a neighbour that come along are thrown away
    out[a:b] = onednn.linear(_wide(x[first : first + rows]), _wide(weight).t())[a - first : b - first]


def _multiply_over_rows(x: Tensor, grad: Tensor, out: Tensor, a: int, b: int) -> None:
    """`out = x[a:b]ᵀ @ grad[a:b]`."""
    if out.stride(0) == 1 and out.stride(1) != 1:  # by columns: the transposed product, by rows
        x, grad, out = grad, x, out.t()
    x, grad = x[a:b], grad[a:b]
    if not _suits_onednn(x, out, b - a):
        _multiply(x.t(), grad, out)
        return
    filling = (0, 0, 0, _rounded(b - a) - (b - a))
    out.copy_(onednn.linear(F.pad(_wide(x), filling).t(), F.pad(_wide(grad), filling).t()))


def _rounded(rows: int) -> int:
    step = max(8, (1 << rows.bit_length()) // 16)
    return -(-rows // step) * step


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype in (torch.float32, torch.float64):
        torch.mm(a, b, out=out)
    else:
        out.copy_(a.float() @ b.float())


def _suits_onednn(x: Tensor, weight: Tensor, rows: int) -> bool:
    """Half-precision products are computed in float32."""
    return rows * weight.numel() >= LARGE and onednn.available(torch.promote_types(x.dtype, torch.float32))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
