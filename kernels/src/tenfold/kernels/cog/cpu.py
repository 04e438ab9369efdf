"""Cog attention on the CPU, a tile of query rows at a time.

A tile sees all its keys at once, so torch's fused row softmax needs no running maximum, and causal tiles stop
at their last key. Extra memory is two tiles in the forward, three in the backward, and float32 copies of
half-precision inputs: bfloat16 matrix products are far slower than float32 ones on most CPUs. The backward
recomputes the tiles.

Floor: N attended scores (about B·H·T²/2 when causal) take 4·N·D FLOPs in two matrix products and N
exponentials forward, 10·N·D and N backward. Between the two products a score is read and written four times
(sign, magnitude, softmax, sign again): 48·N bytes, which stay in cache. Main memory serves a tile its
queries, keys and values only.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 1 << 20  # scores: 4 MB of float32, so that two or three tiles stay in a typical L3
ROWS = 128  # query rows of a tile: more waste on the causal diagonal, fewer make thin matrix products


class Tile(NamedTuple):
    """A part of the score matrix: some batch entries, key heads and query rows, and the keys they can see."""

    batch: slice
    heads: slice
    rows: slice
    keys: slice
    hidden: Tensor | None  # (b·h, group, rows, keys) bool: not attended; None without a mask
    future: Tensor | None  # (rows, rows): 1 where one of the last keys comes later; None if not causal


@torch.autocast("cpu", enabled=False)  # the op has cast its inputs; the products here stay in float32
def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """The output `(B, Hq, Tq, D)`."""
    result = torch.zeros(query.shape, dtype=query.dtype)
    q, out = _grouped(query, key), _grouped(result, key)
    k, v, bad = _quarantine(key, value, hides=mask is not None or (causal and query.shape[2] > 1))
    scores, signs = _buffers(2, q, k)
    for tile in _tiles(q, k, mask, causal):
        weights, _ = _weights(_rows(q, tile), k, bad, tile, scale, scores, signs)
        _put(out, tile, torch.bmm(weights, _keys(v, tile)))
    return result


@torch.autocast("cpu", enabled=False)
def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    With σ = sign(s), A = σ·softmax(|s|) and δ_i = Σ_d dO_id·O_id:
    dV = Aᵀ dO, dS = A·(σ·dO Vᵀ − δ), dQ = scale·dS K, dK = scale·dSᵀ Q; the jump at s = 0 has no gradient.
    """
    result = torch.zeros(query.shape, dtype=query.dtype)
    q, o, do, dq = (_grouped(x, key) for x in (query, out, grad.contiguous(), result))
    k, v, bad = _quarantine(key, value, hides=mask is not None or (causal and query.shape[2] > 1))
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    scores, signs, products = _buffers(3, q, k)
    for tile in _tiles(q, k, mask, causal):
        rows, outs, douts = (_rows(x, tile) for x in (q, o, do))
        if mask is not None:  # a row that attends nothing takes no part, whatever it holds
            nothing = tile.hidden.all(-1, keepdim=True).flatten(1, 2)
            rows, outs, douts = (x.masked_fill(nothing, 0.0) for x in (rows, outs, douts))
        weights, sign = _weights(rows, k, bad, tile, scale, scores, signs)
        if out.dtype != k.dtype:  # δ is a small difference: out rounded to half precision would spoil it
            outs = torch.bmm(weights, _keys(v, tile))
        _keys(dv, tile).baddbmm_(weights.mT, douts)
        delta = (douts * outs).sum(-1, keepdim=True)
        dscores = torch.bmm(douts, _keys(v, tile).mT, out=_view(products, weights.shape))
        _hide(dscores, tile, 0.0)  # a value may be so large that its product is infinite
        torch.addcmul(-delta, dscores, sign, out=dscores).mul_(weights)
        _keys(dk, tile).baddbmm_(dscores.mT, rows, alpha=scale)
        _put(dq, tile, torch.bmm(dscores, _keys(k, tile)).mul_(scale))
    return result, dk.to(key.dtype), dv.to(value.dtype)


def _weights(
    rows: Tensor, k: Tensor, bad: Tensor | None, tile: Tile, scale: float, scores: Tensor, signs: Tensor
) -> tuple[Tensor, Tensor]:
    """Signed weights of a tile, and the signs, `(b·h, group·rows, keys)` each, in the two buffers."""
    keys = _keys(k, tile)
    shape = (*rows.shape[:2], keys.shape[1])
    # |scale| follows the sign: queries times scale would round a score of exactly 0 to either side of it.
    scores = _view(scores, shape).baddbmm_(rows, keys.mT, beta=0, alpha=(scale > 0) - (scale < 0))
    _hide(scores, tile, 0.0)
    sign = torch.sign(scores, out=_view(signs, shape))
    if bad is not None:
        sign.masked_fill_(_keys(bad, tile).mT, torch.nan)
        _hide(sign, tile, 0.0)
    magnitude = torch.addcmul(scores.new_zeros(()), scores, sign, value=abs(scale), out=scores)
    # Not -inf: a row without any key then stays finite, and its signs make it zero.
    _hide(magnitude, tile, torch.finfo(scores.dtype).min)
    return torch.softmax(magnitude, -1, out=magnitude).mul_(sign), sign


