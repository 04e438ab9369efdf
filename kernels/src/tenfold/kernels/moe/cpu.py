"""Permutation and grouped products on the CPU: one product of a matrix library per group.

Large float32 products go to oneDNN, which compiles a kernel for every shape that it meets and keeps a thousand: so
the number of rows is rounded up, to a multiple of 16 and at most 8 numbers between a power of 2 and the next.
Half-precision products are computed in float32: bfloat16 matrix products are far slower on most CPUs.

A whole feed-forward goes through one group after the other, so that what lies between its products stays in the
cache: where it can be, by our own program, `compiled`; else by the libraries, and transposed, W xᵀ: oneDNN rearranges
its second operand before it multiplies, and a few dozen rows are rearranged sooner than a weight.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import onednn
from . import compiled
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
        rows = _wide(y.index_select(0, places)).mul_(share[:, None])
        if without.any():
            rows.masked_fill_(without[:, None], 0.0)
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
    for e, a, b in _groups(offsets, rows=[out]):
        out[a:b] = _rows(x, a, b, weight[e])
    return out


def grouped_matmul_backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x, rows of dY times the transposed weight, and of weight, Xᵀ dY of each group."""
    grad = grad.contiguous()
    dx = x.new_empty(x.shape) if needed[0] else None
    dweight = torch.empty_like(weight) if needed[1] else None  # in weight's own layout
    for e, a, b in _groups(offsets, rows=[dx], weights=[dweight]):
        if needed[0]:
            dx[a:b] = _rows(grad, a, b, weight[e].t())
        if needed[1]:
            _over_rows(x[a:b], grad[a:b], dweight[e])
    return dx, dweight


@torch.autocast("cpu", enabled=False)  # the op has cast its inputs; what lies between stays in float32
def grouped_swiglu(
    x: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """A feed-forward per group, zeros after the last; and, to `keep`, what its activation was applied to."""
    if compiled.suits(x, gate_up, down):
        return compiled.grouped_swiglu(x, gate_up, down, offsets, keep)
    out = x.new_empty(len(x), down.shape[1])
    hidden = x.new_empty(len(x), gate_up.shape[1]) if keep else None
    for e, a, b in _groups(offsets, rows=[out, hidden]):
        window, group = _window(len(x), a, b)
        multiply = onednn.linear if _suits_onednn(x, down[e], b - a) else F.linear
        both = multiply(_wide(gate_up[e]), _wide(x[window]))
        if keep:
            hidden[a:b] = both.t()[group]
        gate, up = both.chunk(2)
        out[a:b] = multiply(_wide(down[e]), F.silu(gate, inplace=True).mul_(up).t()).t()[group]
    return out, hidden


@torch.autocast("cpu", enabled=False)  # the op has cast its inputs; what lies between stays in float32
def grouped_swiglu_backward(
    grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor, hidden: Tensor, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, gate_up and down."""
    if compiled.suits(x, gate_up, down):
        return compiled.grouped_swiglu_backward(grad, x, gate_up, down, offsets, hidden, needed)
    grad = grad.contiguous()
    dx = x.new_empty(x.shape) if needed[0] else None
    dgate_up = torch.empty_like(gate_up) if needed[1] else None
    ddown = torch.empty_like(down) if needed[2] else None
    for e, a, b in _groups(offsets, rows=[dx], weights=[dgate_up, ddown]):
        act, dhidden = swiglu_backward(_rows(grad, a, b, down[e]), hidden[a:b])
        if needed[0]:
            dx[a:b] = _rows(dhidden, 0, b - a, gate_up[e])
        if needed[1]:
            _over_rows(dhidden, x[a:b], dgate_up[e])
        if needed[2]:
            _over_rows(grad[a:b], act, ddown[e])
    return dx, dgate_up, ddown


def swiglu_backward(dact: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate)·up, for the weight's gradient, and the gradient of [gate, up], computed in dact's dtype."""
    gate, up = hidden.to(dact.dtype).chunk(2, -1)
    share = gate.sigmoid()
    silu = gate * share
    dgate = dact * up * share * (1 + gate - silu)
    return silu * up, torch.cat([dgate, dact * silu], -1)


def _groups(
    offsets: Tensor, *, rows: Sequence[Tensor | None], weights: Sequence[Tensor | None] = ()
) -> Iterator[tuple[int, int, int]]:
    """Each group that has rows: its number, first row and end. What belongs to no row becomes 0."""
    bounds = offsets.tolist()
    for x in rows:
        if x is not None:
            require_bounds(bounds, len(x))
            x[bounds[-1] :] = 0
    for e, (a, b) in enumerate(pairwise(bounds)):
        if a < b:
            yield e, a, b
            continue
        for weight in weights:
            if weight is not None:
                weight[e] = 0


def _rows(x: Tensor, a: int, b: int, weight: Tensor) -> Tensor:
    """`x[a:b] @ weight`, in float32 at least."""
    if not _suits_onednn(x, weight, b - a):
        return _wide(x[a:b]) @ _wide(weight)
    window, group = _window(len(x), a, b)
    return onednn.linear(_wide(x[window]), _wide(weight).t())[group]


def _over_rows(x: Tensor, grad: Tensor, out: Tensor) -> None:
    """`out = xᵀ @ grad`."""
    if out.stride(0) == 1 and out.stride(1) != 1:  # by columns: the transposed product, by rows
        x, grad, out = grad, x, out.t()
    if not _suits_onednn(x, out, len(x)):
        out.copy_(_wide(x).t() @ _wide(grad))
        return
    filling = (0, 0, 0, _rounded(len(x)) - len(x))
    out.copy_(onednn.linear(F.pad(_wide(x), filling).t(), F.pad(_wide(grad), filling).t()))


def _window(length: int, a: int, b: int) -> tuple[slice, slice]:
    """A rounded number of rows that hold the rows a…b-1, where there are so many, and these within it.

    What comes of the neighbours' rows is thrown away.
    """
    rows = min(_rounded(b - a), length)
    first = min(a, length - rows)
    return slice(first, first + rows), slice(a - first, b - first)


def _rounded(rows: int) -> int:
    step = max(16, (1 << rows.bit_length()) // 16)
    return -(-rows // step) * step


def _suits_onednn(x: Tensor, weight: Tensor, rows: int) -> bool:
    return rows * weight.numel() >= LARGE and onednn.available(torch.promote_types(x.dtype, torch.float32))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
