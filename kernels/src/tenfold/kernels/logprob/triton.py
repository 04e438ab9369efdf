"""Per-token log-probabilities in Triton, for CUDA and ROCm.

Forward: a program takes a block of rows and a share of the vocabulary, multiplies tile by tile, and keeps per
row

    m' = max(m, max_v z_v),  s = s·e^(m - m') + Σ_v e^(z_v - m')

and the target's score if it comes by. A second, tiny kernel merges the shares in their order: nothing is
atomic, and how many there are depends on the sizes alone, so results repeat bit for bit.

Backward: for a block of rows at a time the matrix library computes the scores into a buffer of bounded size,
one kernel turns them into dz = g·(onehot - softmax), and the library multiplies that into dH = dz W and dW =
dzᵀ H. That is 3 matrix products at library speed and two passes over a buffer; fused kernels would need 4 (dH
and dW are summed in different orders, so each would compute the scores again), and at a lower speed. The
kernel normalizes each row by its own sum, not by the forward's: under TF32 the two products round
differently, and the softmax would not sum to 1.

What it must cost: 2·N·V·D floating-point operations forward and 6·N·V·D backward, against one read of
`weight` per block of rows. Matrix products bound it, at 8·N·V·D/989e12 s for bfloat16 on an H100.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import architecture, interpreting

PROGRAMS = 1024  # of the forward, about: a few for each multiprocessor of the largest chips
BUFFER = 1 << 26  # scores that the backward holds, or 128 rows of them: 256 MB, and 128 MB in half precision
PIECE = 1 << 24  # elements of the weight gradient that are summed at a time in half precision: 64 MB
LANES = 2048  # scores of a row that a program of the backward handles at once


def forward(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int) -> Tensor:
    """The log-probabilities `(N,)`, float32."""
    hidden, weight, target = _readable(hidden), _readable(weight), target.contiguous()
    (N, D), V = hidden.shape, len(weight)
    logp = torch.empty(N, dtype=torch.float32, device=hidden.device)
    if N == 0:
        return logp
    rows, columns, depth, warps, stages = tiles(hidden.dtype, architecture(hidden))
    blocks, parts = triton.cdiv(N, rows), triton.cdiv(V, columns)
    share = triton.cdiv(parts, triton.cdiv(PROGRAMS, blocks))  # tiles of the vocabulary for one program
    shares = triton.cdiv(parts, share)
    peak, total = torch.empty(2, shares, N, dtype=torch.float32, device=hidden.device)
    picked = torch.empty_like(logp)
    with torch.cuda.device_of(hidden):
        _forward_kernel[(blocks, shares)](
            *(hidden, weight, bias, target, peak, total, picked, N, V, ignore_index, share),
            BIAS=bias is not None,
            PRECISION=_precision(),
            D=D,
            BLOCK_M=rows,
            BLOCK_V=columns,
            BLOCK_K=depth,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )
        _merge_kernel[(triton.cdiv(N, 128),)](
            *(peak, total, picked, target, logp, N, V, ignore_index, shares),
            BLOCK=128,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return logp


def backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    needed: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, those that are `needed`."""
    dtype, grad, target = hidden.dtype, grad.contiguous(), target.contiguous()
    hidden, weight = _readable(hidden), _readable(weight)
    (N, _), V = hidden.shape, len(weight)
    size = max(1, min(N, max(128, BUFFER // V // 128 * 128)))
    padded = triton.cdiv(V, 16) * 16  # rows that start where wide loads can
    buffer = torch.empty(size, padded, dtype=torch.float32, device=hidden.device)
    dbuffer = buffer if hidden.dtype == torch.float32 else torch.empty_like(buffer, dtype=hidden.dtype)
    dhidden = torch.empty_like(hidden) if needed[0] else None
    dweight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
    dbias = torch.zeros(V, dtype=torch.float32, device=hidden.device) if needed[2] else None
    for first in range(0, N, size):
        block = slice(first, min(first + size, N))
        ignored = (target[block] == ignore_index)[:, None]
        rows = hidden[block].masked_fill(ignored, 0.0)  # else its NaN reaches the gradient of weight as 0·NaN
        scores, dscores = (x[: len(rows), :V] for x in (buffer, dbuffer))
        _multiply(rows, weight.t(), out=scores)
        with torch.cuda.device_of(hidden):
            _backward_kernel[(len(rows),)](
                *(scores, dscores, bias, target[block], grad[block], V, padded, ignore_index),
                BIAS=bias is not None,
                BLOCK=LANES,
                num_warps=8,
                enable_fp_fusion=True,
            )
        if needed[0]:
            torch.mm(dscores, weight, out=dhidden[block])
            dhidden[block].masked_fill_(ignored, 0.0)  # 0·inf, where a weight is infinite
        if needed[1]:
            _accumulate(dweight, dscores.t(), rows)
        if needed[2]:
            dbias += dscores.sum(0, dtype=torch.float32)
    return tuple(None if g is None else g.to(dtype) for g in (dhidden, dweight, dbias))


def tiles(dtype: torch.dtype, architecture: str) -> tuple[int, int, int, int, int]:
    """Rows, columns and depth of a forward tile, warps of a program, and stages of its load pipeline."""
    if architecture == "interpreter":
        return (64, 64, 64, 4, 1)
    if dtype != torch.float32:
        return (128, 128, 64, 8, 2 if architecture.startswith("gfx") else 3)
    if architecture.startswith(("sm_8", "sm_12")):  # TF32x3 from registers: a larger tile spills them
        return (128, 64, 32, 8, 3)
    return (128, 128, 32, 8, 2 if architecture.startswith("gfx") else 3)


def _precision() -> str:
    """How float32 is multiplied: torch's own switch. AMD's matrix units take float32 as it is."""
    if torch.version.hip:
        return "ieee"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]


def _readable(x: Tensor) -> Tensor:
    """`x` row by row; in float32 for the interpreter, which multiplies the bits of bfloat16 as integers."""
    return (x.float() if interpreting() else x).contiguous()


def _multiply(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """`a @ b`, rounded to the dtype of `out` and no earlier."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`; in half precision by pieces, as torch cannot add into float32 by itself."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    size = max(128, PIECE // total.shape[1])
    product = torch.empty_like(total[:size])
    for first in range(0, len(total), size):
        piece = total[first : first + size]
        _multiply(a[first : first + size], b, out=product[: len(piece)])
        piece += product[: len(piece)]


@triton.jit
def _forward_kernel(
    hidden_ptr, weight_ptr, bias_ptr, target_ptr, peak_ptr, total_ptr, picked_ptr,
    N, V, ignore_index, share,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs read the same share of the vocabulary, so that it stays in the cache.
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    target = tl.load(target_ptr + rows, mask=rows < N, other=ignore_index)
    if tl.max((target != ignore_index).to(tl.int32), 0) == 0:
        return
    begin = tl.program_id(1) * share * BLOCK_V
    end = tl.minimum(begin + share * BLOCK_V, V)

    # Rows and columns past the last read the last again: no mask is needed, and nothing is out of bounds.
    hidden_ptrs = hidden_ptr + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * D
    peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    picked = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(begin, end, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        weight_ptrs = weight_ptr + tl.minimum(columns, V - 1).to(tl.int64)[:, None] * D
        scores = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        for k in range(0, D, BLOCK_K):
            depth = k + tl.arange(0, BLOCK_K)[None, :]
            if D % BLOCK_K == 0:
                h = tl.load(hidden_ptrs + depth)
                w = tl.load(weight_ptrs + depth)
            else:
                h = tl.load(hidden_ptrs + depth, mask=depth < D, other=0.0)
                w = tl.load(weight_ptrs + depth, mask=depth < D, other=0.0)
            scores = tl.dot(h, tl.trans(w), scores, input_precision=PRECISION)
        if BIAS:
            scores += tl.load(bias_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
        picked += tl.sum(tl.where(columns[None, :] == target[:, None], scores, 0.0), 1)
        scores = tl.where((columns < V)[None, :], scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shift = _finite_shift(new_peak)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(scores - shift[:, None]), 1)
        peak = new_peak

    place = tl.program_id(1) * N + rows
    tl.store(peak_ptr + place, peak, mask=rows < N)
    tl.store(total_ptr + place, total, mask=rows < N)
    tl.store(picked_ptr + rows, picked, mask=(rows < N) & (target >= begin) & (target < end))


@triton.jit
def _merge_kernel(
    peak_ptr, total_ptr, picked_ptr, target_ptr, logp_ptr,
    N, V, ignore_index, shares,
    BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(target_ptr + rows, mask=rows < N, other=ignore_index)
    kept = target != ignore_index  # of a block of ignored rows, the forward wrote nothing
    peak = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(shares):
        other_peak = tl.load(peak_ptr + i * N + rows, mask=kept, other=0.0)
        other_total = tl.load(total_ptr + i * N + rows, mask=kept, other=1.0)
        new_peak = tl.maximum(peak, other_peak)
        shift = _finite_shift(new_peak)
        total = total * tl.exp(peak - shift) + other_total * tl.exp(other_peak - shift)
        peak = new_peak
    # NaN if it is no token's: the host does not wait to look, and a failed device assertion ends the process.
    known = (target >= 0) & (target < V)
    picked = tl.load(picked_ptr + rows, mask=kept & known, other=float("nan"))
    # In this order, for a likely token is the difference of two large numbers exact, or nearly so.
    logp = (picked - peak) - tl.log(total)
    tl.store(logp_ptr + rows, tl.where(kept, logp, 0.0), mask=rows < N)


@triton.jit
def _backward_kernel(
    scores_ptr, dscores_ptr, bias_ptr, target_ptr, grad_ptr,
    V, stride, ignore_index,
    BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of dz = g·(onehot - softmax), where the scores were or, in another dtype, beside them."""
    row = tl.program_id(0)
    target = tl.load(target_ptr + row)
    scores_ptr += row.to(tl.int64) * stride
    dscores_ptr += row.to(tl.int64) * stride
    lanes = tl.arange(0, BLOCK)
    if target == ignore_index:
        for start in range(0, V, BLOCK):
            columns = start + lanes
            zeros = tl.zeros((BLOCK,), dscores_ptr.dtype.element_ty)
            tl.store(dscores_ptr + columns, zeros, mask=columns < stride)
        return

    # A maximum and a sum for each lane, merged once at the end.
    peaks = tl.full((BLOCK,), -float("inf"), tl.float32)
    totals = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        scores = _biased(scores_ptr, bias_ptr, start + lanes, V, stride, BIAS)
        new_peaks = tl.maximum(peaks, scores)
        shift = _finite_shift(new_peaks)
        totals = totals * tl.exp(peaks - shift) + tl.exp(scores - shift)
        peaks = new_peaks
    peak = tl.max(peaks, 0)
    total = tl.sum(totals * tl.exp(peaks - peak), 0)

    grad = tl.load(grad_ptr + row)
    grad = tl.where((target >= 0) & (target < V), grad, float("nan"))
    share = grad / total
    for start in range(0, V, BLOCK):
        columns = start + lanes
        scores = _biased(scores_ptr, bias_ptr, columns, V, stride, BIAS)
        dscores = tl.where(columns == target, grad, 0.0) - share * tl.exp(scores - peak)
        tl.store(dscores_ptr + columns, dscores.to(dscores_ptr.dtype.element_ty), mask=columns < stride)


@triton.jit
def _biased(scores_ptr, bias_ptr, columns, V, stride, BIAS: tl.constexpr):
    """Scores of a row, -inf past the last."""
    # The mask is of the padded row, whose length 16 divides, unlike V: only so are loads and stores wide.
    scores = tl.load(scores_ptr + columns, mask=columns < stride, other=0.0)
    if BIAS:
        scores += tl.load(bias_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)
    return tl.where(columns < V, scores, -float("inf"))


@triton.jit
def _finite_shift(peak):
    """What to subtract before the exponential: the maximum, or 0 while that is -inf (-inf - -inf is NaN)."""
    return tl.where(peak == -float("inf"), 0.0, peak)
