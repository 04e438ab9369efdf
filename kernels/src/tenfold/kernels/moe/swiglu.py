"""The feed-forward of every expert, over the rows of that expert, as one op."""

import torch
from torch import Tensor

from ..backend import autocast, choose_backend, refuse_tangents, require_tensors
from . import cpu, reference
from .matmul import check_grouped, check_offsets


def grouped_swiglu(x: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor) -> Tensor:
    """Send each group of rows through its own SwiGLU feed-forward (Shazeer, arXiv 2002.05202).

    For row r of group e, offsets[e] ≤ r < offsets[e+1], where gate_up[e] holds W_gate above W_up:

        out[r] = W_down (silu(W_gate x[r]) ⊙ W_up x[r]),   silu(z) = z·sigmoid(z)

    What two `grouped_matmul` and an activation between them compute, but the activation is part of the first product:
    without gradients the 2·I numbers of a row are never in memory together. With gradients they are kept, and nothing
    else: the activation is computed again from them. Products are summed and the activation is computed in float32
    also for half-precision inputs. Rows after the last group take no part, groups may be empty, and results repeat
    bit for bit, as in `grouped_matmul`.
    Gradients are torch.autograd's; torch.func's derivatives (grad, jacrev, jvp) are for `use_backend("reference")`.

    Args:
        x: `(P, K)`, rows grouped by expert, float32, bfloat16, float16, or float64 (not on the triton backend).
        gate_up: `(E, 2·I, K)`, x's dtype, in any memory layout: as transformers stores experts, and as
            `torch.nn.Linear` stores a weight.
        down: `(E, N, I)`, likewise.
        offsets: `(E+1,)`, int64 or int32: 0 first, never falling, at most P.

    Returns:
        `(P, N)`, x's dtype.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or, on the CPU, wrong offsets, as in `grouped_matmul`.

    Example:
        >>> gate_up, down = torch.randn(3, 2 * 8, 4), torch.randn(3, 4, 8)
        >>> grouped_swiglu(torch.randn(10, 4), gate_up, down, torch.tensor([0, 6, 6, 10])).shape
        torch.Size([10, 4])
    """
    require_tensors(x=x, gate_up=gate_up, down=down, offsets=offsets)
    x, gate_up, down = autocast(x, gate_up, down)
    check_grouped(x, offsets, gate_up=gate_up, down=down)
    check_shapes(x, gate_up, down)
    check_offsets(offsets, "gate_up", gate_up)
    backend = choose_backend(x)
    if backend == "reference" and not x.is_meta:  # plain torch, with torch's own autograd; it reads the offsets
        return reference.grouped_swiglu(x, gate_up, down, offsets)
    if backend == "triton" and x.dtype == torch.float64:
        raise TypeError("x: float64 is not supported by the triton backend; use_backend('reference') takes it")
    refuse_tangents(x=x, gate_up=gate_up, down=down)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, gate_up, down))
    return _forward(x, gate_up, down, offsets, keep, backend)[0]


@torch.library.custom_op("tenfold::grouped_swiglu", mutates_args=())
def _forward(
    x: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor, keep: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """The result, and what the activation was applied to, `(P, 2·I)`, where it is to be kept."""
    out, hidden = _module(backend).grouped_swiglu(x, gate_up, down, offsets, keep)
    return out, x.new_empty(0) if hidden is None else hidden


@_forward.register_fake
def _(x, gate_up, down, offsets, keep, backend):
    return x.new_empty(len(x), down.shape[1]), x.new_empty((len(x), gate_up.shape[1]) if keep else (0,))


@torch.library.custom_op("tenfold::grouped_swiglu_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    offsets: Tensor,
    hidden: Tensor,
    needed: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up and down; an empty tensor in place of one that is not `needed`."""
    grads = _module(backend).grouped_swiglu_backward(grad, x, gate_up, down, offsets, hidden, needed)
    return tuple(x.new_empty(0) if g is None else g for g in grads)


@_backward.register_fake
def _(grad, x, gate_up, down, offsets, hidden, needed, backend):
    return tuple(
        torch.empty_like(like) if need else x.new_empty(0)
        for like, need in zip((x.contiguous(), gate_up, down), needed, strict=True)
    )


def _save(ctx, inputs, output):
    *tensors, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad, _):
    needed = list(ctx.needs_input_grad[:3])
    grads = _backward(grad, *ctx.saved_tensors, needed, ctx.backend)
    return *(g if need else None for g, need in zip(grads, needed, strict=True)), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _module(backend: str):
    if backend == "cpu":
        return cpu
    from . import triton

    return triton


def check_shapes(x: Tensor, gate_up: Tensor, down: Tensor) -> None:
    """That the weights are those of feed-forwards of x."""
    E, inner, K = gate_up.shape if gate_up.dim() == 3 else (0, 0, 0)
    if 0 in (E, inner, K) or inner % 2 or x.shape[1] != K:
        expected = f"(experts, 2·inner, {x.shape[1]})"
        raise ValueError(f"gate_up: expected {expected} to go with x, got shape {tuple(gate_up.shape)}")
    if down.dim() != 3 or down.shape[0] != E or down.shape[2] != inner // 2 or down.shape[1] == 0:
        expected = f"({E}, dim, {inner // 2})"
        raise ValueError(f"down: expected {expected} to go with gate_up, got shape {tuple(down.shape)}")
