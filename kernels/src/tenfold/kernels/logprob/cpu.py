"""Per-token log-probabilities on the CPU, a tile of rows × vocabulary at a time.

Such tiles make the matrix products about twice as fast as a few rows against the whole vocabulary, which
would read all of `weight` again for each block. So the softmax runs over the tiles: per row a maximum m and a
sum s = Σ_v exp(z_v - m), rescaled whenever m grows; the backward recomputes the tiles from them. Extra
memory, beyond a few N×D matrices, is one tile of at most about `TILE` scores and two pieces of `weight` as
wide as it, whatever N and V. Half-precision inputs are computed in float32: bfloat16 matrix products are far
slower on most CPUs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

TILE = 1 << 20  # scores: 4 MB of float32, which stays in a typical core's share of the caches
ROWS = 1024  # of a tile; fewer only if there are fewer, more only if the vocabulary is small


def forward(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The log-probabilities `(N,)`, and `(2, N)`: m and s of each row."""
    kept = _kept(target, ignore_index)
    rows, target = _take(hidden, kept), _take(target, kept)
    peak = rows.new_full((len(rows),), -torch.inf)
    total, picked = torch.zeros_like(peak), torch.empty_like(peak)
    for cols in _columns(rows, weight):
        keys, offset = _wide(weight[cols]), None if bias is None else _wide(bias[cols])
        for block, scores in _tiles(rows, keys, offset):
            here, column = _targets(target[block], cols)
            picked[block][here] = scores[here, column]
            m = torch.maximum(peak[block], scores.amax(1))
            shift = m.masked_fill(m == -torch.inf, 0.0)  # all ruled out by their bias so far: -inf - -inf
            total[block] *= (peak[block] - shift).exp_()
            total[block] += scores.sub_(shift[:, None]).exp_().sum(1)
            peak[block] = m
    # In this order, for a likely token is the difference of two large numbers exact, or nearly so.
    logp = (picked - peak) - total.log()
    logp, peak, total = (_put(x, kept, len(hidden)) for x in (logp, peak, total))
    return logp, torch.stack([peak, total])


def backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    stats: Tensor,
    ignore_index: int,
    needed: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, those that are `needed`.

    With p = exp(z - m) / s: dz_iv = g_i·(1[v = t_i] - p_iv), dH = dz W, dW = dzᵀ H, db = Σ_i dz_i.
    """
    kept = _kept(target, ignore_index)
    rows, target, grad = _take(hidden, kept), _take(target, kept), _take(grad, kept)
    peak, total = (_take(x, kept) for x in stats)
    shares = -grad / total
    drows = torch.zeros_like(rows) if needed[0] else None
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if needed[1] else None
    dbias = weight.new_zeros(len(weight)) if needed[2] else None
    for cols in _columns(rows, weight):
        keys, offset = _wide(weight[cols]), None if bias is None else _wide(bias[cols])
        dkeys = torch.zeros_like(keys, memory_format=torch.contiguous_format) if needed[1] else None
        doffset = keys.new_zeros(len(keys)) if needed[2] else None
        for block, scores in _tiles(rows, keys, offset):
            dscores = scores.sub_(peak[block, None]).exp_().mul_(shares[block, None])
            here, column = _targets(target[block], cols)
            dscores[here, column] += grad[block][here]
            if needed[0]:
                drows[block].addmm_(dscores, keys)
            if needed[1]:
                dkeys.addmm_(dscores.t(), rows[block])
            if needed[2]:
                doffset += dscores.sum(0)
        if needed[1]:
            dweight[cols] = dkeys
        if needed[2]:
            dbias[cols] = doffset
    dhidden = _put(drows, kept, len(hidden)).to(hidden.dtype) if needed[0] else None
    return dhidden, dweight, dbias


def _columns(rows: Tensor, weight: Tensor) -> Iterator[slice]:
    """The vocabulary in pieces, nothing where no row is left to score."""
    V, N = len(weight), len(rows)
    size = max(1, TILE // max(1, min(N, ROWS)))
    return (slice(v, min(v + size, V)) for v in range(0, V if N else 0, size))


def _tiles(rows: Tensor, keys: Tensor, offset: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows and their scores against `keys`, always in the same memory: use them before the next."""
    size = max(1, min(len(rows), max(ROWS, TILE // len(keys))))
    buffer = rows.new_empty(size, len(keys))
    for r in range(0, len(rows), size):
        block = slice(r, min(r + size, len(rows)))
        scores = buffer[: block.stop - r]
        if offset is None:
            torch.mm(rows[block], keys.t(), out=scores)
        else:
            torch.addmm(offset, rows[block], keys.t(), out=scores)
        yield block, scores


def _targets(target: Tensor, cols: slice) -> tuple[Tensor, Tensor]:
    """Which rows have their target among the columns `cols`, and in which of them."""
    here = ((target >= cols.start) & (target < cols.stop)).nonzero().squeeze(1)
    return here, target[here] - cols.start


def _kept(target: Tensor, ignore_index: int) -> Tensor | None:
    """The rows that are not ignored, None if that is all; the others cost nothing and never meet the rest."""
    kept = target != ignore_index
    return None if bool(kept.all()) else kept.nonzero().squeeze(1)


def _take(x: Tensor, kept: Tensor | None) -> Tensor:
    x = x if kept is None else x[kept]
    return (_wide(x) if x.is_floating_point() else x).contiguous()


def _put(x: Tensor, kept: Tensor | None, n: int) -> Tensor:
    return x if kept is None else x.new_zeros(n, *x.shape[1:]).index_copy_(0, kept, x)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
