"""Which experts a token goes to, and with what weight: top-k, under a capacity, with recycling."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import choose_backend, refuse_tangents, require_tensors
from . import reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Routing(NamedTuple):
    """Where `route_tokens` sends T tokens, k experts each; what is dropped has expert and slot -1."""

    expert: Tensor  # (T, k) int64
    weight: Tensor  # (T, k) with which the expert's output counts; 0 where dropped; differentiable
    slot: Tensor  # (T, k) int64, the place among the expert's tokens
    load: Tensor  # (E,) int64, tokens of each expert
    recycled: Tensor  # (T, k) bool: at another expert than the chosen one, which was full
    dropped: Tensor  # (T, k) bool
    balance_loss: Tensor  # scalar, differentiable
    row: Tensor  # (T, k) int64: the row of `permute_tokens`; a permutation of 0…T·k-1
    offsets: Tensor  # (E+1,) int64: expert e has the rows offsets[e]…offsets[e+1]-1


def route_tokens(
    logits: Tensor,
    top_k: int = 1,
    capacity: int | None = None,
    *,
    recycle: bool = True,
    generator: torch.Generator | None = None,
) -> Routing:
    """Send every token to `top_k` experts, and to random others with room where its choice is full.

    With p_t = softmax(logits_t), in float32:

    * A token chooses its `top_k` experts with the largest logits; of equal ones, the first.
    * At most `capacity` tokens stay with an expert: the first that come, in the order of the tokens, all
      first choices before any second one. So a kept token does not depend on later ones for top_k = 1.
    * Tokens beyond it overflow. With `recycle` (Hunyuan-Large, arXiv 2411.02265, section 2.2.3) they take free
      places of other experts: a random draw without replacement in which every free place is equally
      likely, so that an expert's share goes by its room. Without `recycle` they are dropped.
    * weight = p_t,e of the expert that is used, also when that was not the choice. For top_k > 1 it is
      divided by the sum over the token's experts; for top_k = 1 it never is. Its gradient reaches the logits.
    * balance_loss = E · Σ_e mean_t(p_t,e) · mean_t(e among the choices), from the choices before any is
      moved or dropped: `top_k` when all is even, E when all first choices and all mass are on one expert.
      Only the first mean has a gradient.

    Which token, expert and place the paper leaves open; the draw and the weights are those of the released
    code, which keeps arbitrary tokens in place of the first. For top_k = 1 every token is placed, and no
    expert has more than `capacity`. For top_k > 1 a recycled place may be at an expert that the token uses
    already: then that one of its `top_k` is dropped (the place stays empty: a row that no expert's output is
    read from), and the others remain, always at least one.

    `capacity=None` is dropless: the tokens of a sequence do not depend on the rest of the batch, as
    inference needs. The draw is made of integers alone: one seed from `generator`, then a hash. The same seed
    gives the same routing on every device and backend, wherever the logits are the same.

    Args:
        logits: `(T, E)`, float32, bfloat16, float16, or float64 (not on the triton backend). -inf rules an
            expert out of the choices, not out of recycling, where it gives weight 0.
        top_k: experts per token, 1 to E.
        capacity: most tokens of an expert, at least 1; None for no limit.
        recycle: whether tokens beyond the capacity are moved, or dropped. It needs room for all:
            E · capacity ≥ T · top_k.
        generator: of the draw; None for torch's default one of the CPU, and inside `torch.compile`, which takes
            no generators. One on the CPU is drawn from without a wait for the device. Nothing is drawn when
            nothing can overflow: without a capacity, or without recycling. Activation checkpointing restores
            the default generator when it computes again, no other. Data-parallel processes should have
            generators, or seeds, of their own.

    Returns:
        `Routing`. weight and balance_loss are float32; float64 for float64 logits.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, `top_k` or `capacity`, before anything is computed; on
            the CPU, also logits without a softmax (NaN, inf, or only -inf). On CUDA and ROCm, where looking
            would make the host wait for the device, such a token is routed somewhere, like any other, and
            its weight and the balance loss are NaN.

    Example:
        >>> routing = route_tokens(torch.randn(128, 16), capacity=10)
        >>> int(routing.load.sum()), int(routing.load.max()) <= 10, bool(routing.dropped.any())
        (128, True, False)
    """
    require_tensors(logits=logits)
    _check(logits, top_k, capacity, recycle)
    backend = choose_backend(logits)
    if backend == "triton" and logits.dtype == torch.float64:
        raise TypeError("logits: float64 is not supported by the triton backend; use_backend('reference') takes it")
    seed = None
    if recycle and capacity is not None:
        device = "cpu" if generator is None else generator.device
        seed = torch.randint(2**32, (1,), generator=generator, device=device)
    # More than T tokens no expert can be given.
    limit = len(logits) if capacity is None else min(capacity, len(logits))
    if backend == "reference" and not logits.is_meta:  # plain torch, with torch's own autograd; it counts
        outputs = reference.route_tokens(logits, top_k, limit, recycle, seed)
    else:
        refuse_tangents(logits=logits)
        outputs = _forward(logits, seed, top_k, limit, recycle, backend)
    weight, balance_loss, expert, slot, load, recycled, dropped, row, offsets, _ = outputs
    return Routing(expert, weight, slot, load, recycled, dropped, balance_loss, row, offsets)


@torch.library.custom_op("tenfold::route_tokens", mutates_args=())
def _forward(
    logits: Tensor, seed: Tensor | None, top_k: int, capacity: int, recycle: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a `Routing` holds, those with gradients first, and how many choose each expert, `(E,)` int64."""
    if backend == "cpu":
        return reference.route_tokens(logits, top_k, capacity, recycle, seed)
    from . import triton_routing

    return triton_routing.route_tokens(logits, top_k, capacity, recycle, seed)


