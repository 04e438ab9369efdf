"""Scaling of mixtures of experts: the paper's law (arXiv 2411.02265, section 2.3.1), and yours, fitted to your runs.

N is activated parameters, D tokens, C floating-point operations of a training:

    C = 9.59·N·D + 2.3e8·D,    C_min = C / (1 + B/B_crit),    N_opt = 5.9e-3·C_min^0.5305,    D_opt = 3.2·C_min^0.50

The paper does not derive 9.59 and 2.3e8; they belong to its models and context length. For dense models with short
contexts the usual 6·N·D takes their place; `flops_per_token` counts it for a configuration of this package.
"""

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

PER_PARAMETER, PER_TOKEN = 9.59, 2.3e8
SAME_BUDGET = 0.1  # relative difference of compute up to which runs belong to one budget
FAR = 3.0  # from the middle of the sizes to a minimum, at most, in units of their range (of logarithms)


class Estimate(NamedTuple):
    """A fitted number and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


class PowerLaw(NamedTuple):
    """`factor · C^exponent`."""

    factor: float
    exponent: float

    def __call__(self, compute: float) -> float:
        """The law's value."""
        return self.factor * compute**self.exponent

    def inverse(self, value: float) -> float:
        """The compute at which the law gives `value`."""
        return (value / self.factor) ** (1 / self.exponent)


PAPERS_PARAMS, PAPERS_TOKENS = PowerLaw(5.9e-3, 0.5305), PowerLaw(3.2, 0.50)


def training_flops(
    params: float, tokens: float, *, per_parameter: float = PER_PARAMETER, per_token: float = PER_TOKEN
) -> float:
    """Operations of a training on `tokens` with `params` activated parameters, by the paper's formula."""
    _positive(params=params, tokens=tokens)
    return (per_parameter * params + per_token) * tokens


def minimal_compute(compute: float, batch_ratio: float) -> float:
    """The least compute that reaches the same loss, in small batches: C/(1 + B/B_crit).

    Args:
        compute: C.
        batch_ratio: B/B_crit; 0 for batches far below the critical one.
    """
    _positive(compute=compute)
    if not 0 <= batch_ratio < math.inf:
        raise ValueError(f"batch_ratio: must be finite and not negative, got {batch_ratio}")
    return compute / (1 + batch_ratio)


