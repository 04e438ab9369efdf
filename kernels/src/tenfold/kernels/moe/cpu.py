"""Permutation and grouped products on the CPU: one product of the matrix library per group, into its place.

Half-precision products are computed in float32: bfloat16 matrix products are far slower on most CPUs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .reference import require_bounds


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
    for e, group in _groups(offsets, out):
        _multiply(x[group], weight[e], out=out[group])
    return out


def grouped_matmul_backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x, by row and expert the product with the transposed weight, and of weight, Xᵀ dY of each group."""
    dx = x.new_empty(x.shape) if needed[0] else None
    dweight = torch.empty_like(weight) if needed[1] else None  # with weight's own layout
    for e, group in _groups(offsets, dx, empty=dweight):
        if needed[0]:
            _multiply(grad[group], weight[e].t(), out=dx[group])
        if needed[1]:
            _multiply(x[group].t(), grad[group], out=dweight[e])
    return dx, dweight


def _groups(offsets: Tensor, rows: Tensor | None, empty: Tensor | None = None) -> Iterator[tuple[int, slice]]:
    """The groups that have rows. Zeros go to `rows` after the last, and to `empty` for those that have none."""
    bounds = offsets.tolist()
    if rows is not None:
        require_bounds(bounds, len(rows))
        rows[bounds[-1] :] = 0
    for e, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if a < b:
            yield e, slice(a, b)
        elif empty is not None:
            empty[e] = 0


def _multiply(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    if a.dtype in (torch.float32, torch.float64):
        # By columns, the product is that of the transposes.
        if out.stride(0) == 1 and out.stride(1) != 1:
            a, b, out = b.t(), a.t(), out.t()
        torch.mm(a, b, out=out)
    else:
        out.copy_(a.float() @ b.float())


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
