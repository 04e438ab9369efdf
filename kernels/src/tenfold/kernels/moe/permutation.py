"""Tokens to the rows of their experts and back, by index: no tokens × experts × capacity tensor."""

import torch
from torch import Tensor

from ..backend import choose_backend, refuse_tangents, require_tensors
from . import cpu, reference
from .routing import Routing

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def permute_tokens(x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """The tokens as rows, grouped by expert: `rows[routing.row[t, j]] = x[t]`.

    Expert e has the rows offsets[e] … offsets[e+1]-1. There are always T·k rows: dropped ones come after the
    last group, where `grouped_matmul` gives zeros. Every row has one source, so the gradient is a sum in a
    fixed order: no atomics, and it repeats bit for bit.

    Args:
        x: `(T, H)`, any floating-point dtype that `grouped_matmul` takes.
        routing: of the same T tokens, from `route_tokens`.

    Returns:
        rows `(T·k, H)`, and offsets `(E+1,)`: `routing.offsets`.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device.

    Example:
        >>> x, routing = torch.randn(6, 4), route_tokens(torch.randn(6, 3))
        >>> rows, offsets = permute_tokens(x, routing)
        >>> rows[offsets[1] : offsets[2]].equal(x[routing.expert[:, 0] == 1])
        True
    """
    require_tensors(x=x)
    check_routing("x", x, routing, len(routing.row))
    backend = choose_backend(x)
    if backend == "reference":
        return reference.permute(x, routing.row), routing.offsets
    refuse_tangents(x=x)
    return _permute(x, routing.row, backend), routing.offsets


def unpermute_tokens(y: Tensor, routing: Routing) -> Tensor:
    """The experts' outputs back in the tokens' order, weighted: `out[t] = Σ_j weight[t, j] · y[row[t, j]]`.

    The sum over a token's experts is float32, rounded once. Rows of dropped tokens are not read, and get
    gradient 0. Differentiable in `y` and in `routing.weight`, and so in the router's logits.

    Args:
        y: `(T·k, H)`, the rows of `permute_tokens` after the experts.
        routing: from `route_tokens`.

    Returns:
        `(T, H)`, y's dtype; 0 for a token that was dropped.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device.
    """
    require_tensors(y=y)
    check_routing("y", y, routing, routing.row.numel())
    backend = choose_backend(y)
    if backend == "reference":
        return reference.unpermute(y, routing.weight, routing.row, routing.dropped)
    refuse_tangents(y=y, weight=routing.weight)
    return _unpermute(y, routing.weight, routing.row, routing.dropped, backend)


@torch.library.custom_op("tenfold::permute_tokens", mutates_args=())
def _permute(x: Tensor, row: Tensor, backend: str) -> Tensor:
    return _module(backend).permute(x, row)


@_permute.register_fake
def _(x, row, backend):
    return x.new_empty(row.numel(), x.shape[1])


@torch.library.custom_op("tenfold::permute_tokens_backward", mutates_args=())
def _permute_backward(grad: Tensor, row: Tensor, backend: str) -> Tensor:
    return _module(backend).permute_backward(grad, row)


@_permute_backward.register_fake
def _(grad, row, backend):
    return grad.new_empty(len(row), grad.shape[1])


def _save_permute(ctx, inputs, output):
    _, row, ctx.backend = inputs
    ctx.save_for_backward(row)


def _differentiate_permute(ctx, grad):
    return _permute_backward(grad, *ctx.saved_tensors, ctx.backend), None, None


_permute.register_autograd(_differentiate_permute, setup_context=_save_permute)


@torch.library.custom_op("tenfold::unpermute_tokens", mutates_args=())
def _unpermute(y: Tensor, weight: Tensor, row: Tensor, dropped: Tensor, backend: str) -> Tensor:
    return _module(backend).unpermute(y, weight, row, dropped)


@_unpermute.register_fake
def _(y, weight, row, dropped, backend):
    return y.new_empty(len(row), y.shape[1])


@torch.library.custom_op("tenfold::unpermute_tokens_backward", mutates_args=())
def _unpermute_backward(
    grad: Tensor, y: Tensor, weight: Tensor, row: Tensor, dropped: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return _module(backend).unpermute_backward(grad, y, weight, row, dropped)


@_unpermute_backward.register_fake
def _(grad, y, weight, row, dropped, backend):
    return y.new_empty(y.shape), weight.new_empty(weight.shape)


def _save_unpermute(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_unpermute(ctx, grad):
    dy, dweight = _unpermute_backward(grad, *ctx.saved_tensors, ctx.backend)
    return dy, dweight, None, None, None


_unpermute.register_autograd(_differentiate_unpermute, setup_context=_save_unpermute)


def _module(backend: str):
    if backend == "cpu":
        return cpu
    from . import triton

    return triton


def check_routing(name: str, x: Tensor, routing: Routing, rows: int) -> None:
    """That x has so many rows, a dtype of these ops, and a device that goes with the routing, and it with itself."""
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name}: dtype {x.dtype} is not supported; accepted: {', '.join(map(str, _DTYPES))}")
    if x.dim() != 2 or len(x) != rows:
        T, k = routing.row.shape
        raise ValueError(
            f"{name}: expected ({rows}, dim) to go with a routing of {T} tokens to {k}, got shape {tuple(x.shape)}"
        )
    for field in ("row", "weight", "dropped", "offsets"):
        if x.device != (device := getattr(routing, field).device):
            raise ValueError(f"{name}: is on {x.device}, the routing's {field} on {device}")
    if x.dtype == torch.float64 and choose_backend(x) == "triton":
        raise TypeError(f"{name}: float64 is not supported by the triton backend; use_backend('reference') takes it")
    if routing.weight.shape != routing.row.shape:
        expected, got = tuple(routing.row.shape), tuple(routing.weight.shape)
        raise ValueError(f"routing: expected weight of shape {expected}, got {got}")