@dataclass(frozen=True)
class Parabola:
    """An isoFLOP curve: loss = curvature·(log x - log x*)² + least, over params or tokens."""

    compute: float
    best: float
    least: float
    curvature: float
    low: float  # of the measured range
    high: float

    @property
    def inside(self) -> bool:
        """Whether the minimum lies within what was measured."""
        return self.low <= self.best <= self.high

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The loss of models, or data, of these sizes."""
        return self.curvature * (np.log(x) - math.log(self.best)) ** 2 + self.least


@dataclass(frozen=True)
class IsoFlopFit:
    """The minima of isoFLOP curves and the power laws through them.

    Args:
        params: N_opt(C).
        tokens: D_opt(C).
        params_exponent: with its interval.
        tokens_exponent: with its interval.
        curves: over params, one per budget, the smallest first.
        token_curves: over tokens.
        runs: what was fitted: compute (of its budget), params, tokens, loss.
    """

    params: PowerLaw
    tokens: PowerLaw
    params_exponent: Estimate
    tokens_exponent: Estimate
    curves: tuple[Parabola, ...]
    token_curves: tuple[Parabola, ...]
    runs: np.ndarray


def fit_isoflops(
    runs: str | Path | Iterable[Mapping[str, float]],
    *,
    per_parameter: float = PER_PARAMETER,
    per_token: float = PER_TOKEN,
    bootstrap: int = 200,
    seed: int = 0,
) -> IsoFlopFit:
    """Fit a parabola in log N, and one in log D, to each budget's losses, and power laws through their minima.

    Runs whose compute agrees within 10 % make one budget; several seeds of one size all count.

    Args:
        runs: a CSV file or rows with the columns params, tokens, loss and, if it is known better than by the formula,
            compute.
        per_parameter: operations per activated parameter and token.
        per_token: operations per token beside them.
        bootstrap: resampled fits, over the runs of each budget, for the intervals.
        seed: of the resampling.

    Raises:
        ValueError: a bad cell, fewer than two budgets, a budget with fewer than three sizes, or one whose losses do not
            rise on both sides of a least one in reach.
        FileNotFoundError: no such file.
    """
    table = _read(runs, per_parameter, per_token)
    groups = _budgets(table)
    if len(groups) < 2:
        raise ValueError(f"runs: a power law needs at least two budgets of compute, got {len(groups)}")
    for group in groups:
        if len(np.unique(group[:, 1])) < 3 or len(np.unique(group[:, 2])) < 3:
            raise ValueError(
                f"runs: the budget of {group[0, 0]:.3g} operations has fewer than three sizes; a parabola needs them"
            )
    curves, token_curves = ([_parabola(g, column) for g in groups] for column in (1, 2))
    params, tokens = _power_law(curves), _power_law(token_curves)
    rng, exponents = np.random.default_rng(seed), []
    for _ in range(bootstrap):
        try:
            drawn = [_resampled(g, rng) for g in groups]
            exponents.append([_power_law([_parabola(g, c) for g in drawn]).exponent for c in (1, 2)])
        except ValueError:
            continue  # a draw whose curve has no minimum
    ends = np.quantile(exponents, (0.025, 0.975), axis=0).T if exponents else [(-math.inf, math.inf)] * 2
    estimates = [Estimate(law.exponent, *map(float, e)) for law, e in zip((params, tokens), ends, strict=True)]
    return IsoFlopFit(params, tokens, *estimates, tuple(curves), tuple(token_curves), np.concatenate(groups))


def _read(source: str | Path | Iterable[Mapping[str, float]], per_parameter: float, per_token: float) -> np.ndarray:
    """Columns compute, params, tokens, loss."""
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"runs: there is no file {path}")
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin a file with a mark
                table = csv.DictReader(file, skipinitialspace=True)
                table.fieldnames = [name.strip() for name in table.fieldnames or ()]
                source = list(table)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"runs: {path} is not a CSV file: {error}") from error
    rows = []
    for i, row in enumerate(source, 1):
        values = [_number(i, name, row) for name in ("params", "tokens", "loss")]
        given = row.get("compute") not in (None, "")
        compute = _number(i, "compute", row) if given else (per_parameter * values[0] + per_token) * values[1]
        rows.append([compute, *values])
    if not rows:
        raise ValueError("runs: there are no rows")
    return np.array(rows)


def _number(row: int, name: str, cells: Mapping[str, object]) -> float:
    if name not in cells:
        found = ", ".join(map(str, cells))
        raise ValueError(f"runs: there is no column {name!r}; needed are params, tokens and loss, found {found}")
    try:
        value = float(cells[name])
    except (TypeError, ValueError):
        raise ValueError(f"runs: row {row}: {name}: expected a number, got {cells[name]!r}") from None
    if not 0 < value < math.inf:
        raise ValueError(f"runs: row {row}: {name}: must be positive and finite, got {value:g}")
    return value


def _budgets(table: np.ndarray) -> list[np.ndarray]:
    """The rows by budget, ascending, each with the budget's mean compute in place of its own."""
    table = table[table[:, 0].argsort(kind="stable")]
    groups, start = [], 0
    for i in range(1, len(table) + 1):
        if i == len(table) or table[i, 0] > (1 + SAME_BUDGET) * table[start, 0]:
            group = table[start:i].copy()
            group[:, 0] = np.exp(np.log(group[:, 0]).mean())
            groups.append(group)
            start = i
    return groups


def _parabola(group: np.ndarray, column: int) -> Parabola:
    x, loss = np.log(group[:, column]), group[:, 3]
    center = x.mean()
    a, b, c = np.polyfit(x - center, loss, 2)
    if not a > 0 or abs(b / (2 * a)) > FAR * np.ptp(x):
        raise ValueError(
            f"runs: the losses at {group[0, 0]:.3g} operations do not rise on both sides of a least one: no minimum"
        )
    best = center - b / (2 * a)
    best, low, high = (float(np.exp(point)) for point in (best, x.min(), x.max()))
    return Parabola(float(group[0, 0]), best, float(c - b * b / (4 * a)), float(a), low, high)


def _power_law(curves: list[Parabola]) -> PowerLaw:
    compute, best = (np.log([getattr(c, name) for c in curves]) for name in ("compute", "best"))
    center = compute.mean()  # the factor lies far from the data: fitted around their middle
    slope, level = np.polyfit(compute - center, best, 1)
    return PowerLaw(float(np.exp(level - slope * center)), float(slope))


def _resampled(group: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    drawn = group[rng.integers(len(group), size=len(group))]
    if len(np.unique(drawn[:, 1])) < 3:
        raise ValueError("too few sizes")
    return drawn


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: must be positive, got {value}")
