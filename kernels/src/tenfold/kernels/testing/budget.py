"""The error budget: how far an op may be from the truth, set by how far plain torch is from it.

Compute three times: `high`, the definition in float64; `low`, the definition in the working dtype; `ours`.
Then

    max|ours - high| ≤ 2 · (max|low - high| + eps · max|high|)

with eps of `ours`'s dtype, and everything finite. No tolerance is tuned per shape, so none can be loosened
quietly.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_within_budget(ours: Tensor, low: Tensor, high: Tensor, *, name: str = "result") -> None:
    """Raise AssertionError unless `ours` is about as near to `high` as `low` is, and all three are finite.

    Args:
        ours: what is tested.
        low: plain torch in the working dtype.
        high: the truth, float64.
        name: what the message calls the tensor.

    """
    if not ours.shape == low.shape == high.shape:
        raise AssertionError(
            f"{name}: shape {tuple(ours.shape)}, expected {tuple(high.shape)} (low: {tuple(low.shape)})"
        )
    if ours.numel() == 0:
        return
    ours_wide, low, high = (x.detach().to("cpu", torch.float64) for x in (ours, low, high))
    for which, x in (
        (name, ours_wide),
        (f"{name}, the reference in the working dtype", low),
        (f"{name}, high", high),
    ):
        if not x.isfinite().all():
            raise AssertionError(f"{which}: {int((~x.isfinite()).sum())} of {x.numel()} values are not finite")

    error = (ours_wide - high).abs()
    budget = 2 * ((low - high).abs().max() + torch.finfo(ours.dtype).eps * high.abs().max())
    if error.max() > budget:
        worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{name}: off by {error.max():.3g} at {worst} "
            f"({ours_wide[worst]:.6g}, expected {high[worst]:.6g}); "
            f"the budget is {budget:.3g}, exceeded by {int((error > budget).sum())} of {error.numel()} values"
        )


def assert_same_bits(ours: Tensor, truth: Tensor, *, name: str = "result") -> None:
    """Raise AssertionError unless both have the same bits: zeros their sign too. One NaN is as good as another."""
    if ours.shape != truth.shape or ours.dtype != truth.dtype:
        raise AssertionError(f"{name}: {ours.dtype} {tuple(ours.shape)}, expected {truth.dtype} {tuple(truth.shape)}")
    ours, truth = ours.detach().cpu(), truth.detach().cpu()
    same = (ours == truth) & (ours.signbit() == truth.signbit()) | (ours.isnan() & truth.isnan())
    if not same.all():
        worst = tuple(int(i) for i in (~same).nonzero()[0])
        raise AssertionError(
            f"{name}: {int((~same).sum())} of {same.numel()} differ; the first, at {worst}, "
            f"is {ours[worst]:.9g}, expected {truth[worst]:.9g}"
        )


def check_op(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    tensors: dict[str, Tensor],
    *,
    grads: Sequence[str] = (),
    **kwargs: object,
) -> None:
    """Hold `op`'s output, and its gradient for each tensor named in `grads`, to the error budget.

    Both functions are called as `f(**tensors, **kwargs)`; the reference once with the tensors as they are and
    once with the floating-point ones in float64. One random gradient of the output serves all three.
    """
    if unknown := set(grads) - set(tensors):
        raise ValueError(f"grads: {', '.join(sorted(unknown))} not among the tensors: {', '.join(tensors)}")
    wide = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    low_out, low_leaves = _run(reference, tensors, grads, kwargs)
    high_out, high_leaves = _run(reference, wide, grads, kwargs)
    out, leaves = _run(op, tensors, grads, kwargs)
    assert_within_budget(out, low_out, high_out, name="output")
    if not grads:
        return

    # Rounded to the narrowest dtype once, so that all three see the same numbers.
    generator = torch.Generator(out.device).manual_seed(0)
    grad = torch.randn(out.shape, generator=generator, device=out.device).to(low_out.dtype).to(out.dtype)
    ours, low, high = (
        torch.autograd.grad(y, x, grad.to(y.dtype))
        for y, x in ((out, leaves), (low_out, low_leaves), (high_out, high_leaves))
    )
    for name, *three in zip(grads, ours, low, high, strict=True):
        assert_within_budget(*three, name=f"gradient of {name}")


def _run(
    f: Callable[..., Tensor], tensors: dict[str, Tensor], grads: Sequence[str], kwargs: dict[str, object]
) -> tuple[Tensor, list[Tensor]]:
    """The output of `f`, and the leaves that were in place of the tensors named in `grads`."""
    leaves = {name: t.detach().requires_grad_(name in grads) for name, t in tensors.items()}
    return f(**leaves, **kwargs), [leaves[name] for name in grads]
