"""Fitting scaling laws to tables of runs: one robust objective, many starts, and the bootstrap, for every law."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from scipy.optimize import least_squares, nnls

from tenfold.core.files import write_whole

from .table import RunTable

HUBER = 1e-3  # of the log loss, as Hoffmann et al. (2022) fit theirs
STARTS = 8  # refined, of all on the grid


class Estimate(NamedTuple):
    """A quantity of a fitted law and the 95 % interval that the bootstrap gives it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Four digits each: `0.2368 [0.2301, 0.2440]`."""
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True, kw_only=True)
class Law:
    """A loss as a sum of power terms: Σ c_j · f_j(run; exponents), all c_j ≥ 0.

    Being linear in the c_j, it is fitted from many starts at little cost: for each of a grid of exponents the
    best c_j are a non-negative least-squares problem; the best of these starts are refined over everything.

    `bootstrap` holds the laws fitted to resampled tables; `interval` turns them into intervals of anything.
    """

    bootstrap: tuple[Self, ...] = field(default=(), repr=False, compare=False)
    grid: ClassVar[dict[str, tuple[float, ...]]]  # exponents: the starts
    terms: ClassVar[tuple[str, ...]]  # names of the coefficients

    @classmethod
    def features(cls, table: RunTable, **exponents: float) -> np.ndarray:
        """`f_j` of every run, `(rows, terms)`."""
        raise NotImplementedError

    @classmethod
    def from_fit(cls, exponents: dict[str, float], coefficients: dict[str, float]) -> Self:
        """The law of these; where a coefficient is written otherwise than as a factor, overridden."""
        return cls(**exponents, **coefficients)

    def predict(self, table: RunTable) -> np.ndarray:
        """The loss of every run in nats."""
        raise NotImplementedError

    @classmethod
    def free(cls, table: RunTable) -> dict[str, tuple[float, ...]]:
        """The exponents that this table can tell, with their starts; refuse a table that cannot."""
        _needs(table, "params", 2)
        _needs(table, "tokens", 2)
        return cls.grid

    @classmethod
    def fit(cls, table: Any, *, bootstrap: int = 200, seed: int = 0) -> Self:
        """Fit to `table`, whatever `RunTable.read` takes.

        Minimizes Σ Huber(log L̂ - log L), threshold 1e-3, from many starts. The bootstrap draws rows with
        replacement; rows that share seed, model and data are drawn together, because they share their noise.

        Args:
            table: the runs.
            bootstrap: resampled fits for the intervals; 0 for none.
            seed: of the resampling.

        Raises:
            ValueError: a bad cell, fewer rows than twice the law's constants, or a size, budget or format that
                never varies and whose exponent the table therefore cannot tell.
        """
        table = RunTable.read(table)
        constants = len(cls.free(table)) + len(cls.terms)
        if len(table) < 2 * constants:
            raise ValueError(
                f"table: {len(table)} rows are too few for the {constants} constants of {cls.__name__}; "
                f"at least {2 * constants} are needed"
            )
        if bootstrap < 0:
            raise ValueError(f"bootstrap: must not be negative, got {bootstrap}")
        best = min((_refine(cls, table, x) for x in _starts(cls, table)), key=lambda found: found[0])[1]
        law = _law(cls, table, best)
        laws = []
        for resampled in _resamples(table, bootstrap, np.random.default_rng(seed)):
            try:
                cls.free(resampled)
            except ValueError:
                continue  # a draw without one of the sizes says nothing about its exponent
            laws.append(_law(cls, table, _refine(cls, resampled, best, names=list(cls.free(table)))[1]))
        return replace(law, bootstrap=tuple(laws))

    def constants(self) -> dict[str, float]:
        """The law's constants by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "bootstrap"}

    def interval(self, quantity: Callable[[Self], float]) -> Estimate:
        """`quantity(law)` with its 95 % percentile interval over the bootstrap; infinite without one."""
        value = float(quantity(self))
        if not self.bootstrap:
            return Estimate(value, -math.inf, math.inf)
        values = [float(quantity(law)) for law in self.bootstrap]
        return Estimate(value, *(float(x) for x in np.quantile(values, (0.025, 0.975))))

    def save(self, path: str | Path) -> None:
        """Write the constants, those of the bootstrap too, as JSON; the file is there whole or not at all."""
        content = {
            "law": type(self).__name__,
            "constants": self.constants(),
            "bootstrap": [law.constants() for law in self.bootstrap],
        }
        with write_whole(Path(path)) as file:
            file.write_text(json.dumps(content, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The inverse of `save`.

        Raises:
            ValueError: not a file of such a law.
            FileNotFoundError: no such file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"law: there is no file {path}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["law"] != cls.__name__:
                raise ValueError(f"holds a {content['law']}, expected a {cls.__name__}")
            law = cls(**_finite(content["constants"]))
            return replace(law, bootstrap=tuple(cls(**_finite(c)) for c in content["bootstrap"]))
        except (ValueError, TypeError, KeyError, UnicodeDecodeError) as error:
            raise ValueError(f"law: {path} is not a law that fit-law wrote: {error}") from error


def held_out_error(kind: type[Law], table: Any, *, folds: int = 5, seed: int = 0) -> Estimate:
    """Root mean square error in nats on configurations that the fit did not see, by cross-validation.

    All seeds of a configuration lie in one fold. The interval is a bootstrap over configurations.

    Raises:
        ValueError: fewer configurations than folds, or a fold without which the law cannot be fitted.
    """
    table = RunTable.read(table)
    configuration = table.configurations()
    count = int(configuration.max()) + 1
    if count < folds:
        raise ValueError(f"folds: {folds}, but the table has {count} configurations")
    rng = np.random.default_rng(seed)
    fold = (rng.permutation(count) % folds)[configuration]
    squares = np.empty(len(table))
    for k in range(folds):
        law = kind.fit(table.rows(fold != k), bootstrap=0)
        squares[fold == k] = (law.predict(table.rows(fold == k)) - table.loss[fold == k]) ** 2
    return rms(squares, configuration, rng)


def extrapolation_error(kind: type[Law], table: Any, *, seed: int = 0) -> Estimate:
    """Root mean square error in nats on the largest model's runs, of the law fitted to the smaller ones.

    Raises:
        ValueError: a table without three sizes.
    """
    table = RunTable.read(table)
    _needs(table, "params", 3)
    largest = table.params == table.params.max()
    law = kind.fit(table.rows(~largest), bootstrap=0)
    test = table.rows(largest)
    return rms((law.predict(test) - test.loss) ** 2, test.configurations(), np.random.default_rng(seed))


def rms(squares: np.ndarray, cluster: np.ndarray, rng: np.random.Generator) -> Estimate:
    """√mean of `squares`, with a 95 % bootstrap interval over clusters."""
    names = np.unique(cluster)
    totals = np.array([[squares[cluster == c].sum(), (cluster == c).sum()] for c in names])
    draws = totals[rng.integers(len(names), size=(1000, len(names)))].sum(axis=1)
    low, high = np.quantile(np.sqrt(draws[:, 0] / draws[:, 1]), (0.025, 0.975))
    return Estimate(float(np.sqrt(squares.mean())), float(low), float(high))


def _needs(table: RunTable, column: str, least: int) -> None:
    values = np.unique(getattr(table, column))
    if len(values) < least:
        held = ", ".join(f"{value:g}" for value in values)
        raise ValueError(f"table: {column}: at least {least} different values are needed, there is only {held}")


def _starts(kind: type[Law], table: RunTable) -> list[np.ndarray]:
    """The best points of the grid, each with its non-negative least-squares coefficients."""
    found = []
    for exponents in product(*kind.free(table).values()):
        matrix = kind.features(table, **dict(zip(kind.free(table), exponents, strict=True)))
        scale = np.abs(matrix).max(axis=0)
        # Rows over the loss: relative errors, as the objective has them.
        coefficients, residual = nnls(matrix / scale / table.loss[:, None], np.ones(len(table)))
        coefficients = np.maximum(coefficients, 1e-6) / scale
        found.append((residual, np.concatenate([exponents, np.log(coefficients)])))
    return [x for _, x in sorted(found, key=lambda pair: pair[0])[:STARTS]]


def _refine(
    kind: type[Law], table: RunTable, start: np.ndarray, names: list[str] | None = None
) -> tuple[float, np.ndarray]:
    """Exponents and log coefficients at the minimum of the robust objective near `start`."""
    names = names or list(kind.free(table))
    target = np.log(table.loss)

    def residuals(x: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):  # a step too far is refused for its large residuals
            matrix = kind.features(table, **dict(zip(names, x[: len(names)], strict=True)))
            predicted = matrix @ np.exp(x[len(names) :])
            return np.nan_to_num(np.log(predicted) - target, nan=1e3, posinf=1e3, neginf=-1e3)

    lowest = np.where(np.arange(len(start)) < len(names), 0.0, -np.inf)  # exponents are not negative
    options = {"loss": "huber", "f_scale": HUBER, "x_scale": "jac", "max_nfev": 400}
    found = least_squares(residuals, np.maximum(start, lowest + 1e-6), bounds=(lowest, np.inf), **options)
    return found.cost, found.x


def _law(kind: type[Law], table: RunTable, x: np.ndarray) -> Law:
    names = list(kind.free(table))
    exponents = dict(zip(names, map(float, x), strict=False))
    coefficients = dict(zip(kind.terms, map(float, np.exp(x[len(names) :])), strict=True))
    return kind.from_fit(exponents, coefficients)


def _resamples(table: RunTable, count: int, rng: np.random.Generator) -> Iterator[RunTable]:
    groups = [np.flatnonzero(table.group == g) for g in np.unique(table.group)]
    for _ in range(count):
        drawn = rng.integers(len(groups), size=len(groups))
        yield table.rows(np.concatenate([groups[g] for g in drawn]))


def _finite(constants: dict[str, float]) -> dict[str, float]:
    for name, value in constants.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return constants
