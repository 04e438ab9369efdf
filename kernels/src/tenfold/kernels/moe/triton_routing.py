"""Routing in Triton, for CUDA and ROCm: three launches, and no word to the host.

`_choose_kernel`, a program per span of tokens: softmax, the k largest, and each token's place among those of
its span with the same choice. It leaves behind, per span and expert, how many chose it and the sum of its
probabilities. `_count_kernel`, a program per expert: adds up the spans and, under recycling, gives the
expert's free places out: of all free places, number s goes to the overflow entry number shuffle(s), if there
are so many. `_place_kernel`, a program per span again: from both, the experts, places, rows and weights.

All sums over tokens are of integers, or in the order of the spans; the only atomics subtract integers. So
results repeat bit for bit, and the integers among them are those of `reference.py`.

It reads the T×E logits twice, and once more backward, and little else: 8·T·E bytes at 3.35e12/s on an H100,
1.3 µs for 32,768 tokens and 16 experts. The launches take longer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import ROUNDS

SPANS = 128  # of tokens, at most: programs of two of the routing kernels
TILE = 2048  # logits that a program handles at a time, about


def route_tokens(
    logits: Tensor, top_k: int, capacity: int, recycle: bool, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Routing`, those with gradients first, and how many choose each expert."""
    logits = logits.contiguous()
    (T, E), device = logits.shape, logits.device

    def empty(*shape, dtype=torch.int64):
        return torch.empty(shape, dtype=dtype, device=device)

    expert, slot, row = (empty(T, top_k) for _ in range(3))
    weight = empty(T, top_k, dtype=torch.float32)
    recycled, dropped = (empty(T, top_k, dtype=torch.bool) for _ in range(2))
    load, chosen, offsets, balance_loss = empty(E), empty(E), empty(E + 1), empty(dtype=torch.float32)
    filled = empty(E, dtype=torch.int32)  # places given out
    block_e, block_t, warps = _tile(E)
    span = max(block_t, triton.next_power_of_2(triton.cdiv(T, SPANS)))
    spans = max(1, triton.cdiv(T, span))  # one even without tokens: it writes the zeros

    choice, rank = empty(top_k, T, dtype=torch.int32), empty(top_k, T, dtype=torch.int32)
    counts, before = (empty(top_k * spans, E, dtype=torch.int32) for _ in range(2))
    mass = empty(spans, E, dtype=torch.float32)
    recycle = recycle and seed is not None
    taker = empty(2, T * top_k if recycle else 0, dtype=torch.int32)  # by overflow entry: its new expert and place
    if seed is not None:
        seed = seed.to(device, non_blocking=True)
    sizes = (T, spans, span, capacity)
    tile = {"K": top_k, "E": E, "BLOCK_E": block_e, "BLOCK_T": block_t, "num_warps": warps}
    tile["enable_fp_fusion"] = True
    with torch.cuda.device_of(logits):
        _choose_kernel[(spans,)](logits, choice, rank, counts, mass, *sizes, **tile)
        _count_kernel[(E,)](
            *(counts, mass, before, taker, seed, filled, load, chosen, balance_loss),
            *sizes,
            **tile,
            RECYCLE=recycle,
            ROUNDS=ROUNDS,
        )
        _place_kernel[(spans,)](
            *(logits, choice, rank, before, taker, filled),
            *(expert, weight, slot, load, recycled, dropped, row, offsets),
            *sizes,
            **tile,
            RECYCLE=recycle,
        )
    return weight, balance_loss, expert, slot, load, recycled, dropped, row, offsets, chosen


def route_tokens_backward(
    dweight: Tensor, dbalance: Tensor, logits: Tensor, expert: Tensor, weight: Tensor, chosen: Tensor
) -> Tensor:
    """The gradient of the logits."""
    logits = logits.contiguous()
    dlogits = torch.empty_like(logits)
    (T, E), top_k = logits.shape, expert.shape[1]
    block_e, block_t, warps = _tile(E)
    if T:
        with torch.cuda.device_of(logits):
            _route_backward_kernel[(triton.cdiv(T, block_t),)](
                *(dweight.contiguous(), dbalance, logits, expert, weight, chosen, dlogits, T),
                K=top_k,
                E=E,
                BLOCK_E=block_e,
                BLOCK_T=block_t,
                num_warps=warps,
                enable_fp_fusion=True,
            )
    return dlogits


