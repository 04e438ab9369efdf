"""Cog attention in Triton, for CUDA and ROCm: FlashAttention-2's plan; the scores never leave the chip.

Forward, one program per block of query rows; with S = scale·Q·Kᵀ, per row over the tiles of keys:

    m' = max(m, max_j |S_j|),  l' = l·e^(m - m') + Σ_j e^(|S_j| - m'),
    O' = O·e^(m - m') + Σ_j sign(S_j) e^(|S_j| - m') V_j

and at the end O/l and L = m + log l. Since |S| ≥ 0, m can start at 0: no -inf - -inf comes up, in any row.

Backward, the tiles recomputed from L: with P = e^(|S| - L), σ = sign(S), A = σP and D_i = Σ_d dO_id O_id,

    dV = Aᵀ dO,  dS = A·(σ·dO Vᵀ - D), 0 where S = 0,  dQ = scale·dS K,  dK = scale·dSᵀ Q

in two kernels, so that every sum has one owner, nothing is atomic and results repeat bit for bit: dQ, a
program per block of query rows, which also leaves D behind; then dK and dV, a program per block of keys, over
all query heads of its group. Exponentials are base 2 throughout, L included: scale·log₂e is multiplied into S
once. L is float32, so a score S comes back with an error of 2⁻²⁴·|S| in the exponent.

The floor: with N = B·Hq·Tq·Tk scores, half as many under `causal`, 4·N·D floating-point operations forward
and 14·N·D backward (seven products: S and dO Vᵀ are computed twice), for 2·D elements read and 2·D written
per query row and head: thousands of operations per byte at lengths in the thousands, so matrix products bound
it, at 4·N·D/989e12 s forward for bfloat16 on an H100. Beyond softmax a score costs about four cheap
instructions, none a product or an exponential: |S| - m is not fused with the scale, S's sign bit moves over,
and a score of 0 is found and zeroed.

Tiles that `causal` hides are not visited, tiles in which nothing is hidden are not masked; only the others
compare positions, read the mask, and keep NaN or infinity in what a row does not attend away from it (0·NaN
is NaN).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import architecture, interpreting

LOG2E = 1.4426950408889634
MAX_DIM = 256
# Further apart, the rows of one tile would be out of reach of the 32-bit offsets inside it.
MAX_STRIDE = 1 << 23

# Per chip and head dimension up to 64, 128 and 256, for the kernels forward, dq and dkdv: query rows, keys,
# warps, stages. Each is the largest tried of the usual FlashAttention tiles for which neither Triton 3.8 nor 3.9
# spills a register, under `causal` and under a mask, and which fits the shared memory (tests/kernels/test_aot.py):
# 163 KiB on sm_80, 227 on sm_90 and sm_100, 64 on gfx942, 99 on sm_86, which stands for every other chip. 8
# warps: on Hopper two warpgroups share the accumulators, which at head dimension 128 would fill the registers
# of one. No autotuning: it needs a GPU at import.
_HALF_TILES = {
    ("sm_80", 64): ((128, 64, 8, 3), (128, 64, 8, 3), (32, 128, 8, 2)),
    ("sm_80", 128): ((64, 64, 4, 3), (64, 64, 8, 2), (32, 64, 8, 2)),
    ("sm_80", 256): ((32, 32, 4, 1), (64, 64, 8, 1), (32, 32, 8, 2)),
    ("sm_86", 64): ((128, 64, 8, 3), (128, 64, 8, 3), (32, 128, 8, 2)),
    ("sm_86", 128): ((64, 32, 4, 3), (64, 64, 8, 2), (32, 64, 8, 2)),
    ("sm_86", 256): ((32, 32, 4, 1), (64, 32, 8, 1), (32, 32, 8, 2)),
    ("sm_90", 64): ((128, 128, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3)),
    ("sm_90", 128): ((128, 32, 8, 3), (128, 32, 8, 3), (32, 128, 8, 2)),
    ("sm_90", 256): ((64, 32, 8, 3), (64, 16, 8, 2), (32, 32, 8, 2)),
    ("sm_100", 64): ((128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3)),
    ("sm_100", 128): ((128, 64, 8, 3), (128, 64, 8, 2), (32, 128, 8, 2)),
    ("sm_100", 256): ((128, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2)),
    ("gfx942", 64): ((128, 64, 4, 2), (128, 64, 8, 2), (32, 64, 4, 2)),
    ("gfx942", 128): ((128, 64, 8, 1), (64, 32, 4, 2), (32, 64, 4, 2)),
    ("gfx942", 256): ((64, 32, 8, 1), (32, 32, 4, 1), (16, 64, 8, 1)),
}
# Full float32 products run on NVIDIA's ordinary units, out of registers; "tf32" is every NVIDIA chip. Three
# TF32 products for one of float32 are not offered: from head dimension 128 on they spill at any tile.
_FLOAT32_TILES = {
    ("tf32", 64): ((64, 32, 4, 2), (64, 32, 8, 2), (32, 64, 8, 1)),
    ("tf32", 128): ((64, 32, 8, 2), (32, 32, 4, 1), (32, 32, 8, 2)),
    ("tf32", 256): ((32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    ("sm_90", 64): ((32, 32, 4, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
    ("sm_90", 128): ((64, 32, 8, 2), (32, 32, 8, 2), (16, 32, 4, 1)),
    ("sm_90", 256): ((32, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2)),
    ("sm_86", 64): ((32, 32, 4, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
    ("sm_86", 128): ((32, 32, 8, 1), (32, 32, 8, 2), (16, 32, 8, 1)),
    ("sm_86", 256): ((16, 16, 8, 1), (16, 16, 8, 2), (16, 16, 8, 1)),
    ("gfx942", 64): ((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 4, 2)),
    ("gfx942", 128): ((64, 32, 8, 2), (32, 32, 4, 2), (16, 32, 4, 1)),
    ("gfx942", 256): ((32, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
}


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The output `(B, Hq, Tq, D)`, and L in base 2, `(B, Hq, Tq)` float32: +inf where a row attends no key.

    Raises:
        ValueError: D is over 256.
    """
    if query.shape[-1] > MAX_DIM:
        raise ValueError(f"query: the triton backend takes a last dimension up to {MAX_DIM}, got {query.shape[-1]}")
    q, k, v = (_readable(x) for x in (query, key, value))
    B, Hq, Tq, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    inputs = (*_strided(q), *_strided(k), *_strided(v), *_mask_arguments(mask))
    sizes = (Hq, Hq // k.shape[1], Tq, k.shape[2], scale * LOG2E)
    options = _options("forward", q, mask, causal)
    blocks = B * Hq * triton.cdiv(Tq, options["BLOCK_M"])
    if blocks:
        with torch.cuda.device_of(q):
            _forward_kernel[(blocks,)](*inputs, out, lse, *sizes, **options)
    return out.to(query.dtype), lse


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, from the output and L of `forward`."""
    q, k, v, do, out = (_readable(x) for x in (query, key, value, grad, out.contiguous()))
    B, Hq, Tq, _ = q.shape
    Hkv, Tk = k.shape[1:3]
    if mask is not None or (causal and Tq > Tk):
        empty = lse.isposinf().unsqueeze(-1)  # rows that attend nothing take no part, whatever they hold
        q, do = q.masked_fill(empty, 0.0), do.masked_fill(empty, 0.0)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    inputs = (*_strided(q), *_strided(k), *_strided(v), *_strided(do), *_mask_arguments(mask))
    sizes = (Hq, Hq // Hkv, Tq, Tk, scale * LOG2E, scale)
    with torch.cuda.device_of(q):
        options = _options("dq", q, mask, causal)
        if blocks := B * Hq * triton.cdiv(Tq, options["BLOCK_M"]):
            _dq_kernel[(blocks,)](*inputs, out, lse, delta, dq, *sizes, **options)
        options = _options("dkdv", q, mask, causal)
        if blocks := B * Hkv * triton.cdiv(Tk, options["BLOCK_N"]):
            _dkdv_kernel[(blocks,)](*inputs, lse, delta, dk, dv, *sizes, **options)
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


def tiles(kernel: str, dtype: torch.dtype, dim: int, architecture: str, precision: str) -> tuple[int, int, int, int]:
    """Query rows and keys of a tile, warps of a program, and stages of its pipeline of loads."""
    chip = "gfx942" if architecture.startswith("gfx") else "sm_100" if architecture == "sm_103" else architecture
    if architecture == "interpreter":  # which takes its time by the operation, however large
        chip, dtype = "sm_90", torch.bfloat16
    if (chip, 64) not in _HALF_TILES:
        chip = "sm_86"
    table = _HALF_TILES
    if dtype == torch.float32:
        table = _FLOAT32_TILES
        chip = "tf32" if precision == "tf32" else chip if (chip, 64) in table else "sm_86"
    width = 64 if dim <= 64 else 128 if dim <= 128 else 256
    return table[chip, width][("forward", "dq", "dkdv").index(kernel)]


def _readable(x: Tensor) -> Tensor:
    """`x` with a vector's elements side by side, which wide loads need; copied only where they are not."""
    if x.dtype == torch.bfloat16 and interpreting():
        x = x.float()  # the interpreter multiplies bfloat16's bits as integers, without a word
    return x if x.stride(3) == 1 and x.stride(2) <= MAX_STRIDE else x.contiguous()


def _strided(x: Tensor) -> tuple[Tensor, int, int, int]:
    return x, *x.stride()[:3]


def _mask_arguments(mask: Tensor | None) -> tuple[Tensor | None, int, int, int, int]:
    return (None, 0, 0, 0, 0) if mask is None else (mask, *mask.stride())


def _options(kernel: str, q: Tensor, mask: Tensor | None, causal: bool) -> dict[str, object]:
    """What is compiled in, and how."""
    rows, keys, warps, stages = tiles(kernel, q.dtype, q.shape[-1], architecture(q), _precision())
    return {
        "CAUSAL": causal,
        "MASK": mask is not None,
        "PRECISION": _precision(),
        "D": q.shape[-1],
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[-1])),
        "BLOCK_M": rows,
        "BLOCK_N": keys,
        "num_warps": warps,
        "num_stages": stages,
        "enable_fp_fusion": True,  # Triton 3.10 is to fuse multiply-adds only where told to
    }


