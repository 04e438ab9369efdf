"""Permutation and grouped products in Triton, for CUDA and ROCm.

A grouped product is one launch, a program per tile of the result. How many tiles a group has only the device
knows, so the grid has as many as there could be, ⌊P/BLOCK_M⌋ + E + 1 rows of them; each program finds its
group in the running sum of the groups' tiles, and those left over end at once. The rows after the last group
are one more group, which is filled with zeros. Consecutive programs take the columns of one tile of rows: x is
read from memory once, and an expert's weight stays in the L2 cache for the tiles of its group. The weight's
gradient has a program per tile of an expert's matrix, which passes over the group's rows: every sum has one
owner, nothing is atomic, and results repeat bit for bit.

A feed-forward is two such launches. A program of the first has a tile of the gate and the same columns of up, and
writes their activation: of a row I numbers, in place of writing 2·I, reading them and writing I.

The floor: 2·P·K·N floating-point operations for each of the three products, at 989e12/s for bfloat16 on an
H100, against one read of x and of each weight; below about 300 rows per expert, reading the weights at
3.35e12 bytes/s takes longer than multiplying. Permuting moves 2·P·H elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import architecture, interpreting


def permute(x: Tensor, row: Tensor) -> Tensor:
    """`rows[row[t, j]] = x[t]`."""
    x, row = x.contiguous(), row.contiguous()
    out = torch.empty(row.numel(), x.shape[1], dtype=x.dtype, device=x.device)
    if out.numel():
        with torch.cuda.device_of(x):
            _permute_kernel[(len(x),)](x, row, out, K=row.shape[1], H=x.shape[1], **_vector(x))
    return out


def permute_backward(grad: Tensor, row: Tensor) -> Tensor:
    """`Σ_j grad[row[t, j]]`."""
    return _gather(grad, None, row, None)


def unpermute(y: Tensor, weight: Tensor, row: Tensor, dropped: Tensor) -> Tensor:
    """`Σ_j weight[t, j] · y[row[t, j]]`."""
    return _gather(y, weight, row, dropped)


def unpermute_backward(grad: Tensor, y: Tensor, weight: Tensor, row: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y and weight."""
    grad, y, row, dropped = (x.contiguous() for x in (_float(grad), _float(y), row, dropped))
    weight = weight.contiguous()
    dy, dweight = torch.empty_like(y), torch.empty_like(weight)
    if row.numel():
        with torch.cuda.device_of(y):
            _unpermute_backward_kernel[(row.numel(),)](
                *(grad, y, weight, row, dropped, dy, dweight), K=row.shape[1], H=y.shape[1], **_vector(y)
            )
    return dy.to(grad.dtype), dweight


