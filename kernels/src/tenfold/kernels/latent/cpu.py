"""Attention over latents on the CPU, a block of keys at a time.

All heads share the latents, so their rows are stacked, and a block that was unpacked once, [c; k_R] side by
side, serves two matrix products: the scores of all rows, and their weighted sums. (The sums of k_R are dropped;
to leave them out would cost more than it saves.) The softmax runs over the blocks: per row a maximum, a sum and
z, rescaled whenever the maximum grows. Extra memory is one block and its scores, whatever Tk is.

Two 4-bit integers of a byte come out as 8-bit numbers, 16 times too large, by one instruction each: a shift, and a
mask; the scales take the 16 back, exactly. A table of the 256 bytes was slower by a factor of 10. Nor was anything
gained by leaving the scales out of the block and multiplying them into products, s = Σ_g scale_g·(q_g·code_g):
fewer multiplications, but thinner matrix products. Minifloats become float16 by two shifts and a mask, which takes
twice as long; torch's own conversion of E4M3 took 14 times as long.

Floor of a decoding step: 2·H·(2·Dc + Dr) floating-point operations a key (34,816 with 16 heads, latents of 512
and rotary keys of 64) against (Dc + Dr)/2 bytes and some scales in 4 bits: 117 operations a byte, where
attention over keys and values of 16 heads of 128 has 8,192 operations and 16 KiB in float32. The first is bound
by arithmetic, the second by memory.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import onednn
from .packing import FLOAT16_MASK, FLOAT16_POWER, FLOAT16_SHIFT, PackedLatents

KEYS = 1024  # of a block: 2.3 MB of float32 at Dc + Dr = 576
TERMS = 512  # that oneDNN adds up one after the other; MKL sums by pieces anyway
ROWS = 1024  # query rows, all heads counted, that take part in a product

Latents = Tensor | PackedLatents
Scratch = dict[torch.dtype, Tensor]  # the same memory, for codes on their way


@torch.autocast("cpu", enabled=False)  # the op has cast its inputs; the products here stay in float32
def forward(
    query_latent: Tensor,
    query_rope: Tensor | None,
    latent: Latents,
    rope: Latents | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """z, `(B, H, Tq, Dc)`."""
    out = torch.zeros(query_latent.shape, dtype=query_latent.dtype)
    (B, H, Tq, Dc), Tk = out.shape, latent.shape[1]
    offset = Tk - Tq
    first = max(0, -offset) if causal else 0
    if out.numel() == 0 or Tk == 0 or first >= Tq:
        return out
    queries = query_latent if query_rope is None else torch.cat([query_latent, query_rope], -1)
    wide = torch.promote_types(queries.dtype, torch.float32)
    # Allocated once: fresh pages cost as much time as a pass over them.
    buffer = torch.empty(min(KEYS, Tk), queries.shape[-1], dtype=wide)
    scratch = torch.empty(buffer.numel() + len(buffer), dtype=torch.int16)
    scratch = {dtype: scratch.view(dtype) for dtype in (torch.int16, torch.int8, torch.uint8)}
    height = max(1, ROWS // H)
    for b in range(B):
        for r in range(first, Tq, height):
            rows = slice(r, min(r + height, Tq))
            q = queries[b, :, rows].to(wide).flatten(0, 1)
            z = _attend(q, latent, rope, mask, b, rows, offset, causal, scale, buffer, scratch)
            out[b, :, rows] = z[:, :Dc].unflatten(0, (H, -1))
    return out


def _attend(
    q: Tensor,
    latent: Latents,
    rope: Latents | None,
    mask: Tensor | None,
    b: int,
    rows: slice,
    offset: int,
    causal: bool,
    scale: float,
    buffer: Tensor,
    scratch: Scratch,
) -> Tensor:
    """Z of the query rows `rows` of all heads of a batch entry, stacked; what it has beyond Dc is of no use."""
    n, Tk = rows.stop - rows.start, latent.shape[1]
    peak, total = q.new_full((len(q), 1), -torch.inf), q.new_zeros(len(q), 1)
    z = torch.zeros_like(q)
    end = min(Tk, rows.stop + offset) if causal else Tk
    for start in range(0, end, KEYS):
        keys = slice(start, min(start + KEYS, end))
        hidden = _hidden(mask, b, rows, keys, offset, causal)
        if hidden is not None and hidden.all():
            continue
        block = buffer[: keys.stop - start]
        _unpack(latent, b, keys, block[:, : latent.shape[2]], scratch)
        if rope is not None:
            _unpack(rope, b, keys, block[:, latent.shape[2] :], scratch)
        bad = None if hidden is None else _quarantine(block)

        scores = _scores(q, block).mul_(scale)  # not q: each of its numbers would be rounded once more
        if bad is not None:
            scores.masked_fill_(bad, torch.nan)
        if hidden is not None:
            scores.view(-1, n, len(block)).masked_fill_(hidden, -torch.inf)
        new_peak = torch.maximum(peak, scores.amax(1, keepdim=True))
        shift = new_peak
        if hidden is not None:  # perhaps a row has attended nothing so far: -inf - -inf
            shift = new_peak.masked_fill(new_peak == -torch.inf, 0.0)
        weights = scores.sub_(shift).exp_()
        shrink = peak.sub_(shift).exp_()
        total.mul_(shrink).add_(weights.sum(1, keepdim=True))
        z.mul_(shrink).add_(_sums(weights, block))
        peak = new_peak
    return z.div_(total.masked_fill_(total == 0.0, 1.0))


def _hidden(mask: Tensor | None, b: int, rows: slice, keys: slice, offset: int, causal: bool) -> Tensor | None:
    """Which keys of the block are not attended, `(H or 1, rows, keys)` bool; None if all are."""
    hidden = None
    if mask is not None:
        attended = mask[b, :, rows, keys]
        hidden = ~(attended[:1] if attended.stride(0) == 0 else attended)
    if causal and keys.stop - 1 > rows.start + offset:
        last = torch.arange(rows.start + offset, rows.stop + offset)
        future = torch.arange(keys.start, keys.stop) > last[:, None]
        hidden = future.unsqueeze(0) if hidden is None else hidden | future
    return hidden


def _unpack(x: Latents, b: int, keys: slice, out: Tensor, scratch: Scratch) -> None:
    """The vectors `keys` of batch entry `b` into `out`; `scratch` takes codes on their way."""
    if isinstance(x, Tensor):
        out.copy_(x[b, keys])
        return
    codes, half, factor = x.codes[b, keys], x.codes.shape[2], 1.0
    if x.code == "symmetric":
        codes = codes.view(torch.int8)
    if x.code == "float":
        factor = FLOAT16_POWER[x.bits]
        if x.bits == 8:
            out.copy_(_minifloats(codes, 8, x, scratch))
        else:
            out[:, :half] = _minifloats(codes, 12, x, scratch)
            out[:, half:] = _minifloats(codes, 8, x, scratch)[:, : x.width - half]
    elif x.bits == 8:
        out.copy_(codes)
    else:
        factor = 1 / 16
        moved = scratch[codes.dtype][: codes.numel()].view(codes.shape)
        out[:, :half] = torch.bitwise_left_shift(codes, 4, out=moved)
        out[:, half:] = torch.bitwise_and(codes, -16, out=moved)[:, : x.width - half]
    if x.scales is None:
        if factor != 1.0:
            out.mul_(factor)
        return
    scales, offsets = x.scales[b, keys].to(out.dtype), None
    if x.code == "asymmetric":
        scales, offsets = scales.chunk(2, 1)
    _per_group(Tensor.mul_, out, scales if factor == 1.0 else scales * factor, x.group_size)
    if offsets is not None:
        _per_group(Tensor.add_, out, offsets, x.group_size)


def _minifloats(codes: Tensor, shift: int, x: PackedLatents, scratch: Scratch) -> Tensor:
    """Codes that `shift` brings to the top of an int16, as float16."""
    moved = scratch[torch.int16][: codes.numel()].view(codes.shape).copy_(codes).bitwise_left_shift_(shift)
    return moved.bitwise_right_shift_(FLOAT16_SHIFT[x.bits]).bitwise_and_(FLOAT16_MASK[x.bits]).view(torch.float16)


def _per_group(change: Callable[[Tensor, Tensor], Tensor], out: Tensor, numbers: Tensor, size: int) -> None:
    """`change` made in place, by one of the `numbers` for each group of columns."""
    whole = out.shape[1] // size * size
    if whole:
        change(out[:, :whole].unflatten(1, (-1, size)), numbers[:, : whole // size, None])
    if whole < out.shape[1]:
        change(out[:, whole:], numbers[:, -1:])


def _quarantine(block: Tensor) -> Tensor | None:
    """Which vectors hold NaN or infinity, `(keys,)` bool, and zeros in their place; None if none does.

    0·NaN would reach the rows that do not attend them; a NaN among their scores reaches the rows that do.
    """
    if block.sum().isfinite():  # one fast pass: any NaN or infinity reaches the sum
        return None
    bad = ~block.isfinite().all(1)
    block.masked_fill_(bad[:, None], 0.0)
    return bad


def _scores(q: Tensor, block: Tensor) -> Tensor:
    return onednn.linear(q, block) if _suits_onednn(block) else torch.mm(q, block.t())


def _sums(weights: Tensor, block: Tensor) -> Tensor:
    if not _suits_onednn(block):
        return torch.mm(weights, block)
    # In one piece, the rounding error of a long sum was twice that of torch.mm. Strided pieces are very slow.
    pieces = zip(weights.split(TERMS, 1), block.split(TERMS), strict=True)
    return sum(onednn.linear(part.contiguous(), keys.t()) for part, keys in pieces)


def _suits_onednn(block: Tensor) -> bool:
    """Only whole blocks, whose number of keys does not change from step to step."""
    return len(block) == KEYS and onednn.available(block.dtype)
