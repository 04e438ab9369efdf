"""Tokens through their experts and back, in one call."""

import torch
from torch import Tensor

from ..backend import autocast, choose_backend, refuse_tangents, require_tensors
from . import compiled, cpu
from .matmul import check_grouped
from .permutation import check_routing, permute_tokens, unpermute_tokens
from .routing import Routing
from .swiglu import check_shapes, grouped_swiglu


def expert_swiglu(x: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
    """Send every token through the SwiGLU feed-forwards of its experts, and add up what comes back, weighted.

        out[t] = Σ_j weight[t, j] · W_down,e (silu(W_gate,e x[t]) ⊙ W_up,e x[t]),   e = routing.expert[t, j]

    What `permute_tokens`, `grouped_swiglu` and `unpermute_tokens` compute one after the other, and, where gradients are
    wanted, how it is done. Without gradients no rows need be in memory between these. On a CPU there are none where our
    own program computes it (`tenfold.kernels.native` says where): in float32, with contiguous weights whose K, I and N
    are multiples of 16. Then what a token gets depends, to the bit, on no other token and not on the threads; the sum
    over its experts goes by their numbers.

    Args:
        x: `(T, K)`, float32, bfloat16, float16, or float64 (not on the triton backend).
        gate_up: `(E, 2·I, K)`, x's dtype, W_gate above W_up, as transformers stores experts.
        down: `(E, N, I)`, likewise.
        routing: of the same T tokens to E experts, from `route_tokens`.

    Returns:
        `(T, N)`, x's dtype; 0 for a token that was dropped. Differentiable in x, the weights and routing.weight.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device.

    Example:
        >>> x, gate_up, down = torch.randn(6, 4), torch.randn(3, 2 * 8, 4), torch.randn(3, 4, 8)
        >>> expert_swiglu(x, gate_up, down, route_tokens(torch.randn(6, 3))).shape
        torch.Size([6, 4])
    """
    require_tensors(x=x, gate_up=gate_up, down=down)
    x, gate_up, down = autocast(x, gate_up, down)
    weight, row, dropped, offsets = routing.weight, routing.row, routing.dropped, routing.offsets
    check_routing("x", x, routing, len(row))
    check_grouped(x, offsets, gate_up=gate_up, down=down)
    check_shapes(x, gate_up, down)
    if offsets.shape != (len(gate_up) + 1,):
        expected, got = f"({len(gate_up) + 1},)", tuple(offsets.shape)
        raise ValueError(f"routing: expected offsets of shape {expected} to go with gate_up, got {got}")
    backend = choose_backend(x)
    tensors = {"x": x, "gate_up": gate_up, "down": down, "weight": weight}
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values())
    if wanted or backend == "reference":
        rows, offsets = permute_tokens(x, routing)
        return unpermute_tokens(grouped_swiglu(rows, gate_up, down, offsets), routing)
    refuse_tangents(**tensors)
    return _forward(x, gate_up, down, weight, row, dropped, offsets, backend)


@torch.library.custom_op("tenfold::expert_swiglu", mutates_args=())
def _forward(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weight: Tensor,
    row: Tensor,
    dropped: Tensor,
    offsets: Tensor,
    backend: str,
) -> Tensor:
    if backend == "cpu" and compiled.suits(x, gate_up, down):
        return compiled.expert_swiglu(x, gate_up, down, weight, row, dropped, offsets)
    if backend == "cpu":
        module = cpu
    else:
        from . import triton as module
    rows, _ = module.grouped_swiglu(module.permute(x, row), gate_up, down, offsets, False)
    return module.unpermute(rows, weight, row, dropped)


@_forward.register_fake
def _(x, gate_up, down, weight, row, dropped, offsets, backend):
    return x.new_empty(len(x), down.shape[1])
