"""Log-probabilities of tokens under a language model's head, without the matrix of all their scores."""

import torch
from torch import Tensor

from ..backend import autocast, choose_backend, refuse_tangents, require_tensors
from . import cpu, reference

__all__ = ["linear_logprob"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """The log-probability of each row's target token under `softmax(hidden @ weightᵀ + bias)`.

    For row i and vocabulary entries v, with t_i the target:

        z_iv   = h_i · w_v + b_v
        logp_i = z_i,t_i - log Σ_v exp(z_iv)

    so `-logp.mean()` is the cross entropy, `logp.sum()` a sequence's log-likelihood, and the difference of
    two models' a preference reward. Rows whose target is `ignore_index` take no part: result 0, gradient 0,
    whatever they hold, NaN included. Forward and backward never hold an N×V matrix; the backward computes the
    scores again. Scores, softmax and sums are float32 also for half-precision inputs.

    Args:
        hidden: `(…, D)`, float32, bfloat16, float16, or float64 (not on the triton backend).
        weight: `(V, D)`, hidden's dtype.
        target: `(…)`, int64, each from 0 to V-1 or `ignore_index`.
        bias: `(V,)`, hidden's dtype; -inf rules a token out.
        ignore_index: the target of rows that take no part; it may be one of the vocabulary (padding, say).

    Returns:
        `(…)`, float32; float64 for float64 inputs. In nats.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device, and on the CPU a target out of range, before
            anything is computed. On CUDA and ROCm, where reading the targets would make the host wait for the
            device, a row whose target is out of range gives NaN instead, in the result and in the gradients.
        NotImplementedError: forward-mode differentiation; there is no second derivative either.

    Example:
        >>> hidden, weight = torch.randn(2, 128, 64), torch.randn(32000, 64)
        >>> target = torch.randint(32000, (2, 128))
        >>> linear_logprob(hidden, weight, target).shape
        torch.Size([2, 128])
    """
    require_tensors(hidden=hidden, weight=weight, target=target)
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {ignore_index!r}")
    if bias is None:
        hidden, weight = autocast(hidden, weight)
    else:
        require_tensors(bias=bias)
        hidden, weight, bias = autocast(hidden, weight, bias)
    _check(hidden, weight, target, bias)
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)

    backend = choose_backend(hidden)
    if backend == "reference":  # plain torch, with torch's own autograd
        if target.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_range(targets, len(weight), ignore_index)
        logp = reference.linear_logprob(rows, weight, targets, bias, ignore_index)
    elif backend == "triton" and hidden.dtype == torch.float64:
        raise TypeError("hidden: float64 is not supported by the triton backend; use_backend('reference') takes it")
    else:
        refuse_tangents(hidden=hidden, weight=weight)
        logp, _ = _forward(rows, weight, targets, bias, ignore_index, backend)
    return logp.reshape(target.shape)


@torch.library.custom_op("tenfold::linear_logprob", mutates_args=())
def _forward(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor]:
    """The log-probabilities, and what the same backend's backward needs of the rows: the CPU's `(2, N)`."""
    if backend == "cpu":
        _check_range(target, len(weight), ignore_index)
        return cpu.forward(hidden, weight, target, bias, ignore_index)
    from . import triton

    return triton.forward(hidden, weight, target, bias, ignore_index), hidden.new_empty(2, 0, dtype=torch.float32)


@_forward.register_fake
def _(hidden, weight, target, bias, ignore_index, backend):
    wide, rows = torch.promote_types(hidden.dtype, torch.float32), hidden.shape[0]
    return hidden.new_empty(rows, dtype=wide), hidden.new_empty(2, rows if backend == "cpu" else 0, dtype=wide)


@torch.library.custom_op("tenfold::linear_logprob_backward", mutates_args=())
def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    stats: Tensor,
    ignore_index: int,
    needed: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; an empty tensor in place of one that is not `needed`."""
    if backend == "cpu":
        grads = cpu.backward(grad, hidden, weight, target, bias, stats, ignore_index, needed)
    else:
        from . import triton

        grads = triton.backward(grad, hidden, weight, target, bias, ignore_index, needed)
    return tuple(hidden.new_empty(0) if g is None else g for g in grads)


@_backward.register_fake
def _(grad, hidden, weight, target, bias, stats, ignore_index, needed, backend):
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(hidden.new_empty(shape if n else (0,)) for shape, n in zip(shapes, needed, strict=True))


def _save(ctx, inputs, output):
    hidden, weight, target, bias, ctx.ignore_index, ctx.backend = inputs
    _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(hidden, weight, target, bias, stats)


def _differentiate(ctx, grad_logp, grad_stats):
    hidden, weight, target, bias, stats = ctx.saved_tensors
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    grads = _backward(grad_logp, hidden, weight, target, bias, stats, ctx.ignore_index, needed, ctx.backend)
    dhidden, dweight, dbias = (g if n else None for g, n in zip(grads, needed, strict=True))
    return dhidden, dweight, None, dbias, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _check(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    floats = [("hidden", hidden), ("weight", weight)] + ([] if bias is None else [("bias", bias)])
    for name, x in floats:
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name}: dtype {x.dtype} is not supported; accepted: {', '.join(map(str, _DTYPES))}")
        if x.dtype != hidden.dtype:
            raise TypeError(f"{name}: dtype {x.dtype} differs from hidden's {hidden.dtype}")
    if target.dtype != torch.int64:
        raise TypeError(f"target: expected int64, got {target.dtype}")
    for name, x in (*floats[1:], ("target", target)):
        if x.device != hidden.device:
            raise ValueError(f"{name}: is on {x.device}, hidden on {hidden.device}")
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden: expected (..., dim) with dim at least 1, got shape {tuple(hidden.shape)}")
    D = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != D or weight.shape[0] == 0:
        raise ValueError(f"weight: expected (vocabulary, {D}) to go with hidden, got shape {tuple(weight.shape)}")
    if target.shape != hidden.shape[:-1]:
        expected = tuple(hidden.shape[:-1])
        raise ValueError(f"target: expected {expected} to go with hidden, got shape {tuple(target.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected ({len(weight)},) to go with weight, got shape {tuple(bias.shape)}")


def _check_range(target: Tensor, vocabulary: int, ignore_index: int) -> None:
    wrong = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"target: {int(target[first])}, at position {first} of {len(target)}, is no token; "
            f"accepted: 0 to {vocabulary - 1}, or ignore_index, {ignore_index}"
        )
