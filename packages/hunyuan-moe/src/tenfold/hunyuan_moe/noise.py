"""The gradient noise scale, by which a batch is small or large (arXiv 1812.06162, "critical batch size")."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tenfold.core.claims import t_interval


class NoiseBatch(NamedTuple):
    """A measured noise scale, in the unit of the batch sizes, and its 95 % jackknife interval.

    Infinite where the gradient could not be told from noise.
    """

    value: float
    low: float
    high: float
    noise: float  # tr Σ, of a batch of one
    gradient: float  # |G|²

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def noise_batch(
    loss: Callable[[Any], Tensor],
    parameters: Iterable[Tensor],
    batches: Iterable[Any],
    *,
    batch_size: float,
    groups: int = 8,
) -> NoiseBatch:
    """Estimate the simple noise scale, the batch at which the noise of the gradient is as large as the gradient.

        B_simple = tr(Σ) / |G|²

    G is the expected gradient and Σ the covariance of one item's (arXiv 1812.06162, section 2.2). With the gradients
    g_i of n batches of b items and their mean ḡ, both are estimated without bias (appendix A.1, b and n·b items):

        |G|² ≈ (n·|ḡ|² - mean|g_i|²) / (n - 1),    tr(Σ) ≈ b·n/(n - 1) · (mean|g_i|² - |ḡ|²)

    The batches are taken one after the other; kept are `groups` sums of gradients. The interval is the jackknife's over
    these groups, for |G|²/tr(Σ), whose denominator is the certain one, turned over.

    Measure it in the middle of a training, at fixed weights: it grows as the loss falls. It belongs to plain gradient
    descent. The B_noise of `optimal_lr` and `expert_lr_ratio` is fitted for Adam-like optimizers (arXiv 2405.14578),
    which divide by the gradient's own size, and is not the same number: take B/B_simple for its order of magnitude.

    Args:
        loss: mean loss of a batch, as in training; its random numbers are restored afterwards.
        parameters: to differentiate by; `.grad` is left alone.
        batches: of equal size and independent, such as shuffled training batches; at least two to a group is wise.
        batch_size: b, of each, in the unit that the answer shall have. Tokens of one sequence are not independent; a
            result in tokens is the one in sequences times their length.
        groups: over which the jackknife goes; memory for so many gradients is needed.

    Raises:
        ValueError: fewer batches than groups, fewer than three groups, no parameters, or a gradient that is not finite.

    Example:
        >>> module.train()
        >>> noise = noise_batch(lambda b: -module(b["tokens"]).mean(), module.parameters(), batches, batch_size=8)
        >>> expert_lr_ratio(x=8 / noise.value, experts=16)
    """
    if not 0 < batch_size < math.inf:
        raise ValueError(f"batch_size: must be positive, got {batch_size}")
    if groups < 3:
        raise ValueError(f"groups: an interval needs at least 3, got {groups}")
    weights = [p for p in parameters if p.requires_grad]
    if not weights:
        raise ValueError("parameters: none of them requires a gradient")
    sums = [p.new_zeros((groups, p.numel()), dtype=torch.float32) for p in weights]
    squares, counts = weights[0].new_zeros(groups, dtype=torch.float64), torch.zeros(groups, dtype=torch.float64)
    with torch.random.fork_rng(sorted({p.device.index for p in weights if p.is_cuda})):
        for i, batch in enumerate(batches):
            gradients = torch.autograd.grad(loss(batch), weights, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:  # None: an expert without tokens
                    total[i % groups] += gradient.flatten()
                    squares[i % groups] += gradient.double().square().sum()
            counts[i % groups] += 1
    if counts.min() < 1:
        raise ValueError(f"batches: {groups} groups need at least as many, got {int(counts.sum())}")
    squares, products = squares.cpu(), sum((s.double() @ s.double().T).cpu() for s in sums)
    if not (squares.isfinite().all() and products.isfinite().all()):
        raise ValueError("loss: a gradient is not finite")

    def estimate(kept: list[int]) -> tuple[float, float]:
        n = float(counts[kept].sum())
        mean_square, square_mean = float(squares[kept].sum()) / n, float(products[kept][:, kept].sum()) / n**2
        return batch_size * n / (n - 1) * (mean_square - square_mean), (n * square_mean - mean_square) / (n - 1)

    everything = list(range(groups))
    noise, gradient = estimate(everything)
    pseudo_values = []
    for group in everything:
        rest = estimate([k for k in everything if k != group])
        if not (noise > 0 and rest[0] > 0):
            raise ValueError("batches: their gradients are all the same; there is no noise to measure")
        pseudo_values.append(groups * gradient / noise - (groups - 1) * rest[1] / rest[0])
    inverse = t_interval(pseudo_values)
    value, low, high = (1 / x if x > 0 else math.inf for x in (inverse.mean, inverse.high, inverse.low))
    return NoiseBatch(value, low, high, noise, gradient)