@_forward.register_fake
def _(logits, seed, top_k, capacity, recycle, backend):
    (T, E), wide = logits.shape, torch.promote_types(logits.dtype, torch.float32)

    def tensor(*shape, dtype=torch.int64):
        return logits.new_empty(shape, dtype=dtype)

    return (
        *(tensor(T, top_k, dtype=wide), tensor(dtype=wide), tensor(T, top_k), tensor(T, top_k), tensor(E)),
        *(tensor(T, top_k, dtype=torch.bool), tensor(T, top_k, dtype=torch.bool)),
        *(tensor(T, top_k), tensor(E + 1), tensor(E)),
    )


@torch.library.custom_op("tenfold::route_tokens_backward", mutates_args=())
def _backward(
    dweight: Tensor, dbalance: Tensor, logits: Tensor, expert: Tensor, weight: Tensor, chosen: Tensor, backend: str
) -> Tensor:
    if backend == "cpu":
        return reference.route_tokens_backward(dweight, dbalance, logits, expert, weight, chosen)
    from . import triton_routing

    return triton_routing.route_tokens_backward(dweight, dbalance, logits, expert, weight, chosen)


@_backward.register_fake
def _(dweight, dbalance, logits, expert, weight, chosen, backend):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save(ctx, inputs, output):
    logits, *_, ctx.backend = inputs
    weight, _, expert, slot, load, recycled, dropped, row, offsets, chosen = output
    ctx.mark_non_differentiable(expert, slot, load, recycled, dropped, row, offsets, chosen)
    ctx.save_for_backward(logits, expert, weight, chosen)


def _differentiate(ctx, dweight, dbalance, *_):
    return _backward(dweight, dbalance, *ctx.saved_tensors, ctx.backend), None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _check(logits: Tensor, top_k: int, capacity: int | None, recycle: bool) -> None:
    if logits.dtype not in _DTYPES:
        raise TypeError(f"logits: dtype {logits.dtype} is not supported; accepted: {', '.join(map(str, _DTYPES))}")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: expected (tokens, experts), got shape {tuple(logits.shape)}")
    T, E = logits.shape
    if not 1 <= top_k <= E:
        raise ValueError(f"top_k: must be from 1 to the number of experts, {E}, got {top_k}")
    if capacity is None:
        return
    if capacity < 1:
        raise ValueError(f"capacity: must be at least 1, or None for no limit, got {capacity}")
    if recycle and E * capacity < T * top_k:
        raise ValueError(
            f"capacity: {E} experts with room for {capacity} each cannot take {T} tokens × top_k {top_k}; "
            f"accepted with recycle: at least {-(-T * top_k // E)}"
        )
