"""The product of two operands that are quantized while they are loaded.

What is multiplied is `round(x · S)`: numbers with few bits, exact in bfloat16 or float8, whose products float32
sums without further rounding of the operands. The scales come out of the sums: per row at the end, or per block of K
as soon as the block is summed, so a tile's depth divides the block.

An operand's tile is quantized by every program that loads it, about 13 instructions per element. On an H100 (128
lanes and 2,048 bfloat16 multiply-adds per clock and multiprocessor) a 128×128 tile of the product has 8 clocks of
tensor-core work for each unit of depth, and quantizing both operands takes 26. Quantizing once before costs each
element one more writing and reading, 4 bytes or 0.3 clocks of a multiprocessor's share of the memory, three
times the 0.1 clocks of quantizing it. So an operand that is loaded more than `REPEATS` times is quantized before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import architecture, interpreting
from .formats import FloatFormat
from .scales import scaled_limit, scales_of, split
from .triton import _absmax, _narrowed, _readable, _round, _scale, _widened, quantize, rounding_options, scale_options

REPEATS = 4
TORCH_TO_TRITON = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
}
_FLOAT8 = {torch.float8_e4m3fn: FloatFormat.parse("e4m3fn"), torch.float8_e5m2: FloatFormat.parse("e5m2ocp")}


def matmul(
    a: Tensor,
    b: Tensor,
    a_format: FloatFormat | None,
    b_format: FloatFormat | None,
    a_scale: str | None,
    b_scale: str | None,
    block_size: int,
    rounding: str,
    scale_rounding: str,
) -> Tensor:
    """`Q(a) @ Q(b)ᵀ` of `(M, K)` and `(N, K)`, at least one of them with a format."""
    M, K = a.shape
    N = b.shape[0]
    out = torch.empty(M, N, dtype=a.dtype, device=a.device)
    if out.numel() == 0:
        return out
    chip = architecture(a)
    formats, scales, operands = [a_format, b_format], [a_scale, b_scale], [a, b]
    depth = block_size & -block_size if "block" in [s for s, f in zip(scales, formats, strict=True) if f] else 0
    kinds = dot_dtypes(a.dtype, a_format, b_format, chip)
    if kinds is None or 0 < depth < 16:  # their own numbers are multiplied, in their own dtype
        for i, x in enumerate(operands):
            if formats[i] is not None:
                groups, limit = _grouped(x, scales[i], block_size), _limit(formats[i], x.dtype, scales[i])
                scaling = None if scales[i] is None else scale_rounding
                options = {"scale_rounding": scaling, "output": "number", "dtype": x.dtype}
                operands[i] = quantize(groups, None, None, formats[i], limit, rounding, **options)[0].view(x.shape)
        formats, depth, kinds = [None, None], 0, (_own(a.dtype), _own(a.dtype))
    rows, columns, tile_k, warps, stages = tiles(M, kinds[0], depth, chip)
    repeats = [triton.cdiv(N, columns), triton.cdiv(M, rows)]
    # A tile as deep as a block can compute its scale. With no block to scale on load, the product chooses the depth.
    if all(n > REPEATS or f is None or s != "block" for n, f, s in zip(repeats, formats, scales, strict=True)):
        rows, columns, tile_k, warps, stages = tiles(M, kinds[0], 0, chip)
        tile_k = min(tile_k, depth or tile_k)
    options: dict[str, object] = {}
    pointers = []
    for i, side in enumerate("AB"):
        rules = (block_size, rounding, scale_rounding, kinds[i], tile_k, repeats[i] > REPEATS)
        pointer, scale, chosen = _operand(operands[i], formats[i], scales[i], *rules)
        pointers += [_readable(pointer), pointer.stride(0), scale]
        options |= {f"{side}_{name}": value for name, value in chosen.items()}
    exact = all(formats) and kinds[0] == torch.float32  # TF32 has 11 digits, as many as any format
    precision = "tf32" if exact else _precision()
    with torch.cuda.device_of(a):
        _matmul_kernel[(triton.cdiv(M, rows) * triton.cdiv(N, columns),)](
            *pointers,
            _readable(out),
            *(M, N, K, block_size),
            **options,
            PRECISION="ieee" if chip == "interpreter" or chip.startswith("gfx") else precision,
            BLOCK_M=rows,
            BLOCK_N=columns,
            BLOCK_K=tile_k,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=False,
        )
    return out


def dot_dtypes(
    dtype: torch.dtype, a: FloatFormat | None, b: FloatFormat | None, architecture: str
) -> tuple[torch.dtype, torch.dtype] | None:
    """The dtypes in which the operands are multiplied; None if `round(x · S)` fits none of them.

    Sums of products of formats with 7 or 8 exponent bits could overflow float32 before their scales are out.
    """
    formats = [f for f in (a, b) if f is not None]
    if any(f.exponent_bits > 6 for f in formats):
        return None
    if architecture == "interpreter":
        return torch.float32, torch.float32
    if len(formats) == 2:
        narrow = [next((d for d, f8 in _FLOAT8.items() if _contains(f8, f)), None) for f in formats]
        if all(narrow) and architecture in ("sm_89", "sm_90", "sm_100", "sm_103", "sm_120"):
            return narrow[0], narrow[1]
        if all(_contains(FloatFormat.parse("bfloat16"), f) for f in formats):
            return torch.bfloat16, torch.bfloat16
        if dtype == torch.bfloat16:
            return None
    own = {torch.bfloat16: "bfloat16", torch.float16: "float16"}.get(dtype)
    if own is not None and not all(_contains(FloatFormat.parse(own), f) for f in formats):
        return None
    return dtype, dtype


def tiles(M: int, kind: torch.dtype, block: int, architecture: str) -> tuple[int, int, int, int, int]:
    """Rows and columns of a tile of the product, its depth, warps and stages.

    `block` is that of an operand that is quantized as it is loaded, which wants the tile's depth, or 0: a power of
    two. Each is the largest tried for which Triton 3.8 and 3.9 spill no register (tests/kernels/test_quant_aot.py).
    """
    rows = min(128, max(16, triton.next_power_of_2(M)))
    if kind == torch.float32 and architecture != "interpreter":
        return min(rows, 32), 64, min(block or 32, 32), 8, 2
    depth = min(block, 128) or (128 if kind.itemsize == 1 else 64)
    if block > 64:
        rows = min(rows, 64)
    stages = 2 if depth * kind.itemsize > 128 or architecture.startswith("gfx") else 3
    # 128 × 128 sums and their scales fill the registers of Hopper and Blackwell.
    narrow = rows < 64 or (rows == 128 and architecture in ("sm_90", "sm_100", "sm_103"))
    return rows, 64 if narrow else 128, depth, 4 if rows < 64 else 8, stages


def _operand(x, format, scale, block_size, rounding, scale_rounding, kind, tile_k, before):
    """The tensor to load, its scales, and what is compiled in for it."""
    chosen: dict[str, object] = {"DOT": TORCH_TO_TRITON[kind], "QUANTIZED": False, "SCALE": "none"}
    if format is None:
        return (x if x.stride(1) == 1 else x.contiguous()), None, chosen
    where = {None: "none", "tensor": "tensor", "axis": "row", "block": "block"}[scale]
    limit = _limit(format, x.dtype, scale)
    groups = _grouped(x, scale, block_size)
    scaling = None if scale is None else scale_rounding
    if before:
        scaled = {"scale_rounding": scaling, "output": "scaled", "dtype": kind}
        quantized, scales = quantize(groups, None, None, format, limit, rounding, **scaled)
        return quantized.view(x.shape), scales, chosen | {"SCALE": where}
    chosen |= {"QUANTIZED": True} | rounding_options(format, limit, rounding)
    scales = None
    if where == "block" and block_size == tile_k:
        where = "tile"
        chosen |= scale_options(format, scale_rounding, x.dtype)
    elif scale is not None:
        low, high = torch.aminmax(groups, dim=1, keepdim=True)
        scales = scales_of(torch.maximum(-low, high), format, scale_rounding, x.dtype)
    return (x if x.stride(1) == 1 else x.contiguous()), scales, chosen | {"SCALE": where}


def _grouped(x: Tensor, scale: str | None, block_size: int) -> Tensor:
    return split(x, scale, block_size, 1)


def _limit(format: FloatFormat, dtype: torch.dtype, scale: str | None) -> float:
    return scaled_limit(format, dtype if scale is None else torch.float32)


def _own(dtype: torch.dtype) -> torch.dtype:
    """What numbers of that dtype are multiplied in: the interpreter would multiply bfloat16's bits as integers."""
    return torch.float32 if interpreting() else dtype


