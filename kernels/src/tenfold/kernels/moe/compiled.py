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
    scratch = x.new_empty(CHUNK * (x.shape[1] + down.shape[2]))
    inputs = x, None, None, gate_up, down, offsets.long()
    _call("grouped_swiglu", inputs, down, x.shape[1], (out, hidden, scratch))
    return out, hidden


def grouped_swiglu_backward(
    grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor, hidden: Tensor, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, gate_up and down."""
    end = _end(offsets, len(x))
    grads = [
        torch.empty_like(t) if need else None for t, need in zip((x.contiguous(), gate_up, down), needed, strict=True)
    ]
    if grads[0] is not None:
        grads[0][end:] = 0
    scratch = x.new_empty(CHUNK * 4 * down.shape[2])
    _call(
        "grouped_swiglu_backward", (grad, x, gate_up, down, offsets.long(), hidden), down, x.shape[1], (*grads, scratch)
    )
    return tuple(grads)


def expert_swiglu(
    x: Tensor, gate_up: Tensor, down: Tensor, weight: Tensor, row: Tensor, dropped: Tensor, offsets: Tensor
) -> Tensor:
    """`Σ_j weight[t, j] · FFN(x[t])`, the feed-forward of the group that has row[t, j], over what is not dropped."""
    _end(offsets, row.numel())
    entry = entries(row)
    target = (entry // row.shape[1]).masked_fill_(dropped.flatten()[entry], -1)
    out = x.new_zeros(len(x), down.shape[1])
    scratch = x.new_empty(CHUNK * (x.shape[1] + down.shape[2]))
    inputs = x, target, weight.flatten()[entry].float(), gate_up, down, offsets.long()
    _call("grouped_swiglu", inputs, down, x.shape[1], (out, None, scratch))
    return out


def _end(offsets: Tensor, rows: int) -> int:
    bounds = offsets.tolist()
    require_bounds(bounds, rows)
    return bounds[-1]


def _call(
    name: str, inputs: tuple[Tensor | None, ...], down: Tensor, K: int, outputs: tuple[Tensor | None, ...]
) -> None:
    """A function of the source: its tensors, E, K, I and N, what it writes to, and the threads."""
    E, N, inner = down.shape
    inputs = [None if t is None else t.contiguous() for t in inputs]  # kept until the call is over
    function = getattr(native.load(SOURCE), name)
    function(
        *(_pointer(t) for t in inputs),
        *(ctypes.c_int64(size) for size in (E, K, inner, N)),
        *(_pointer(t) for t in outputs),
        ctypes.c_int(torch.get_num_threads()),
    )


def _pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())
