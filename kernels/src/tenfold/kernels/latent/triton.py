"""Attention over latents in Triton, for CUDA and ROCm: the cache is read as it lies, the keys are split.

All heads share the latents, so a block of rows holds heads first, then queries: each tile of keys is unpacked
once, in registers, for some 16 to 64 rows, and feeds two tensor-core products. A decoding step has too few rows
to fill a chip, so the keys are split among programs; a second kernel merges their sums in order. How many
splits there are depends on the sizes alone and nothing is atomic: results repeat bit for bit. Per row of a
split, over its tiles, with S = scale·(q̃·c + q·k):

    m' = max(m, max_j S_j),  l' = l·2^(m - m') + Σ_j 2^(S_j - m'),  z' = z·2^(m - m') + Σ_j 2^(S_j - m') c_j

Vectors are handled in two halves, first and second columns: the two codes of a byte, and two accumulators, for
one of 512 columns would need a tile of shared memory and registers that no chip has.

An integer code z becomes a number without a conversion, of which a chip does few at a time: 2²³ + z + 8 has z + 8
in its last bits, so those are set by one logical instruction, and a subtraction leaves z. A minifloat's bits are
shifted into a float16, which is converted: exact for subnormal numbers, which a float32 made in this way might lose.

The floor of a step, from a cache in 4 bits: (Dc + Dr)/2 bytes and the scales a key, 298 at 512 + 64 with groups
of 128, against 2·H·(2·Dc + Dr) operations. At 16 heads that is 117 operations a byte, under an H100's ridge of
295: read time bounds it, 298·B·Tk/3.35e12 s. At 128 heads it is 935, and products do: 278,528·B·Tk/989e12 s. In
between unpacking counts: about four instructions a code, or 18 cycles of an SM a key, as long as the read takes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import architecture, interpreting
from .packing import PackedLatents

LOG2E = 1.4426950408889634
PROGRAMS = 128  # about: one for each multiprocessor of the largest chips, whose registers one program fills
MAX_STRIDE = 1 << 23  # further apart, a tile's vectors would be out of reach of its 32-bit offsets
MAX_DIM = 512

Latents = Tensor | PackedLatents


def forward(
    query_latent: Tensor,
    query_rope: Tensor | None,
    latent: Latents,
    rope: Latents | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """z, `(B, H, Tq, Dc)`.

    Raises:
        ValueError: Dc or Dr is over 512.
    """
    for name, query in (("query_latent", query_latent), ("query_rope", query_rope)):
        if query is not None and query.shape[-1] > MAX_DIM:
            raise ValueError(
                f"{name}: the triton backend takes a last dimension up to {MAX_DIM}, got {query.shape[-1]}"
            )
    B, H, Tq, Dc = query_latent.shape
    Tk = latent.shape[1]
    q = _readable(query_latent)
    if q.numel() == 0 or Tk == 0:
        return torch.zeros(q.shape, dtype=query_latent.dtype, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    r = None if query_rope is None else _readable(query_rope)
    M = H * Tq
    layouts = _layout(latent), None if rope is None else _layout(rope)
    rows, keys, warps, stages = tiles(q.dtype, M, architecture(q), layouts[0])
    blocks = B * triton.cdiv(M, rows)
    share = triton.cdiv(triton.cdiv(Tk, keys), triton.cdiv(PROGRAMS, blocks)) * keys  # keys of a split
    splits = triton.cdiv(Tk, share)
    sums = torch.empty(splits, B, M, Dc, dtype=torch.float32, device=q.device)
    peak, total = torch.empty(2, splits, B, M, dtype=torch.float32, device=q.device)
    hides = mask is not None or (causal and Tq > 1)
    with torch.cuda.device_of(q):
        _split_kernel[(blocks, splits)](
            *(q, *q.stride()[:3]),
            *((None, 0, 0, 0) if r is None else (r, *r.stride()[:3])),
            *_stored(latent),
            *((None, 0, 0, None, 0, 0) if rope is None else _stored(rope)),
            *((None, 0, 0, 0, 0) if mask is None else (mask, *mask.stride())),
            *(sums, peak, total, B, H, Tq, Tk, share, scale * LOG2E),
            CAUSAL=causal and Tq > 1,
            MASK=mask is not None,
            HIDES=hides,
            PRECISION=_precision(),
            LATENT=layouts[0],
            ROPE=layouts[1],
            BLOCK_M=rows,
            BLOCK_N=keys,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )
        _merge_kernel[(B * M, triton.cdiv(Dc, 128))](
            *(sums, peak, total, out, B, H, Tq, splits),
            D=Dc,
            BLOCK_S=32,
            BLOCK_D=128,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out.to(query_latent.dtype)


def tiles(dtype: torch.dtype, rows: int, architecture: str, latent: tuple) -> tuple[int, int, int, int]:
    """Query rows and keys of a tile, warps of a program, and stages of its pipeline of loads.

    The largest tried for which Triton 3.8 and 3.9 spill no register at 512 + 64 columns, in 4 and 8 bits, for latents
    of that layout (tests/kernels/test_latent_aot.py): offsets take registers of their own.
    """
    warps = 4 if architecture.startswith("gfx") else 8
    if architecture == "interpreter":  # which takes its time by the operation, however large
        return (16 if rows <= 16 else 64, 64, 4, 1)
    if dtype == torch.float32:
        return (16, 16, warps, 1)
    code = latent[-1]
    if code == "asymmetric":
        return (16, 16, warps, 2)
    if rows <= 16 or architecture not in ("sm_80", "sm_90", "gfx942"):
        return (16, 32, warps, 2)
    return (32, 16 if architecture == "sm_90" else 32, warps, 2)


def _precision() -> str:
    """How float32 is multiplied: torch's own switch. AMD's matrix units take float32 as it is.

    Three TF32 products for one of float32 are not offered: they spill registers.
    """
    if torch.version.hip or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def _readable(x: Tensor) -> Tensor:
    """`x` with a vector's elements side by side, which wide loads need; copied only where they are not."""
    if x.dtype == torch.bfloat16 and interpreting():
        x = x.float()  # the interpreter multiplies bfloat16's bits as integers, without a word
    return x if x.stride(-1) == 1 and x.stride(-2) <= MAX_STRIDE else x.contiguous()