def grouped_matmul(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """A product per group, zeros after the last."""
    return _multiply_groups(_float(x), _float(weight), offsets).to(x.dtype)


def grouped_matmul_backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight."""
    dx = dweight = None
    if needed[0]:
        dx = _multiply_groups(_float(grad), _float(weight).transpose(1, 2), offsets).to(x.dtype)
    if needed[1]:
        dweight = _over_rows(_float(x), _float(grad), offsets, weight)
    return dx, dweight


def grouped_swiglu(
    x: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """A feed-forward per group, zeros after the last; and, to `keep`, what its activation was applied to."""
    wide = _float(x)
    hidden = torch.empty(len(x), gate_up.shape[1], dtype=wide.dtype, device=x.device) if keep else None
    act = _multiply_groups(wide, _float(gate_up).transpose(1, 2), offsets, swiglu=True, hidden=hidden)
    out = _multiply_groups(act, _float(down).transpose(1, 2), offsets)
    return out.to(x.dtype), None if hidden is None else hidden.to(x.dtype)


def grouped_swiglu_backward(
    grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor, hidden: Tensor, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, gate_up and down."""
    dact, hidden = _multiply_groups(_float(grad), _float(down), offsets), _float(hidden).contiguous()
    act, dhidden = dact, torch.empty_like(hidden)  # the one is written where the other was read
    if dact.numel():
        with torch.cuda.device_of(x):
            _swiglu_backward_kernel[(len(x),)](hidden, dact, act, dhidden, INNER=dact.shape[1], **_vector(dact))
    dx = _multiply_groups(dhidden, _float(gate_up), offsets).to(x.dtype) if needed[0] else None
    dgate_up = _over_rows(dhidden, _float(x), offsets, gate_up) if needed[1] else None
    ddown = _over_rows(_float(grad), act, offsets, down) if needed[2] else None
    return dx, dgate_up, ddown


def tiles(dtype: torch.dtype, architecture: str, rows: int) -> tuple[int, int, int, int, int]:
    """Rows, columns and depth of a tile, warps of a program, and stages of its pipeline, for groups of so many rows."""
    if architecture == "interpreter":
        return (64, 64, 64, 4, 1)
    height = 128 if rows > 64 else 64 if rows > 16 else 16
    stages = 2 if architecture.startswith("gfx") else 3
    if dtype != torch.float32:
        return (height, 128, 64, 8 if height == 128 else 4, stages)
    # Without tensor cores, or with three TF32 products for one of float32, the operands come out of registers.
    small = architecture.startswith(("sm_8", "sm_12"))
    warps = 4 if height == 16 or (height == 64 and architecture.startswith("sm_10")) else 8
    return (height, 64 if small else 128, 32, warps, 2 if architecture.startswith("sm_12") else stages)


def _multiply_groups(
    x: Tensor, weight: Tensor, offsets: Tensor, *, swiglu: bool = False, hidden: Tensor | None = None
) -> Tensor:
    """`x[r] @ weight[e]`; with `swiglu`, silu(gate)·up of its two halves, which go to `hidden` if there is one."""
    x, offsets = x.contiguous(), offsets.contiguous()
    if 1 not in weight.stride()[1:]:
        weight = weight.contiguous()
    (P, K), (E, _, N) = x.shape, weight.shape
    rows, columns, depth, warps, stages = tiles(x.dtype, architecture(x), triton.cdiv(P, E))
    if swiglu:
        N, columns = N // 2, columns // 2  # of each half
    out = torch.empty(P, N, dtype=x.dtype, device=x.device)
    blocks = (P // rows + E + 1) * triton.cdiv(N, columns)
    if P:
        with torch.cuda.device_of(x):
            _matmul_kernel[(blocks,)](
                *(x, weight, offsets, out, hidden, P, *weight.stride()),
                SWIGLU=swiglu,
                KEEP=hidden is not None,
                PRECISION=_precision(),
                E=E,
                K=K,
                N=N,
                BLOCK_E=triton.next_power_of_2(E + 1),
                BLOCK_M=rows,
                BLOCK_N=columns,
                BLOCK_K=depth,
                num_warps=warps,
                num_stages=stages,
                enable_fp_fusion=True,
            )
    return out


def _over_rows(x: Tensor, grad: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """`xᵀ grad` over the rows of each group: the gradient of `weight`, in its dtype and layout."""
    result = torch.empty_like(weight, dtype=x.dtype)
    out, x, grad, offsets = result, x.contiguous(), grad.contiguous(), offsets.contiguous()
    if out.stride(1) == 1 and out.stride(2) != 1:  # by columns: the transposed product, by rows
        x, grad, out = grad, x, out.transpose(1, 2)
    E, K, N = out.shape
    rows, columns, depth, warps, stages = tiles(x.dtype, architecture(x), 128)
    with torch.cuda.device_of(x):
        _dweight_kernel[(triton.cdiv(K, rows) * triton.cdiv(N, columns), E)](
            *(x, grad, offsets, out, len(x), *out.stride()),
            PRECISION=_precision(),
            K=K,
            N=N,
            BLOCK_K=rows,
            BLOCK_N=columns,
            BLOCK_M=depth,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )
    return result.to(weight.dtype)


def _gather(y: Tensor, weight: Tensor | None, row: Tensor, dropped: Tensor | None) -> Tensor:
    """`Σ_j weight[t, j] · y[row[t, j]]`; without weights the plain sum."""
    wide = _float(y).contiguous()
    out = torch.empty(len(row), y.shape[1], dtype=wide.dtype, device=y.device)
    if weight is not None:
        weight, dropped = weight.contiguous(), dropped.contiguous()
    if out.numel():
        with torch.cuda.device_of(y):
            _gather_kernel[(len(row),)](
                *(wide, weight, row.contiguous(), dropped, out),
                WEIGHTED=weight is not None,
                K=row.shape[1],
                H=y.shape[1],
                **_vector(wide),
            )
    return out.to(y.dtype)


def _vector(x: Tensor) -> dict[str, int | bool]:
    """How a program passes over a row: 16 bytes a thread at a time."""
    block = min(1024 if x.dtype == torch.float32 else 2048, max(128, triton.next_power_of_2(x.shape[1])))
    return {"BLOCK": block, "num_warps": 4 if block > 512 else 2, "enable_fp_fusion": True}


def _precision() -> str:
    """How float32 is multiplied: torch's own switch. AMD's matrix units take float32 as it is."""
    if torch.version.hip:
        return "ieee"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]


def _float(x: Tensor) -> Tensor:
    """`x`, in float32 for the interpreter, which takes bfloat16 for integers and cuts off where it should round."""
    return x.float() if interpreting() else x


@triton.jit
def _permute_kernel(x_ptr, row_ptr, out_ptr, K: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, H, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + token * H + lanes, mask=lanes < H)
        for j in range(K):
            row = tl.load(row_ptr + token * K + j)
            tl.store(out_ptr + row * H + lanes, x, mask=lanes < H)


@triton.jit
def _gather_kernel(
    y_ptr, weight_ptr, row_ptr, dropped_ptr, out_ptr,
    WEIGHTED: tl.constexpr, K: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, H, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for j in range(K):
            row = tl.load(row_ptr + token * K + j)
            stop = H
            if WEIGHTED:  # a limit and not one mask & another, of which Triton 3.9's interpreter makes integers
                stop = tl.where(tl.load(dropped_ptr + token * K + j), 0, H)
            inside = lanes < stop
            y = tl.load(y_ptr + row * H + lanes, mask=inside, other=0.0).to(tl.float32)
            if WEIGHTED:
                y *= tl.load(weight_ptr + token * K + j)
            total += y
        tl.store(out_ptr + token * H + lanes, total.to(out_ptr.dtype.element_ty), mask=lanes < H)


@triton.jit
def _unpermute_backward_kernel(
    grad_ptr, y_ptr, weight_ptr, row_ptr, dropped_ptr, dy_ptr, dweight_ptr,
    K: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(row_ptr + entry)
    kept = tl.load(dropped_ptr + entry) == 0
    weight = tl.load(weight_ptr + entry)
    product = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, H, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        inside = lanes < tl.where(kept, H, 0)
        grad = tl.load(grad_ptr + entry // K * H + lanes, mask=inside, other=0.0).to(tl.float32)
        product += grad * tl.load(y_ptr + row * H + lanes, mask=inside, other=0.0).to(tl.float32)
        dy = tl.where(kept, weight * grad, 0.0)
        tl.store(dy_ptr + row * H + lanes, dy.to(dy_ptr.dtype.element_ty), mask=lanes < H)
    tl.store(dweight_ptr + entry, tl.sum(product, 0))


@triton.jit
def _matmul_kernel(
    x_ptr, weight_ptr, offsets_ptr, out_ptr, hidden_ptr,
    P, stride_e, stride_k, stride_n,
    SWIGLU: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // blocks
    groups = tl.arange(0, BLOCK_E)
    # Of group E, the rows after the last group, only the beginning is in the offsets.
    begin = _bound(offsets_ptr, groups, groups <= E, P)
    end = _bound(offsets_ptr, groups + 1, groups < E, P)
    parts = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M)
    group = tl.sum((tl.cumsum(parts, 0) <= tile).to(tl.int32), 0)
    if group > E:
        return
    earlier = tl.sum(tl.where(groups < group, parts, 0), 0)
    first = tl.sum(tl.where(groups == group, begin, 0), 0) + (tile - earlier) * BLOCK_M
    last = tl.sum(tl.where(groups == group, end, 0), 0) - 1
    rows = first + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if SWIGLU:  # acc is the gate's
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if group < E:
        # Rows past the last read the last again: no mask is needed.
        x_ptrs = x_ptr + tl.minimum(rows, last).to(tl.int64)[:, None] * K
        weight_ptrs = weight_ptr + group.to(tl.int64) * stride_e + columns[None, :] * stride_n
        for k in range(0, K, BLOCK_K):
            depth = k + tl.arange(0, BLOCK_K)
            if K % BLOCK_K == 0:
                x = tl.load(x_ptrs + depth[None, :])
            else:
                x = tl.load(x_ptrs + depth[None, :], mask=depth[None, :] < K, other=0.0)
            inside = (depth < K)[:, None] & (columns < N)[None, :]
            whole: tl.constexpr = K % BLOCK_K == 0 and N % BLOCK_N == 0
            w_ptrs = weight_ptrs + depth[:, None] * stride_k
            acc = tl.dot(x, _weights(w_ptrs, inside, whole), acc, input_precision=PRECISION)
            if SWIGLU:
                up = tl.dot(x, _weights(w_ptrs + N * stride_n, inside, whole), up, input_precision=PRECISION)
    inside = (rows <= last)[:, None] & (columns < N)[None, :]
    places = rows.to(tl.int64)[:, None] * N + columns[None, :]
    if KEEP:
        hidden_ptrs = hidden_ptr + places + rows.to(tl.int64)[:, None] * N
        tl.store(hidden_ptrs, acc.to(hidden_ptr.dtype.element_ty), mask=inside)
        tl.store(hidden_ptrs + N, up.to(hidden_ptr.dtype.element_ty), mask=inside)
    if SWIGLU:
        acc *= tl.sigmoid(acc) * up
    tl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weights(pointers, inside, WHOLE: tl.constexpr):
    """A tile of a weight; of whole tiles no mask is needed."""
    return tl.load(pointers) if WHOLE else tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _swiglu_backward_kernel(hidden_ptr, dact_ptr, act_ptr, dhidden_ptr, INNER: tl.constexpr, BLOCK: tl.constexpr):
    """silu(gate)·up again, and the gradients of gate and up, of one row."""
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, INNER, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        inside = lanes < INNER
        gate = tl.load(hidden_ptr + row * 2 * INNER + lanes, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(hidden_ptr + row * 2 * INNER + INNER + lanes, mask=inside, other=0.0).to(tl.float32)
        dact = tl.load(dact_ptr + row * INNER + lanes, mask=inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        silu = gate * share
        dgate, dup = dact * up * share * (1 + gate - silu), dact * silu
        tl.store(act_ptr + row * INNER + lanes, (silu * up).to(act_ptr.dtype.element_ty), mask=inside)
        element = dhidden_ptr.dtype.element_ty
        tl.store(dhidden_ptr + row * 2 * INNER + lanes, dgate.to(element), mask=inside)
        tl.store(dhidden_ptr + row * 2 * INNER + INNER + lanes, dup.to(element), mask=inside)


@triton.jit
def _dweight_kernel(
    x_ptr, grad_ptr, offsets_ptr, out_ptr,
    P, stride_e, stride_k, stride_n,
    PRECISION: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(1)
    depth = tl.program_id(0) // blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, end = _bound(offsets_ptr, expert, True, P), _bound(offsets_ptr, expert + 1, True, P)
    acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        wide = rows.to(tl.int64)
        x = tl.load(
            x_ptr + wide[None, :] * K + depth[:, None], mask=(rows < end)[None, :] & (depth < K)[:, None], other=0.0
        )
        grad = tl.load(
            grad_ptr + wide[:, None] * N + columns[None, :],
            mask=(rows < end)[:, None] & (columns < N)[None, :],
            other=0.0,
        )
        acc = tl.dot(x, grad, acc, input_precision=PRECISION)
    pointers = out_ptr + expert.to(tl.int64) * stride_e + depth[:, None] * stride_k + columns[None, :] * stride_n
    tl.store(pointers, acc.to(out_ptr.dtype.element_ty), mask=(depth < K)[:, None] & (columns < N)[None, :])


@triton.jit
def _bound(offsets_ptr, groups, known, P):
    """Offsets within 0…P; P where not known."""
    return tl.minimum(tl.maximum(tl.load(offsets_ptr + groups, mask=known, other=P), 0), P).to(tl.int32)