def _precision() -> str:
    """How float32 is multiplied, by torch's own switch. AMD's matrix units take it as it is."""
    return "ieee" if torch.version.hip or torch.get_float32_matmul_precision() == "highest" else "tf32"


@triton.jit
def _forward_kernel(
    q_ptr, stride_qb, stride_qh, stride_qt,
    k_ptr, stride_kb, stride_kh, stride_kt,
    v_ptr, stride_vb, stride_vh, stride_vt,
    mask_ptr, stride_mb, stride_mh, stride_mq, stride_mk,
    out_ptr, lse_ptr,
    Hq, group, Tq, Tk, scale_log2,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, h, hkv, first = _query_block(Hq, group, Tq, BLOCK_M, CAUSAL)
    q_ptr += b * stride_qb + h * stride_qh + first.to(tl.int64) * stride_qt
    k_ptr += b * stride_kb + hkv * stride_kh
    v_ptr += b * stride_vb + hkv * stride_vh
    if MASK:
        mask_ptr += b * stride_mb + h * stride_mh
    row = (b * Hq + h) * Tq  # the pair's first
    rows = first + tl.arange(0, BLOCK_M)
    q = _load(q_ptr, stride_qt, Tq - first, True, BLOCK_M, D, BLOCK_D)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.zeros((BLOCK_M,), tl.float32)
    clear, end = _visible_keys(first, Tq, Tk, CAUSAL, MASK, BLOCK_M, BLOCK_N)
    if not MASK:
        acc, total, peak = _forward_tiles(
            acc, total, peak, q, rows, k_ptr, stride_kt, v_ptr, stride_vt, mask_ptr, stride_mq, stride_mk,
            0, clear, Tq, Tk, scale_log2, False, CAUSAL, MASK, PRECISION, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    acc, total, peak = _forward_tiles(
        acc, total, peak, q, rows, k_ptr, stride_kt, v_ptr, stride_vt, mask_ptr, stride_mq, stride_mk,
        clear, end, Tq, Tk, scale_log2, True, CAUSAL, MASK, PRECISION, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip

    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    _store(out_ptr + (row + first) * D, acc / total[:, None], Tq - first, BLOCK_M, D, BLOCK_D)
    lse = tl.where(nothing, float("inf"), peak + tl.log2(total))
    tl.store(lse_ptr + row + rows, lse, mask=rows < Tq)


@triton.jit
def _forward_tiles(
    acc, total, peak, q, rows, k_ptr, stride_kt, v_ptr, stride_vt, mask_ptr, stride_mq, stride_mk,
    begin, end, Tq, Tk, scale_log2,
    HIDING: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The tiles of keys `begin…end`; HIDING: in some of them, a row does not attend every key."""
    k_ptr += tl.cast(begin, tl.int64) * stride_kt
    v_ptr += tl.cast(begin, tl.int64) * stride_vt
    for start in range(begin, end, BLOCK_N):
        k = _load(k_ptr, stride_kt, Tk - start, HIDING, BLOCK_N, D, BLOCK_D)
        v = _load(v_ptr, stride_vt, Tk - start, HIDING, BLOCK_N, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        if HIDING:  # who attends a value that is not finite gets its NaN from the weight, and no one from the value
            finite = _finite(v)
            scores = tl.where(finite[None, :], scores, float("nan"))
            v = tl.where(finite[:, None], v, 0.0)
        magnitude = tl.abs(scores)
        if HIDING:
            keys = start + tl.arange(0, BLOCK_N)
            attended = _attended(rows[:, None], keys[None, :], mask_ptr, stride_mq, stride_mk, Tq, Tk, CAUSAL, MASK)
            magnitude = tl.where(attended, magnitude, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(magnitude, 1))
        shrink = tl.exp2(peak - new_peak)
        weights = tl.exp2(magnitude - new_peak[:, None])
        total = total * shrink + tl.sum(weights, 1)
        peak = new_peak
        weights = _times_sign(tl.where(scores == 0.0, 0.0, weights), scores)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        k_ptr += BLOCK_N * stride_kt
        v_ptr += BLOCK_N * stride_vt
    return acc, total, peak


@triton.jit
def _dq_kernel(
    q_ptr, stride_qb, stride_qh, stride_qt,
    k_ptr, stride_kb, stride_kh, stride_kt,
    v_ptr, stride_vb, stride_vh, stride_vt,
    do_ptr, stride_db, stride_dh, stride_dt,
    mask_ptr, stride_mb, stride_mh, stride_mq, stride_mk,
    out_ptr, lse_ptr, delta_ptr, dq_ptr,
    Hq, group, Tq, Tk, scale_log2, scale,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, h, hkv, first = _query_block(Hq, group, Tq, BLOCK_M, CAUSAL)
    q_ptr += b * stride_qb + h * stride_qh + first.to(tl.int64) * stride_qt
    do_ptr += b * stride_db + h * stride_dh + first.to(tl.int64) * stride_dt
    k_ptr += b * stride_kb + hkv * stride_kh
    v_ptr += b * stride_vb + hkv * stride_vh
    if MASK:
        mask_ptr += b * stride_mb + h * stride_mh
    row = (b * Hq + h) * Tq
    rows = first + tl.arange(0, BLOCK_M)
    inside = rows < Tq

    do = _load(do_ptr, stride_dt, Tq - first, True, BLOCK_M, D, BLOCK_D)
    out = _load(out_ptr + (row + first) * D, D, Tq - first, True, BLOCK_M, D, BLOCK_D)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + row + rows, delta, mask=inside)
    q = _load(q_ptr, stride_qt, Tq - first, True, BLOCK_M, D, BLOCK_D)
    lse = tl.load(lse_ptr + row + rows, mask=inside, other=float("inf"))

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    clear, end = _visible_keys(first, Tq, Tk, CAUSAL, MASK, BLOCK_M, BLOCK_N)
    if not MASK:
        dq = _dq_tiles(
            dq, q, do, lse, delta, rows, k_ptr, stride_kt, v_ptr, stride_vt, mask_ptr, stride_mq, stride_mk,
            0, clear, Tq, Tk, scale_log2, False, CAUSAL, MASK, PRECISION, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    dq = _dq_tiles(
        dq, q, do, lse, delta, rows, k_ptr, stride_kt, v_ptr, stride_vt, mask_ptr, stride_mq, stride_mk,
        clear, end, Tq, Tk, scale_log2, True, CAUSAL, MASK, PRECISION, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    _store(dq_ptr + (row + first) * D, dq * scale, Tq - first, BLOCK_M, D, BLOCK_D)


@triton.jit
def _dq_tiles(
    dq, q, do, lse, delta, rows, k_ptr, stride_kt, v_ptr, stride_vt, mask_ptr, stride_mq, stride_mk,
    begin, end, Tq, Tk, scale_log2,
    HIDING: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    k_ptr += tl.cast(begin, tl.int64) * stride_kt
    v_ptr += tl.cast(begin, tl.int64) * stride_vt
    for start in range(begin, end, BLOCK_N):
        k = _load(k_ptr, stride_kt, Tk - start, HIDING, BLOCK_N, D, BLOCK_D)
        v = _load(v_ptr, stride_vt, Tk - start, HIDING, BLOCK_N, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        dweights = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        exponent = tl.abs(scores) - lse[:, None]
        if HIDING:
            keys = start + tl.arange(0, BLOCK_N)
            attended = _attended(rows[:, None], keys[None, :], mask_ptr, stride_mq, stride_mk, Tq, Tk, CAUSAL, MASK)
            exponent = tl.where(attended, exponent, -float("inf"))
        weights = _weights(exponent, scores)
        dscores = weights * (_times_sign(dweights, weights) - delta[:, None])
        if HIDING:
            dscores = tl.where(weights == 0.0, 0.0, dscores)
            k = tl.where(_finite(k)[:, None], k, 0.0)  # where such a key is attended, dscores is NaN already
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
        k_ptr += BLOCK_N * stride_kt
        v_ptr += BLOCK_N * stride_vt
    return dq


@triton.jit
def _dkdv_kernel(
    q_ptr, stride_qb, stride_qh, stride_qt,
    k_ptr, stride_kb, stride_kh, stride_kt,
    v_ptr, stride_vb, stride_vh, stride_vt,
    do_ptr, stride_db, stride_dh, stride_dt,
    mask_ptr, stride_mb, stride_mh, stride_mq, stride_mk,
    lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    Hq, group, Tq, Tk, scale_log2, scale,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Tk, BLOCK_N)
    first = tl.program_id(0) % blocks * BLOCK_N  # under `causal`, the first keys have the most rows: start with them
    pair = tl.program_id(0) // blocks
    Hkv = Hq // group
    b, h = (pair // Hkv).to(tl.int64), (pair % Hkv).to(tl.int64)
    k_ptr += b * stride_kb + h * stride_kh + first.to(tl.int64) * stride_kt
    v_ptr += b * stride_vb + h * stride_vh + first.to(tl.int64) * stride_vt
    keys = first + tl.arange(0, BLOCK_N)
    k = _load(k_ptr, stride_kt, Tk - first, True, BLOCK_N, D, BLOCK_D)
    v = _load(v_ptr, stride_vt, Tk - first, True, BLOCK_N, D, BLOCK_D)

    # The first row that attends one of the keys, and the first block whose rows attend them all.
    begin, clear = 0, 0
    if CAUSAL:
        begin = tl.maximum(first - (Tk - Tq), 0) // BLOCK_M * BLOCK_M
        clear = tl.cdiv(tl.maximum(first + BLOCK_N - 1 - (Tk - Tq), 0), BLOCK_M) * BLOCK_M
        clear = tl.minimum(clear, Tq)
    if MASK:
        clear = Tq

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for head in range(group):
        hq = h * group + head
        qs = q_ptr + b * stride_qb + hq * stride_qh
        dos = do_ptr + b * stride_db + hq * stride_dh
        lses = lse_ptr + (b * Hq + hq) * Tq
        deltas = delta_ptr + (b * Hq + hq) * Tq
        masks = mask_ptr
        if MASK:
            masks = mask_ptr + b * stride_mb + hq * stride_mh
        if CAUSAL or MASK:
            dk, dv = _dkdv_tiles(
                dk, dv, k, v, keys, qs, stride_qt, dos, stride_dt, lses, deltas, masks, stride_mq, stride_mk,
                begin, clear, Tq, Tk, scale_log2, True, CAUSAL, MASK, PRECISION, D, BLOCK_D, BLOCK_M,
            )  # fmt: skip
        if not MASK:
            dk, dv = _dkdv_tiles(
                dk, dv, k, v, keys, qs, stride_qt, dos, stride_dt, lses, deltas, masks, stride_mq, stride_mk,
                clear, Tq, Tq, Tk, scale_log2, False, CAUSAL, MASK, PRECISION, D, BLOCK_D, BLOCK_M,
            )  # fmt: skip
    _store(dk_ptr + ((b * Hkv + h) * Tk + first) * D, dk * scale, Tk - first, BLOCK_N, D, BLOCK_D)
    _store(dv_ptr + ((b * Hkv + h) * Tk + first) * D, dv, Tk - first, BLOCK_N, D, BLOCK_D)


@triton.jit
def _dkdv_tiles(
    dk, dv, k, v, keys, q_ptr, stride_qt, do_ptr, stride_dt, lse_ptr, delta_ptr,
    mask_ptr, stride_mq, stride_mk, begin, end, Tq, Tk, scale_log2,
    HIDING: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The blocks of query rows `begin…end`. Tiles are transposed: weights come out as left factors."""
    q_ptr += tl.cast(begin, tl.int64) * stride_qt
    do_ptr += tl.cast(begin, tl.int64) * stride_dt
    for start in range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        # Rows after the last have L = +inf, so no weight; nor have keys after the last, whose scores are 0.
        q = _load(q_ptr, stride_qt, Tq - start, True, BLOCK_M, D, BLOCK_D)
        do = _load(do_ptr, stride_dt, Tq - start, True, BLOCK_M, D, BLOCK_D)
        lse = tl.load(lse_ptr + rows, mask=rows < Tq, other=float("inf"))
        delta = tl.load(delta_ptr + rows, mask=rows < Tq, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2
        exponent = tl.abs(scores) - lse[None, :]
        if HIDING:
            attended = _attended(rows[None, :], keys[:, None], mask_ptr, stride_mq, stride_mk, Tq, Tk, CAUSAL, MASK)
            exponent = tl.where(attended, exponent, -float("inf"))
        weights = _weights(exponent, scores)
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=PRECISION)
        dweights = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        dscores = weights * (_times_sign(dweights, weights) - delta[None, :])
        if HIDING:
            dscores = tl.where(weights == 0.0, 0.0, dscores)
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
        q_ptr += BLOCK_M * stride_qt
        do_ptr += BLOCK_M * stride_dt
    return dk, dv


@triton.jit
def _query_block(Hq, group, Tq, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr):
    """Which batch entry, query head and key head (in 64 bits) and first query row a program has."""
    blocks = tl.cdiv(Tq, BLOCK_M)
    block = tl.program_id(0) % blocks
    if CAUSAL:  # the last rows have the most keys: start with them
        block = blocks - 1 - block
    b, h = tl.program_id(0) // blocks // Hq, tl.program_id(0) // blocks % Hq
    return b.to(tl.int64), h.to(tl.int64), (h // group).to(tl.int64), block * BLOCK_M


@triton.jit
def _visible_keys(
    first, Tq, Tk, CAUSAL: tl.constexpr, MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Up to which key tiles hide nothing from a block of rows, and up to which it has something to see."""
    clear, end = Tk, Tk
    if CAUSAL:
        clear = tl.maximum(first + Tk - Tq + 1, 0)
        end = tl.maximum(tl.minimum(first + BLOCK_M, Tq) + Tk - Tq, 0)
    if MASK:
        clear = 0
    return clear // BLOCK_N * BLOCK_N, end


@triton.jit
def _attended(rows, keys, mask_ptr, stride_mq, stride_mk, Tq, Tk, CAUSAL: tl.constexpr, MASK: tl.constexpr):
    """Which rows attend which keys, right for the rows and keys that exist; the others hold zeros."""
    attended = keys <= rows + (Tk - Tq) if CAUSAL else tl.broadcast(keys < Tk, rows < Tq)[0]
    if MASK:
        pointers = mask_ptr + rows.to(tl.int64) * stride_mq + keys.to(tl.int64) * stride_mk
        # Not only where `attended`, which differs from byte to byte: the loads would not be wide.
        attended &= tl.load(pointers, mask=(rows < Tq) & (keys < Tk), other=0).to(tl.int1)
    return attended


@triton.jit
def _weights(exponent, scores):
    """A, from the exponents |S| - L: -inf where a key is hidden, which keeps inf·0 = NaN from coming up.

    They are at most 0 but for rounding, which near |S| = 1e8 is off by many powers of 2: hence the minimum.
    """
    softmax = tl.exp2(tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL))
    return _times_sign(tl.where(scores == 0.0, 0.0, softmax), scores)


@triton.jit
def _times_sign(x, signed):
    """-x where `signed` is negative, else x: one instruction on the sign bit."""
    bits = x.to(tl.int32, bitcast=True) ^ (signed.to(tl.int32, bitcast=True) & -0x80000000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _finite(x):
    """Which rows of a tile hold neither NaN nor infinity."""
    return tl.max((tl.abs(x.to(tl.float32)) < float("inf")).to(tl.int32) ^ 1, 1) == 0


@triton.jit
def _load(ptr, stride, rows_left, CHECK: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile of vectors from `ptr` on, with zeros beyond column D and, if CHECK, from row `rows_left` on."""
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
    pointers = ptr + rows * stride + columns
    inside = columns < D
    if CHECK:
        inside = inside & (rows < rows_left) if D < BLOCK_D else rows < rows_left
    if CHECK or D < BLOCK_D:
        return tl.load(pointers, mask=inside, other=0.0)
    return tl.load(pointers)


@triton.jit
def _store(ptr, tile, rows_left, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The tile's first `rows_left` vectors to a contiguous matrix."""
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
    tl.store(ptr + rows * D + columns, tile.to(ptr.dtype.element_ty), mask=(rows < rows_left) & (columns < D))
