"""Means over seeds, with their intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit


@dataclass(frozen=True)
class Interval:
    """A mean over `n` seeds and its 95 % confidence interval; from one seed the interval is infinite."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """The mean with two digits of uncertainty: `-0.0289 [-0.0403, -0.0175]`."""
        if self.n == 1:
            return f"{self.mean:.4g} (one seed)"
        return "{} [{}, {}]".format(*(format_number(x, self.high - self.low) for x in (self.mean, self.low, self.high)))


def t_interval(values: Sequence[float]) -> Interval:
    """The mean m of n independent values and its 95 % Student interval m ± t(0.975, n-1) · s/√n.

    s is the sample standard deviation. One value says nothing about the spread: its interval is (-inf, inf).

    Raises:
        ValueError: no value, or one that is not finite.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"values: expected one number per seed, at least one, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"values: must be finite, got {x.tolist()}")
    mean, n = float(x.mean()), x.size
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = float(stdtrit(n - 1, 0.975) * x.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def format_number(x: float, spread: float) -> str:
    """`x` to two digits of half the `spread`, the width of its interval; four digits where there is none."""
    size = max(abs(x), spread)
    if spread <= 0 or size >= 1e7 or size < 1e-4:
        return f"{x:.4g}"
    x += 0.0  # no -0
    decimals = max(0, 1 - math.floor(math.log10(spread / 2)))
    return f"{x:,.{decimals}f}" if decimals <= 8 else f"{x:.4g}"