def _stored(x: Latents) -> tuple[object, ...]:
    """Codes or vectors, their strides along batch and keys, scales and theirs."""
    if isinstance(x, Tensor):
        x = _readable(x)
        return x, *x.stride()[:2], None, 0, 0
    codes = _readable(x.codes)
    if x.scales is None:
        return codes, *codes.stride()[:2], None, 0, 0
    scales = _readable(x.scales)
    return codes, *codes.stride()[:2], scales, *scales.stride()[:2]


def _layout(x: Latents) -> tuple[int, int, int, int, int, str]:
    """Width, bits (0: not packed), group size (0: no scales), columns of a half's tile, groups of a half, and the code.

    The groups are 0 where groups and halves do not meet, or where a tile cannot be cut into them: slower.
    """
    width = x.shape[-1]
    half = (width + 1) // 2
    block = max(16, triton.next_power_of_2(half))
    if isinstance(x, Tensor):
        return width, 0, 0, block, 0, ""
    group = x.group_size
    if x.scales is None:
        group = groups = 0
    elif group >= width:
        groups = 1
    elif half == block and half % group == 0:
        groups = half // group
    else:
        groups = 0
    return width, x.bits, group, block, groups, x.code


@triton.jit
def _split_kernel(
    q_ptr, stride_qb, stride_qh, stride_qt,
    r_ptr, stride_rb, stride_rh, stride_rt,
    c_ptr, stride_cb, stride_ct, cs_ptr, stride_csb, stride_cst,
    k_ptr, stride_kb, stride_kt, ks_ptr, stride_ksb, stride_kst,
    mask_ptr, stride_mb, stride_mh, stride_mq, stride_mk,
    sums_ptr, peak_ptr, total_ptr,
    B, H, Tq, Tk, share, scale_log2,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, HIDES: tl.constexpr, PRECISION: tl.constexpr,
    LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """z·l, m and l of a block of rows of a batch entry, over one split of the keys."""
    M = H * Tq
    blocks = tl.cdiv(M, BLOCK_M)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    head, query = rows % H, rows // H
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, Tk)
    if CAUSAL:  # up to the last key of the block's last query
        end = tl.minimum(end, tl.minimum((first + BLOCK_M - 1) // H, Tq - 1) + Tk - Tq + 1)

    DC: tl.constexpr = LATENT[0]
    HALF: tl.constexpr = (DC + 1) // 2
    inside = rows < M
    q_ptr += b * stride_qb
    q_low, q_high = _queries(q_ptr, stride_qh, stride_qt, head, query, inside, DC, LATENT[3])
    if ROPE is not None:
        r_ptr += b * stride_rb
        r_low, r_high = _queries(r_ptr, stride_rh, stride_rt, head, query, inside, ROPE[0], ROPE[3])
    if MASK:
        mask_ptr += b * stride_mb

    peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    z_low = tl.zeros((BLOCK_M, LATENT[3]), tl.float32)
    z_high = tl.zeros((BLOCK_M, LATENT[3]), tl.float32)
    for start in range(begin, end, BLOCK_N):
        left = end - start
        c_low, c_high = _vectors(
            c_ptr, cs_ptr, b * stride_cb + tl.cast(start, tl.int64) * stride_ct, stride_ct,
            b * stride_csb + tl.cast(start, tl.int64) * stride_cst, stride_cst, left, LATENT, BLOCK_N, q_low.dtype,
        )  # fmt: skip
        scores = tl.dot(q_low, tl.trans(c_low), input_precision=PRECISION)
        scores = tl.dot(q_high, tl.trans(c_high), scores, input_precision=PRECISION)
        if ROPE is not None:
            k_low, k_high = _vectors(
                k_ptr, ks_ptr, b * stride_kb + tl.cast(start, tl.int64) * stride_kt, stride_kt,
                b * stride_ksb + tl.cast(start, tl.int64) * stride_kst, stride_kst, left, ROPE, BLOCK_N, q_low.dtype,
            )  # fmt: skip
            scores = tl.dot(r_low, tl.trans(k_low), scores, input_precision=PRECISION)
            scores = tl.dot(r_high, tl.trans(k_high), scores, input_precision=PRECISION)
        scores *= scale_log2

        keys = start + tl.arange(0, BLOCK_N)
        attended = (keys < end)[None, :] & inside[:, None]
        if HIDES:  # who attends a latent that is not finite gets its NaN from the weight, and no one from the latent
            finite = _finite(c_low) & _finite(c_high)
            scores = tl.where(finite[None, :], scores, float("nan"))
            c_low = tl.where(finite[:, None], c_low, 0.0)
            c_high = tl.where(finite[:, None], c_high, 0.0)
            if CAUSAL:
                attended &= keys[None, :] <= query[:, None] + (Tk - Tq)
            if MASK:
                pointers = mask_ptr + (head.to(tl.int64) * stride_mh + query.to(tl.int64) * stride_mq)[:, None]
                pointers += keys.to(tl.int64)[None, :] * stride_mk
                attended &= tl.load(pointers, mask=(keys < end)[None, :] & inside[:, None], other=0).to(tl.int1)
        scores = tl.where(attended, scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # -inf - -inf is NaN
        shrink = tl.exp2(peak - shift)
        weights = tl.exp2(scores - shift[:, None])
        total = total * shrink + tl.sum(weights, 1)  # a NaN may be lost in the maximum; here it is not
        peak = new_peak
        weights = weights.to(c_low.dtype)
        z_low = tl.dot(weights, c_low, z_low * shrink[:, None], input_precision=PRECISION)
        z_high = tl.dot(weights, c_high, z_high * shrink[:, None], input_precision=PRECISION)

    place = (tl.program_id(1).to(tl.int64) * B + b) * M + rows
    tl.store(peak_ptr + place, peak, mask=inside)
    tl.store(total_ptr + place, total, mask=inside)
    columns = tl.arange(0, LATENT[3])[None, :]
    pointers = sums_ptr + place[:, None] * DC + columns
    tl.store(pointers, z_low, mask=inside[:, None] & (columns < HALF))
    tl.store(pointers + HALF, z_high, mask=inside[:, None] & (columns < DC - HALF))


@triton.jit
def _merge_kernel(
    sums_ptr, peak_ptr, total_ptr, out_ptr,
    B, H, Tq, splits,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some columns of one row's z, from its splits, several at a time: one by one, the loads would wait in turn."""
    M = H * Tq
    b, row = tl.program_id(0) // M, tl.program_id(0) % M
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    peaks = tl.full((BLOCK_S,), -float("inf"), tl.float32)
    for start in range(0, splits, BLOCK_S):
        some = start + tl.arange(0, BLOCK_S)
        places = (some.to(tl.int64) * B + b) * M + row
        peaks = tl.maximum(peaks, tl.load(peak_ptr + places, mask=some < splits, other=-float("inf")))
    peak = tl.max(peaks, 0)
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    totals = tl.zeros((BLOCK_S,), tl.float32)
    z = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, splits, BLOCK_S):
        some = start + tl.arange(0, BLOCK_S)
        places = (some.to(tl.int64) * B + b) * M + row
        shares = tl.exp2(tl.load(peak_ptr + places, mask=some < splits, other=-float("inf")) - peak)
        totals += shares * tl.load(total_ptr + places, mask=some < splits, other=0.0)
        inside = (some < splits)[:, None] & (columns < D)[None, :]
        sums = tl.load(sums_ptr + places[:, None] * D + columns[None, :], mask=inside, other=0.0)
        z += tl.sum(shares[:, None] * sums, 0)
    total = tl.sum(totals, 0)
    z /= tl.where(total == 0.0, 1.0, total)
    head, query = row % H, row // H
    out_ptr += ((b.to(tl.int64) * H + head) * Tq + query) * D
    tl.store(out_ptr + columns, z.to(out_ptr.dtype.element_ty), mask=columns < D)


@triton.jit
def _queries(ptr, stride_h, stride_t, head, query, inside, D: tl.constexpr, BLOCK: tl.constexpr):
    """The two halves of the rows' vectors, zeros beyond them."""
    HALF: tl.constexpr = (D + 1) // 2
    columns = tl.arange(0, BLOCK)[None, :]
    pointers = ptr + (head.to(tl.int64) * stride_h + query.to(tl.int64) * stride_t)[:, None] + columns
    low = tl.load(pointers, mask=inside[:, None] & (columns < HALF), other=0.0)
    return low, tl.load(pointers + HALF, mask=inside[:, None] & (columns < D - HALF), other=0.0)


@triton.jit
def _vectors(
    ptr, scales_ptr, offset, stride, scales_offset, scales_stride, left,
    LAYOUT: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The two halves of a tile of vectors, zeros beyond them and from row `left` on."""
    D: tl.constexpr = LAYOUT[0]
    BITS: tl.constexpr = LAYOUT[1]
    GROUP: tl.constexpr = LAYOUT[2]
    BLOCK: tl.constexpr = LAYOUT[3]
    CODE: tl.constexpr = LAYOUT[5]
    HALF: tl.constexpr = (D + 1) // 2
    POWER: tl.constexpr = 16384.0 if BITS == 4 else 256.0  # between a minifloat's bias and float16's
    rows, columns = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK)[None, :]
    pointers = ptr + offset + rows * stride + columns
    in_low = (rows < left) & (columns < HALF)
    in_high = (rows < left) & (columns < D - HALF)
    if BITS == 4:
        codes = tl.load(pointers, mask=in_low, other=0)
        low, high = _numbers(codes, 4, LAYOUT), _numbers(codes, 0, LAYOUT)
    elif BITS == 8:
        low = _numbers(tl.load(pointers, mask=in_low, other=0), 0, LAYOUT)
        high = _numbers(tl.load(pointers + HALF, mask=in_high, other=0), 0, LAYOUT)
    else:
        low = tl.load(pointers, mask=in_low, other=0.0)
        high = tl.load(pointers + HALF, mask=in_high, other=0.0)
    if GROUP > 0:
        scales_ptr += scales_offset
        low = _scaled(low, scales_ptr, scales_stride, left, 0, POWER, LAYOUT, BLOCK_N)
        high = _scaled(high, scales_ptr, scales_stride, left, HALF, POWER, LAYOUT, BLOCK_N)
    elif CODE == "float":
        low *= POWER
        high *= POWER
    return low.to(DTYPE), high.to(DTYPE)


@triton.jit
def _numbers(codes, SHIFT: tl.constexpr, LAYOUT: tl.constexpr):
    """Codes in uint8 as float32, once shifted to the left by `SHIFT` to the top of their bytes."""
    BITS: tl.constexpr = LAYOUT[1]
    CODE: tl.constexpr = LAYOUT[5]
    if CODE == "float":  # numbers as packing has them: sign, exponent and mantissa at the float16's places
        half = (codes.to(tl.int16) << (8 + SHIFT)) >> (3 if BITS == 4 else 1)
        numbers = (half & (-0x7200 if BITS == 4 else -0x4080)).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        SIGN: tl.constexpr = 0 if CODE == "asymmetric" else 1 << (BITS - 1)
        codes = codes.to(tl.int32)
        if BITS == 4:
            codes = codes & 15 if SHIFT == 4 else codes >> 4
        numbers = ((codes ^ SIGN) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + SIGN)
    return numbers


@triton.jit
def _scaled(
    numbers, scales_ptr, stride, left,
    begin: tl.constexpr, POWER: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A half of a tile, from column `begin`, times the scales of its groups, plus their offsets if they have any."""
    scales = _per_group(scales_ptr, stride, left, begin, LAYOUT, BLOCK_N)
    if LAYOUT[5] == "float":
        scales *= POWER
    numbers *= scales
    if LAYOUT[5] == "asymmetric":
        scales_ptr += (LAYOUT[0] + LAYOUT[2] - 1) // LAYOUT[2]
        numbers += _per_group(scales_ptr, stride, left, begin, LAYOUT, BLOCK_N)
    return numbers


@triton.jit
def _per_group(ptr, stride, left, begin: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_N: tl.constexpr):
    """What is stored for each group of a half of a tile, from column `begin`, in a shape that goes with the tile's."""
    D: tl.constexpr = LAYOUT[0]
    GROUP: tl.constexpr = LAYOUT[2]
    BLOCK: tl.constexpr = LAYOUT[3]
    GROUPS: tl.constexpr = LAYOUT[4]
    rows = tl.arange(0, BLOCK_N)
    if GROUPS == 1:
        found = tl.load(ptr + rows * stride + begin // GROUP, mask=rows < left, other=0.0).to(tl.float32)[:, None]
    elif GROUPS > 1:
        places = rows[:, None] * stride + begin // GROUP + tl.arange(0, GROUPS)[None, :]
        found = tl.load(ptr + places, mask=(rows < left)[:, None], other=0.0).to(tl.float32)
        found = tl.broadcast_to(found[:, :, None], (BLOCK_N, GROUPS, BLOCK // GROUPS))
        found = tl.reshape(found, (BLOCK_N, BLOCK))
    else:
        columns = begin + tl.arange(0, BLOCK)
        places = rows[:, None] * stride + (columns // GROUP)[None, :]
        inside = (rows < left)[:, None] & (columns < D)[None, :]
        found = tl.load(ptr + places, mask=inside, other=0.0).to(tl.float32)
    return found


@triton.jit
def _finite(x):
    """Which rows of a tile hold neither NaN nor infinity."""
    return tl.max((tl.abs(x.to(tl.float32)) < float("inf")).to(tl.int32) ^ 1, 1) == 0