def _tile(E: int) -> tuple[int, int, int]:
    """Experts and tokens of a tile, and warps of a program."""
    block_e = max(16, triton.next_power_of_2(E))
    # Of 16 tokens and 128 experts Triton 3.9 spills registers at 8 warps, Triton 3.8 at 4.
    tokens = 8 if block_e >= 128 else min(64, TILE // block_e)
    return block_e, tokens, 4 if block_e <= 128 else 8


@triton.jit
def _choose_kernel(
    logits_ptr, choice_ptr, rank_ptr, counts_ptr, mass_ptr,
    T, spans, span, capacity,
    K: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    experts = tl.arange(0, BLOCK_E)
    BLOCK_J: tl.constexpr = triton.next_power_of_2(K)
    js = tl.arange(0, BLOCK_J)
    counts = tl.zeros((BLOCK_J, BLOCK_E), tl.int32)
    mass = tl.zeros((BLOCK_E,), tl.float32)
    first = tl.program_id(0) * span
    for start in range(first, tl.minimum(first + span, T), BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        z = _load_logits(logits_ptr, tokens, T, E, BLOCK_E)
        mass += tl.sum(tl.where((tokens < T)[:, None], _softmax(z), 0.0), 0)
        left = tl.broadcast(experts[None, :] < E, tokens[:, None] >= 0)[0]
        z = tl.where(z == z, z, -float("inf"))
        for j in range(K):
            best = tl.max(tl.where(left, z, -float("inf")), 1)
            at_best = left & (z == best[:, None])
            choice = tl.min(tl.where(at_best, experts[None, :], BLOCK_E), 1)  # of equal ones, the first
            chosen = experts[None, :] == choice[:, None]
            left = left & (chosen ^ True)
            ours = (chosen & (tokens < T)[:, None]).to(tl.int32)
            earlier = tl.sum(tl.where(js[:, None] == j, counts, 0), 0)
            rank = tl.sum(tl.where(chosen, tl.cumsum(ours, 0) - ours + earlier[None, :], 0), 1)
            counts += tl.where(js[:, None] == j, tl.sum(ours, 0)[None, :], 0)
            tl.store(choice_ptr + j * T + tokens, choice, mask=tokens < T)
            tl.store(rank_ptr + j * T + tokens, rank, mask=tokens < T)
    place = (js[:, None] * spans + tl.program_id(0)) * E + experts[None, :]
    tl.store(counts_ptr + place, counts, mask=(js < K)[:, None] & (experts < E)[None, :])
    tl.store(mass_ptr + tl.program_id(0) * E + experts, mass, mask=experts < E)


@triton.jit
def _count_kernel(
    counts_ptr, mass_ptr, before_ptr, taker_ptr, seed_ptr, filled_ptr, load_ptr, chosen_ptr, balance_ptr,
    T, spans, span, capacity,
    K: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr,
    RECYCLE: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    chosen = tl.zeros((BLOCK_E,), tl.int32)  # how many choose each expert
    ours = 0  # of these, the program's own expert
    for start in range(0, K * spans, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        inside = (rows < K * spans)[:, None] & (experts < E)[None, :]
        counts = tl.load(counts_ptr + rows[:, None] * E + experts[None, :], mask=inside, other=0)
        chosen += tl.sum(counts, 0)
        column = tl.sum(tl.where(experts[None, :] == expert, counts, 0), 1)
        tl.store(before_ptr + rows * E + expert, ours + tl.cumsum(column, 0) - column, mask=rows < K * spans)
        ours += tl.sum(column, 0)

    kept = tl.minimum(chosen, capacity)
    ours_kept = tl.minimum(ours, capacity)
    filled = ours_kept
    if RECYCLE:
        overflow = tl.sum(chosen - kept, 0)
        room = tl.where((experts < E) & (overflow > 0), capacity - kept, 0)
        free = tl.sum(room, 0)
        begin = tl.sum(tl.where(experts < expert, room, 0), 0)
        end = begin + tl.sum(tl.where(experts == expert, room, 0), 0)
        seed = tl.load(seed_ptr).to(tl.uint32)
        for start in range(begin, end, 256):
            places = start + tl.arange(0, 256)
            entry = _shuffle(tl.minimum(places, end - 1), free, seed, ROUNDS)
            taken = (places < end) & (entry < overflow)
            here = taken.to(tl.int32)
            tl.store(taker_ptr + entry, tl.zeros_like(entry) + expert, mask=taken)
            tl.store(taker_ptr + K * T + entry, filled + tl.cumsum(here, 0) - here, mask=taken)
            filled += tl.sum(here, 0)
    tl.store(filled_ptr + expert, filled)
    tl.store(load_ptr + expert, filled.to(tl.int64))
    tl.store(chosen_ptr + expert, ours.to(tl.int64))

    if expert == 0:
        mass = tl.zeros((BLOCK_E,), tl.float32)
        for start in range(0, spans, BLOCK_T):
            rows = start + tl.arange(0, BLOCK_T)
            inside = (rows < spans)[:, None] & (experts < E)[None, :]
            mass += tl.sum(tl.load(mass_ptr + rows[:, None] * E + experts[None, :], mask=inside, other=0.0), 0)
        tokens = tl.maximum(T, 1).to(tl.float32)
        tl.store(balance_ptr, E * tl.sum(mass / tokens * (chosen.to(tl.float32) / tokens), 0))


@triton.jit
def _place_kernel(
    logits_ptr, choice_ptr, rank_ptr, before_ptr, taker_ptr, filled_ptr,
    expert_ptr, weight_ptr, slot_ptr, load_ptr, recycled_ptr, dropped_ptr, row_ptr, offsets_ptr,
    T, spans, span, capacity,
    K: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, RECYCLE: tl.constexpr,
):  # fmt: skip
    experts = tl.arange(0, BLOCK_E)
    filled = tl.load(filled_ptr + experts, mask=experts < E, other=0)
    offsets = tl.cumsum(filled, 0) - filled
    placed = tl.sum(filled, 0)
    if tl.program_id(0) == 0:
        tl.store(offsets_ptr + experts, offsets.to(tl.int64), mask=experts < E)
        tl.store(offsets_ptr + E, placed.to(tl.int64))

    # How many entries overflowed before this span's, for each j; later, before the tile's.
    BLOCK_J: tl.constexpr = triton.next_power_of_2(K)
    js = tl.arange(0, BLOCK_J)
    place = (js[:, None] * spans + tl.program_id(0)) * E + experts[None, :]
    before = tl.load(before_ptr + place, mask=(js < K)[:, None] & (experts < E)[None, :], other=0)
    passed = tl.sum(tl.maximum(before - capacity, 0), 1)

    first = tl.program_id(0) * span
    for start in range(first, tl.minimum(first + span, T), BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        p = _softmax(_load_logits(logits_ptr, tokens, T, E, BLOCK_E))

        # Which experts each token uses: those that it stays with, then those that it is moved to.
        staying = tl.zeros((BLOCK_T, BLOCK_E), tl.int1)
        if K > 1:
            for j in range(K):
                choice, slot, over = _stay(choice_ptr, rank_ptr, before_ptr, tokens, j, T, spans, capacity, E)
                staying |= (experts[None, :] == choice[:, None]) & (over ^ True)[:, None]
        used = staying
        if K > 1 and RECYCLE:
            for j in range(K):
                choice, slot, over = _stay(choice_ptr, rank_ptr, before_ptr, tokens, j, T, spans, capacity, E)
                entry = _overflow_entry(over, passed, js, j)
                expert = tl.load(taker_ptr + entry, mask=over, other=-1)
                used |= experts[None, :] == expert[:, None]
        total = tl.sum(tl.where(used, p, 0.0), 1)
        total = tl.where(total < 1.17549435e-38, 1.17549435e-38, total)  # a NaN stays

        seen = staying
        for j in range(K):
            choice, slot, over = _stay(choice_ptr, rank_ptr, before_ptr, tokens, j, T, spans, capacity, E)
            entry = _overflow_entry(over, passed, js, j)
            expert = choice
            dropped = over
            if RECYCLE:
                expert = tl.where(over, tl.load(taker_ptr + entry, mask=over, other=0), choice)
                slot = tl.where(over, tl.load(taker_ptr + K * T + entry, mask=over, other=0), slot)
                here = experts[None, :] == expert[:, None]
                dropped = over & (tl.max((here & seen).to(tl.int32), 1) > 0)  # it uses that expert already
                seen |= here
                if K > 1:
                    tl.atomic_add(load_ptr + expert, tl.full((BLOCK_T,), -1, tl.int64), mask=dropped)
            here = experts[None, :] == expert[:, None]
            row = tl.sum(tl.where(here, offsets[None, :], 0), 1) + slot
            weight = tl.sum(tl.where(here, p, 0.0), 1)
            if K > 1:
                weight = weight / total
            if not RECYCLE:
                row = tl.where(over, placed + entry, row)
            at = tokens.to(tl.int64) * K + j
            inside = tokens < T
            tl.store(expert_ptr + at, tl.where(dropped, -1, expert).to(tl.int64), mask=inside)
            tl.store(slot_ptr + at, tl.where(dropped, -1, slot).to(tl.int64), mask=inside)
            tl.store(weight_ptr + at, tl.where(dropped, 0.0, weight), mask=inside)
            tl.store(recycled_ptr + at, over & (dropped ^ True), mask=inside)
            tl.store(dropped_ptr + at, dropped, mask=inside)
            tl.store(row_ptr + at, row.to(tl.int64), mask=inside)
            passed += tl.where(js == j, tl.sum(over.to(tl.int32), 0), 0)


@triton.jit
def _stay(choice_ptr, rank_ptr, before_ptr, tokens, j, T, spans, capacity, E: tl.constexpr):
    """The tokens' j-th choices, their places there, and which of these are beyond the capacity."""
    choice = tl.load(choice_ptr + j * T + tokens, mask=tokens < T, other=0)
    slot = tl.load(rank_ptr + j * T + tokens, mask=tokens < T, other=0)
    slot += tl.load(before_ptr + (j * spans + tl.program_id(0)) * E + choice, mask=tokens < T, other=0)
    return choice, slot, (slot >= capacity) & (tokens < T)


@triton.jit
def _overflow_entry(over, passed, js, j):
    """The number of each overflow entry among all."""
    count = over.to(tl.int32)
    return tl.sum(tl.where(js == j, passed, 0), 0) + tl.cumsum(count, 0) - count


@triton.jit
def _shuffle(i, n, seed, ROUNDS: tl.constexpr):
    """`reference.shuffle` at the places `i`."""
    for r in range(ROUNDS):
        key = (_mix(seed ^ _mix(tl.cast(2 * r, tl.uint32))) % tl.cast(n, tl.uint32)).to(tl.int32)
        salt = _mix(seed ^ _mix(tl.cast(2 * r + 1, tl.uint32)))
        other = key - i
        other = tl.where(other < 0, other + n, other)
        swap = _mix(tl.maximum(i, other).to(tl.uint32) ^ salt) >> 31
        i = tl.where(swap == 1, other, i)
    return i


@triton.jit
def _mix(x):
    """`reference._mix`: 32 unsigned bits, hashed."""
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _load_logits(logits_ptr, tokens, T, E: tl.constexpr, BLOCK_E: tl.constexpr):
    experts = tl.arange(0, BLOCK_E)[None, :]
    # Tokens past the last read the last again.
    pointers = logits_ptr + tl.minimum(tokens, T - 1).to(tl.int64)[:, None] * E + experts
    return tl.load(pointers, mask=experts < E, other=-float("inf")).to(tl.float32)


@triton.jit
def _softmax(z):
    weights = tl.exp(z - tl.max(z, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _route_backward_kernel(
    dweight_ptr, dbalance_ptr, logits_ptr, expert_ptr, weight_ptr, chosen_ptr, dlogits_ptr,
    T,
    K: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    experts = tl.arange(0, BLOCK_E)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < T
    p = _softmax(_load_logits(logits_ptr, tokens, T, E, BLOCK_E))
    u = tl.load(chosen_ptr + experts, mask=experts < E, other=0).to(tl.float32) / T
    dz = tl.load(dbalance_ptr) * E / T * p * (u[None, :] - tl.sum(p * u[None, :], 1)[:, None])

    at = tokens.to(tl.int64) * K
    shared = tl.zeros((BLOCK_T,), tl.float32)
    if K > 1:  # the same for all of a token's dw changes nothing: without the first one's, less is cancelled
        shared = tl.load(dweight_ptr + at, mask=inside, other=0.0)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for j in range(K):
        dweight = tl.load(dweight_ptr + at + j, mask=inside, other=0.0) - shared
        total += tl.load(weight_ptr + at + j, mask=inside, other=0.0) * dweight
    for j in range(K):
        expert = tl.load(expert_ptr + at + j, mask=inside, other=-1).to(tl.int32)
        flow = total
        if K > 1:
            flow = tl.load(dweight_ptr + at + j, mask=inside, other=0.0) - shared - total
            flow *= tl.load(weight_ptr + at + j, mask=inside, other=0.0)
        dz += tl.where(experts[None, :] == expert[:, None], flow[:, None], 0.0)
    if K == 1:
        dz -= total[:, None] * p
    pointers = dlogits_ptr + at[:, None] // K * E + experts[None, :]
    tl.store(pointers, dz.to(dlogits_ptr.dtype.element_ty), mask=inside[:, None] & (experts < E)[None, :])