def _hide(scores: Tensor, tile: Tile, filling: float) -> None:
    """Overwrite what is not attended."""
    n = tile.rows.stop - tile.rows.start
    if tile.hidden is not None:
        scores.unflatten(1, (-1, n)).masked_fill_(tile.hidden, filling)
    elif tile.future is not None:  # the same, many times faster
        last = scores.view(-1, n, scores.shape[-1])[..., -n:].tril_()
        if filling:
            last.add_(tile.future, alpha=filling)


def _tiles(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Iterator[Tile]:
    """Tiles of about TILE scores over every row to which `causal` leaves a key; the others stay zero."""
    (B, H, group, Tq, _), Tk = q.shape, k.shape[2]
    offset = Tk - Tq
    first = max(0, -offset) if causal else 0
    if q.numel() == 0 or Tk == 0 or first >= Tq:
        return
    height = max(1, min(ROWS, TILE // (group * Tk)))
    after = torch.ones(height, height, dtype=k.dtype).triu_(1)
    if mask is not None:
        mask = mask.unflatten(1, (H, group))
    for r in range(first, Tq, height):
        rows = slice(r, min(r + height, Tq))
        n = rows.stop - r
        keys = slice(0, rows.stop + offset if causal else Tk)
        future = after[:n, :n] if causal and n > 1 else None
        pairs = max(1, TILE // (group * n * keys.stop))  # of a batch entry and a key head
        heads, batch = min(H, pairs), max(1, pairs // H)
        for b in range(0, B, batch):
            for h in range(0, H, heads):
                entries, some = slice(b, min(b + batch, B)), slice(h, min(h + heads, H))
                hidden = None
                if mask is not None:
                    hidden = ~mask[entries, some, :, rows, keys]
                    if future is not None:
                        hidden[..., -n:] |= future.bool()
                    hidden = hidden.flatten(0, 1)
                yield Tile(entries, some, rows, keys, hidden, future)


def _quarantine(key: Tensor, value: Tensor, hides: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Key and value ready for the products, and `(B, Hkv, Tk, 1)` bool: where one holds a NaN or infinity.

    Those vectors are zeroed, for 0·NaN would reach the rows that do not attend them; the NaN goes into the
    signs, so that it does reach the rows that do. None where all are finite or where nothing hides a key.
    """
    wide = torch.promote_types(key.dtype, torch.float32)
    k, v = (x.to(wide).contiguous() for x in (key, value))
    if not hides or (k.sum() + v.sum()).isfinite():  # one fast pass: any NaN or infinity reaches the sum
        return k, v, None
    bad = ~(k.isfinite() & v.isfinite()).all(-1, keepdim=True)
    return k.masked_fill(bad, 0.0), v.masked_fill(bad, 0.0), bad


def _buffers(count: int, q: Tensor, k: Tensor) -> Tensor:
    """Flat memory for `count` tiles, allocated once: fresh pages cost as much time as a pass over them."""
    B, H, group, Tq, _ = q.shape
    Tk = k.shape[2]
    return k.new_empty(count, min(B * H * group * Tq * Tk, max(TILE, group * Tk)))


def _view(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    return buffer[: math.prod(shape)].view(shape)


def _grouped(x: Tensor, key: Tensor) -> Tensor:
    """`(B, Hq, T, D)` to `(B, Hkv, group, T, D)`: the query heads that share a key head side by side."""
    Hkv = key.shape[1]
    return x.unflatten(1, (Hkv, x.shape[1] // Hkv))


def _rows(x: Tensor, tile: Tile) -> Tensor:
    """The tile's rows of a grouped tensor, a key head's whole group stacked: `(b·h, group·rows, D)`."""
    part = x[tile.batch, tile.heads, :, tile.rows].to(torch.promote_types(x.dtype, torch.float32))
    return part.flatten(0, 1).flatten(1, 2)


def _keys(x: Tensor, tile: Tile) -> Tensor:
    """The tile's part of a contiguous `(B, Hkv, Tk, D)` as `(b·h, keys, D)`.

    A view, for a tile with several batch entries has all their heads.
    """
    return x[tile.batch, tile.heads, tile.keys].flatten(0, 1)


def _put(x: Tensor, tile: Tile, rows: Tensor) -> None:
    """The inverse of `_rows`."""
    part = x[tile.batch, tile.heads, :, tile.rows]
    part.copy_(rows.view(part.shape))
