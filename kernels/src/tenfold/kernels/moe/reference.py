"""The mixture-of-experts ops by their definition: plain torch, correct in float64. The tests' oracle.

`route_tokens` is also what runs on the CPU: it takes a small part of the time of the experts that follow.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

ROUNDS = 24  # of the shuffle; a place stays where it is in all of them with probability 2⁻²⁴


def route_tokens(
    logits: Tensor, top_k: int, capacity: int, recycle: bool, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Routing`, those with gradients first, and how many choose each expert."""
    T, E = logits.shape
    p = logits.softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))
    if logits.device.type == "cpu":
        _require_softmax(p)
    if top_k == 1:
        choice = logits.argmax(1, keepdim=True)  # of equal ones the first, too, and several times as fast
    else:
        choice = logits.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    expert, slot, load, recycled, dropped, row, offsets, chosen = _place(choice, E, capacity, recycle, seed)

    weight = p.gather(1, expert.clamp(min=0)).masked_fill(dropped, 0.0)
    if top_k > 1:
        weight = weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    balance_loss = E / max(T, 1) ** 2 * (p.sum(0) * chosen).sum()
    return weight, balance_loss, expert, slot, load, recycled, dropped, row, offsets, chosen


def route_tokens_backward(
    dweight: Tensor, dbalance: Tensor, logits: Tensor, expert: Tensor, weight: Tensor, chosen: Tensor
) -> Tensor:
    """The gradient of the logits z.

    With w the weights of the experts that the token uses, and u_e = chosen_e/T:

        top_k = 1:  dz_e = dw·w·(1[e used] - p_e)
        top_k > 1:  dz_e = w_e·(dw_e - Σ_i dw_i w_i), 0 where not used
        and from the balance loss  dz_e += dbalance·E/T·p_e·(u_e - Σ_i p_i u_i)
    """
    T, E = logits.shape
    p = logits.softmax(1, dtype=weight.dtype)
    u = chosen.to(p.dtype) / max(T, 1)
    dlogits = (dbalance * E / max(T, 1)) * p * (u - (p @ u)[:, None])
    if expert.shape[1] == 1:
        flow = dweight * weight
        dlogits -= flow * p
    else:
        # The same for all of a token's dw changes nothing: without the first one's, less is cancelled.
        dweight = dweight - dweight[:, :1]
        flow = weight * (dweight - (dweight * weight).sum(1, keepdim=True))
    return dlogits.scatter_add_(1, expert.clamp(min=0), flow).to(logits.dtype)


