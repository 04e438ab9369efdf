"""One matrix product per expert, over the rows of that expert."""

import torch
from torch import Tensor

from ..backend import autocast, choose_backend, refuse_tangents, require_tensors
from . import cpu, reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def grouped_matmul(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each group of rows with its own matrix: `out[r] = x[r] @ weight[e]`, offsets[e] ≤ r < offsets[e+1].

    Groups may be of any size, 0 included. Rows after the last group, where `permute_tokens` puts what was
    dropped, take no part: result 0, gradient 0, whatever they hold. Products are summed in float32 also for
    half-precision inputs; float32 products follow `torch.set_float32_matmul_precision` on a GPU. No host sync
    on a GPU, and neither pass uses atomics: results repeat bit for bit.
    Gradients are torch.autograd's; torch.func's derivatives (grad, jacrev, jvp) are for `use_backend("reference")`.

    Args:
        x: `(P, K)`, rows grouped by expert, float32, bfloat16, float16, or float64 (not on the triton backend).
        weight: `(E, K, N)`, x's dtype, in any memory layout: for weights stored as `(E, N, K)`, like those of
            `torch.nn.Linear`, pass `weight.transpose(1, 2)`; no copy is made.
        offsets: `(E+1,)`, int64 or int32: 0 first, never falling, at most P.

    Returns:
        `(P, N)`, x's dtype.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device, and on the CPU wrong offsets, before anything is
            computed. On CUDA and ROCm, where reading the offsets would make the host wait for the device,
            they are cut to 0…P, and a group that ends before it begins is empty.

    Example:
        >>> x, weight = torch.randn(10, 4), torch.randn(3, 4, 5)
        >>> out = grouped_matmul(x, weight, torch.tensor([0, 6, 6, 10]))  # 6, 0 and 4 rows
        >>> torch.allclose(out[6:], x[6:] @ weight[2])
        True
    """
    require_tensors(x=x, weight=weight, offsets=offsets)
    x, weight = autocast(x, weight)
    _check(x, weight, offsets)
    backend = choose_backend(x)
    if backend == "reference" and not x.is_meta:  # plain torch, with torch's own autograd; it reads the offsets
        return reference.grouped_matmul(x, weight, offsets)
    if backend == "triton" and x.dtype == torch.float64:
        raise TypeError("x: float64 is not supported by the triton backend; use_backend('reference') takes it")
    refuse_tangents(x=x, weight=weight)
    return _forward(x, weight, offsets, backend)


@torch.library.custom_op("tenfold::grouped_matmul", mutates_args=())
def _forward(x: Tensor, weight: Tensor, offsets: Tensor, backend: str) -> Tensor:
    if backend == "cpu":
        return cpu.grouped_matmul(x, weight, offsets)
    from . import triton

    return triton.grouped_matmul(x, weight, offsets)


@_forward.register_fake
def _(x, weight, offsets, backend):
    return x.new_empty(len(x), weight.shape[2])


@torch.library.custom_op("tenfold::grouped_matmul_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, needed: list[bool], backend: str
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; an empty tensor in place of one that is not `needed`."""
    if backend == "cpu":
        grads = cpu.grouped_matmul_backward(grad, x, weight, offsets, needed)
    else:
        from . import triton

        grads = triton.grouped_matmul_backward(grad, x, weight, offsets, needed)
    return tuple(x.new_empty(0) if g is None else g for g in grads)


@_backward.register_fake
def _(grad, x, weight, offsets, needed, backend):
    dweight = torch.empty_like(weight) if needed[1] else weight.new_empty(0)
    return x.new_empty(x.shape if needed[0] else (0,)), dweight


def _save(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    needed = list(ctx.needs_input_grad[:2])
    dx, dweight = _backward(grad, *ctx.saved_tensors, needed, ctx.backend)
    return dx if needed[0] else None, dweight if needed[1] else None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def check_grouped(x: Tensor, offsets: Tensor, **weights: Tensor) -> None:
    """That x is rows, and that the dtypes and devices of offsets and weights, by name, go with it."""
    for name, tensor in {"x": x, **weights}.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: dtype {tensor.dtype} is not supported; accepted: {', '.join(map(str, _DTYPES))}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name}: dtype {tensor.dtype} differs from x's {x.dtype}")
    if offsets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"offsets: expected int64 or int32, got {offsets.dtype}")
    for name, tensor in {**weights, "offsets": offsets}.items():
        if tensor.device != x.device:
            raise ValueError(f"{name}: is on {tensor.device}, x on {x.device}")
    if x.dim() != 2:
        raise ValueError(f"x: expected (rows, dim), got shape {tuple(x.shape)}")


def check_offsets(offsets: Tensor, name: str, weight: Tensor) -> None:
    """That there is one more than the weight has matrices."""
    if offsets.shape != (len(weight) + 1,):
        raise ValueError(f"offsets: expected ({len(weight) + 1},) to go with {name}, got shape {tuple(offsets.shape)}")


def _check(x: Tensor, weight: Tensor, offsets: Tensor) -> None:
    check_grouped(x, offsets, weight=weight)
    if weight.dim() != 3 or weight.shape[1] != x.shape[1] or 0 in weight.shape:
        expected = f"(experts, {x.shape[1]}, dim)"
        raise ValueError(f"weight: expected {expected} to go with x, got shape {tuple(weight.shape)}")
    check_offsets(offsets, "weight", weight)