def _contains(format: FloatFormat, other: FloatFormat) -> bool:
    """Whether each of the other's numbers is one of the format's."""
    digits, others_digits = (f.mantissa_bits + (f.exponent_bits > 0) for f in (format, other))
    step, others_step = (f.min_exponent - f.mantissa_bits for f in (format, other))
    return others_digits <= digits and other.max <= format.max and others_step >= step


def _precision() -> str:
    """How float32 is multiplied, by torch's own switch."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@triton.jit
def _matmul_kernel(
    a_ptr, a_stride, a_scale_ptr,
    b_ptr, b_stride, b_scale_ptr,
    out_ptr,
    M, N, K, block_size,
    A_DOT: tl.constexpr, A_QUANTIZED: tl.constexpr, A_SCALE: tl.constexpr,
    B_DOT: tl.constexpr, B_QUANTIZED: tl.constexpr, B_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    A_M: tl.constexpr = 0, A_LOWEST: tl.constexpr = 0, A_LIMIT: tl.constexpr = 0.0, A_ROUNDING: tl.constexpr = "even",
    B_M: tl.constexpr = 0, B_LOWEST: tl.constexpr = 0, B_LIMIT: tl.constexpr = 0.0, B_ROUNDING: tl.constexpr = "even",
    A_TOP: tl.constexpr = 1.0, A_LOW: tl.constexpr = 1.0, A_HIGH: tl.constexpr = 1.0,
    B_TOP: tl.constexpr = 1.0, B_LOW: tl.constexpr = 1.0, B_HIGH: tl.constexpr = 1.0,
    A_SCALE_ROUNDING: tl.constexpr = "exact", B_SCALE_ROUNDING: tl.constexpr = "exact",
):  # fmt: skip
    # Eight rows of tiles at a time, column by column: what they load stays in the cache.
    across = tl.cdiv(N, BLOCK_N)
    band = tl.program_id(0) // (8 * across)
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - band * 8, 8)
    inside = tl.program_id(0) % (8 * across)
    rows = (band * 8 + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (inside // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the last read the last again: no mask is needed, and nothing is out of bounds.
    a_rows, b_rows = tl.minimum(rows, M - 1).to(tl.int64), tl.minimum(columns, N - 1).to(tl.int64)
    a_ptr += a_rows[:, None] * a_stride
    b_ptr += b_rows[:, None] * b_stride
    blocks = tl.cdiv(K, block_size)
    a_scale = _row_scale(a_scale_ptr, a_rows, A_SCALE)
    b_scale = _row_scale(b_scale_ptr, b_rows, B_SCALE)

    ACCUMULATES: tl.constexpr = _constant(A_SCALE) and _constant(B_SCALE)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)[None, :]
        if A_SCALE == "block":
            a_scale = tl.load(a_scale_ptr + a_rows * blocks + k // block_size)
        if B_SCALE == "block":
            b_scale = tl.load(b_scale_ptr + b_rows * blocks + k // block_size)
        a, a_scale = _operand_tile(
            a_ptr + depth, depth < K, a_scale, A_QUANTIZED, A_SCALE, A_M, A_LOWEST, A_LIMIT, A_ROUNDING,
            A_TOP, A_LOW, A_HIGH, A_SCALE_ROUNDING, A_DOT,
        )  # fmt: skip
        b, b_scale = _operand_tile(
            b_ptr + depth, depth < K, b_scale, B_QUANTIZED, B_SCALE, B_M, B_LOWEST, B_LIMIT, B_ROUNDING,
            B_TOP, B_LOW, B_HIGH, B_SCALE_ROUNDING, B_DOT,
        )  # fmt: skip
        if ACCUMULATES and A_DOT.primitive_bitwidth > 8:
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
        else:  # also for float8, whose sums Hopper's tensor cores keep in 14 bits: float32 adds up the tiles
            product = tl.dot(a, tl.trans(b), input_precision=PRECISION)
            if not _constant(A_SCALE):
                product *= (1.0 / a_scale)[:, None]
            if not _constant(B_SCALE):
                product *= (1.0 / b_scale)[None, :]
            acc += product
    if _constant(A_SCALE) and A_SCALE != "none":
        acc *= (1.0 / a_scale)[:, None]
    if _constant(B_SCALE) and B_SCALE != "none":
        acc *= (1.0 / b_scale)[None, :]
    places = rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(
        out_ptr + places, _narrowed(acc, out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :]
    )


@triton.jit
def _row_scale(scale_ptr, rows, SCALE: tl.constexpr):
    """S of each row, where it has one."""
    if SCALE == "row":
        return tl.load(scale_ptr + rows)
    if SCALE == "tensor":
        return tl.load(scale_ptr + rows * 0)
    return rows.to(tl.float32) * 0.0 + 1.0


@triton.constexpr_function
def _constant(scale):
    """Whether a row has one scale from end to end."""
    return scale in ("none", "tensor", "row")


@triton.jit
def _operand_tile(
    ptrs, inside, scale,
    QUANTIZED: tl.constexpr, SCALE: tl.constexpr,
    M: tl.constexpr, LOWEST: tl.constexpr, LIMIT: tl.constexpr, ROUNDING: tl.constexpr,
    TOP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SCALE_ROUNDING: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """A tile as it is multiplied, and the scale of each of its rows."""
    x = tl.load(ptrs, mask=inside, other=0.0)
    if QUANTIZED:
        x = _widened(x)
        if SCALE == "tile":
            scale = _scale(_absmax(x), TOP, LOW, HIGH, SCALE_ROUNDING)
        if SCALE != "none":
            x = x * scale[:, None]
        x = _round(x, 0, M, LOWEST, LIMIT, ROUNDING)
    elif x.dtype == tl.int16:  # bfloat16, in the interpreter
        x = _widened(x)
    return x.to(DOT), scale