def permute(x: Tensor, row: Tensor) -> Tensor:
    """`rows[row[t, j]] = x[t]`."""
    return x[entries(row) // row.shape[1]]


def unpermute(y: Tensor, weight: Tensor, row: Tensor, dropped: Tensor) -> Tensor:
    """`Σ_j weight[t, j] · y[row[t, j]]` over what is not dropped."""
    rows = y[row].masked_fill(dropped[..., None], 0.0).to(torch.promote_types(y.dtype, weight.dtype))
    return (rows * weight.masked_fill(dropped, 0.0)[..., None]).sum(1).to(y.dtype)


def grouped_matmul(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """A product per group, zeros after the last."""
    bounds = offsets.tolist()
    require_bounds(bounds, len(x))
    products = [x[a:b] @ w for a, b, w in zip(bounds[:-1], bounds[1:], weight, strict=True)]
    return torch.cat([*products, x.new_zeros(len(x) - bounds[-1], weight.shape[2])])


def grouped_swiglu(x: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor) -> Tensor:
    """A feed-forward per group, zeros after the last."""
    gate, up = grouped_matmul(x, gate_up.transpose(1, 2), offsets).chunk(2, -1)
    return grouped_matmul(F.silu(gate) * up, down.transpose(1, 2), offsets)


def require_bounds(bounds: list[int], rows: int) -> None:
    """Raise ValueError unless the offsets are 0, then never fall, and end within the rows."""
    if bounds[0] != 0:
        raise ValueError(f"offsets: must begin with 0, got {bounds[0]}")
    for i, (a, b) in enumerate(pairwise(bounds)):
        if b < a:
            raise ValueError(f"offsets: must not fall, got {a} and then {b}, at position {i + 1}")
    if bounds[-1] > rows:
        raise ValueError(f"offsets: the last is {bounds[-1]}, but x has {rows} rows")


def shuffle(n: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """A permutation of 0…n-1, drawn by `seed`: the same integers on every device, each from its index alone.

    The swap-or-not shuffle (Hoang, Morris, Rogaway, CRYPTO 2012): in every round the places are paired by a
    random reflection i ↔ key - i (mod n), and each pair is swapped or not by a hash of its larger index.
    """
    i = torch.arange(n, device=device)
    for r in range(ROUNDS if n > 1 else 0):
        key, salt = _mix(seed ^ _mix(2 * r)) % n, _mix(seed ^ _mix(2 * r + 1))
        other = (key - i) % n
        swap = _mix(torch.maximum(i, other) ^ salt) >> 31
        i = torch.where(swap == 1, other, i)
    return i


def _place(
    choice: Tensor, E: int, capacity: int, recycle: bool, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The integers of a routing, from the chosen experts `(T, k)`."""
    (T, k), device = choice.shape, choice.device
    # An entry is a token's j-th choice; all first choices come before any second one.
    expert = choice.t().reshape(-1)
    order = expert.argsort(stable=True)
    chosen = expert.bincount(minlength=E)
    kept = chosen.clamp(max=capacity)
    slot = torch.empty_like(expert)
    slot[order] = torch.arange(T * k, device=device) - (chosen.cumsum(0) - chosen)[expert[order]]
    over = slot >= capacity
    overflow = over.nonzero().squeeze(1)

    load = kept
    if recycle and len(overflow):
        free = torch.arange(E, device=device).repeat_interleave(capacity - kept)
        taker = shuffle(len(free), int(seed), device)  # which overflow entry takes each free place, if there is one
        taken = taker < len(overflow)
        new = free[taken]
        more = new.bincount(minlength=E)
        entry = overflow[taker[taken]]
        expert[entry] = new
        slot[entry] = kept[new] + torch.arange(len(new), device=device) - (more.cumsum(0) - more)[new]
        load = kept + more
    offsets = torch.cat([load.new_zeros(1), load.cumsum(0)])
    row = offsets[expert] + slot
    if not recycle:
        row[overflow] = offsets[-1] + torch.arange(len(overflow), device=device)

    expert, slot, row, over = (x.view(k, T).t().contiguous() for x in (expert, slot, row, over))
    dropped = _doubles(expert, over, E) if recycle else over
    if k > 1:
        load = load - expert[dropped].bincount(minlength=E) if recycle else load
    expert, slot = expert.masked_fill(dropped, -1), slot.masked_fill(dropped, -1)
    return expert, slot, load, over & ~dropped, dropped, row, offsets, chosen


def _doubles(expert: Tensor, recycled: Tensor, E: int) -> Tensor:
    """Which recycled entries came to an expert that their token uses already."""
    T, k = expert.shape
    double = torch.zeros_like(recycled)
    if k == 1:
        return double
    used = torch.zeros(T, E, dtype=torch.int64, device=expert.device).scatter_add_(1, expert, (~recycled).long()) > 0
    for j in range(k):
        here = expert[:, j : j + 1]
        double[:, j] = recycled[:, j] & used.gather(1, here).squeeze(1)
        used |= torch.zeros_like(used).scatter_(1, here, recycled[:, j : j + 1])
    return double


def entries(row: Tensor) -> Tensor:
    """The inverse of `row`: which of the T·k entries, counted token by token, has each row; -1 for none."""
    return torch.full_like(row.flatten(), -1).scatter_(0, row.flatten(), torch.arange(row.numel(), device=row.device))


def _mix(x: Tensor | int) -> Tensor | int:
    """A 32-bit integer hashed: two multiplications between shifts, each step invertible."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def _require_softmax(p: Tensor) -> None:
    wrong = p.isnan().any(1)
    if wrong.any():
        raise ValueError(
            f"logits: {int(wrong.sum())} of {len(p)} tokens, the first at {int(wrong.nonzero()[0])}, have no "
            "softmax: they hold NaN or inf, or only -inf"
        )
