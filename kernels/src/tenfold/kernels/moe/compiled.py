"""The feed-forwards by swiglu.c, on processors for which it is written."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from .. import native
from .reference import entries, require_bounds

SOURCE = Path(__file__).with_name("swiglu.c")
TILE, CHUNK = 16, 96  # as there


def suits(x: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """Whether the functions below take these."""
    weights = gate_up, down
    return (
        all(t.dtype == torch.float32 for t in (x, *weights))
        and all(weight.is_contiguous() for weight in weights)
        and all(size % TILE == 0 for size in (gate_up.shape[2], *down.shape[1:]))
        and native.load(SOURCE) is not None
    )


def grouped_swiglu(
    x: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """A feed-forward per group, zeros after the last; and, to `keep`, what its activation was applied to."""
    end = _end(offsets, len(x))
    out = x.new_empty(len(x), down.shape[1])
    hidden = x.new_empty(len(x), gate_up.shape[1]) if keep else None
    for rows in (out, hidden):
        if rows is not None:
            rows[end:] = 0
    _run(x, None, None, gate_up, down, offsets, out, hidden)
    return out, hidden


def expert_swiglu(
    x: Tensor, gate_up: Tensor, down: Tensor, weight: Tensor, row: Tensor, dropped: Tensor, offsets: Tensor
) -> Tensor:
    """`Σ_j weight[t, j] · FFN(x[t])`, the feed-forward of the group that has row[t, j], over what is not dropped."""
    _end(offsets, row.numel())
    entry = entries(row)
    target = (entry // row.shape[1]).masked_fill_(dropped.flatten()[entry], -1)
    out = x.new_zeros(len(x), down.shape[1])
    _run(x, target, weight.flatten()[entry].float(), gate_up, down, offsets, out, None)
    return out


def _end(offsets: Tensor, rows: int) -> int:
    bounds = offsets.tolist()
    require_bounds(bounds, rows)
    return bounds[-1]


def _run(
    x: Tensor,
    target: Tensor | None,
    share: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    offsets: Tensor,
    out: Tensor,
    hidden: Tensor | None,
) -> None:
    E, N, inner = down.shape
    x, offsets, scratch = x.contiguous(), offsets.long().contiguous(), x.new_empty(CHUNK * (x.shape[1] + inner))
    inputs = (_pointer(t) for t in (x, target, share, gate_up, down, offsets))
    sizes = (ctypes.c_int64(size) for size in (E, x.shape[1], inner, N))
    results = (_pointer(t) for t in (out, hidden, scratch))
    native.load(SOURCE).grouped_swiglu(*inputs, *sizes, *results, ctypes.c_int(torch.get_num_threads()))


def _pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())
