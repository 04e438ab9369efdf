"""A claim: one sentence of a paper turned into a measurement, with a verdict that is computed."""

import math
import re
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from .interval import Interval, t_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Verdict = Literal["holds", "does not hold", "undecided"]
Cell = str | int | float


@dataclass(frozen=True)
class Criterion:
    """Where the whole interval must lie; stated before the run with `below`, `above` or `within`."""

    low: float
    high: float

    def __post_init__(self):
        if math.isnan(self.low) or math.isnan(self.high) or not self.low < self.high:
            raise ValueError(f"criterion: expected finite bounds, the low one first, got {self.low} and {self.high}")
        if math.isinf(self.low) and math.isinf(self.high):
            raise ValueError("criterion: at least one bound must be finite")

    def satisfied_by(self, interval: Interval) -> bool:
        """Whether every point of the interval is in the region."""
        points = (interval.low, interval.high)
        return all(math.isfinite(x) and not self._under(x) and not self._over(x) for x in points)

    def violated_by(self, interval: Interval) -> bool:
        """Whether no point of the interval is in the region."""
        return self._under(interval.high) or self._over(interval.low)

    # `below` and `above` are strict, so that no difference at all is no gain; `within` includes its bounds.
    def _under(self, x: float) -> bool:
        return x <= self.low if math.isinf(self.high) else x < self.low

    def _over(self, x: float) -> bool:
        return x >= self.high if math.isinf(self.low) else x > self.high

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f"interval entirely below {self.high:g}"
        if math.isinf(self.high):
            return f"interval entirely above {self.low:g}"
        return f"interval entirely within {self.low:g} to {self.high:g}"

    def to_json(self) -> dict[str, Any]:
        """`{"below": x}`, `{"above": x}` or `{"within": [low, high]}`."""
        if math.isinf(self.low):
            return {"below": self.high}
        return {"above": self.low} if math.isinf(self.high) else {"within": [self.low, self.high]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Criterion":
        """The inverse of `to_json`."""
        ((kind, bound),) = data.items()
        if kind == "within":
            return within(*bound)
        return {"below": below, "above": above}[kind](bound)


def below(bound: float) -> Criterion:
    """The claim holds if the whole interval lies below `bound`."""
    return Criterion(-math.inf, float(bound))


def above(bound: float) -> Criterion:
    """The claim holds if the whole interval lies above `bound`."""
    return Criterion(float(bound), math.inf)


def within(low: float, high: float) -> Criterion:
    """The claim holds if the whole interval lies within [`low`, `high`]."""
    if math.isinf(low) or math.isinf(high):
        raise ValueError(f"criterion: expected finite bounds, got {low} and {high}; use below or above")
    return Criterion(float(low), float(high))


@dataclass(kw_only=True)
class Claim:
    """One sentence of a paper as a measurement: what was claimed, what was measured, and what follows.

    Args:
        name: a short one that stays: `lm-loss-0.8M-600`; letters, digits, `.`, `_` and `-`.
        statement: the paper's sentence as a measurable one.
        paper: the paper's own value and where it stands.
        criterion: `below`, `above` or `within`, written down before the run.
        values: one per seed; usually the paired difference to the baseline with the same seed.
        unit: of the values: `bits per byte`.
        baseline: what it is compared with, and what was kept equal.
        notes: what a reader must know to weigh the result; a blank line starts a new paragraph.
        table: rows for the report, each a mapping from the same columns to text or numbers.
        figure: drawn with `tenfold.core.claims.figures`; kept as SVG text.
        caption: of the figure; also what a screen reader says of it.

    Raises:
        ValueError, TypeError: naming the claim: a bad name, a value that is not finite, an uneven table.
    """

    name: str
    statement: str
    paper: str
    criterion: Criterion
    values: list[float]
    unit: str
    baseline: str
    notes: str = ""
    table: list[dict[str, Cell]] | tuple[()] = ()
    figure: "Figure | str | None" = None
    caption: str = ""
    interval: Interval = field(init=False)

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"claim {self.name!r}: name: expected letters, digits, '.', '_' and '-'")
        try:
            self.values = [float(x) for x in self.values]
            self.interval = t_interval(self.values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"claim {self.name!r}: {error}") from error
        self.table = [{str(column): self._cell(cell) for column, cell in row.items()} for row in self.table]
        if any(list(row) != list(self.table[0]) for row in self.table):
            raise ValueError(f"claim {self.name!r}: table: all rows must have the columns {list(self.table[0])}")
        if self.figure is not None and not isinstance(self.figure, str):
            from .figures import svg  # matplotlib only where there is something drawn

            self.figure = svg(self.figure, prefix=self.name)

    def _cell(self, cell: Any) -> Cell:
        cell = cell.item() if hasattr(cell, "item") else str(cell) if isinstance(cell, Interval) else cell
        if not isinstance(cell, Cell):
            raise TypeError(f"claim {self.name!r}: table: expected text or numbers, got {type(cell).__name__}")
        if isinstance(cell, float) and not math.isfinite(cell):
            raise ValueError(f"claim {self.name!r}: table: numbers must be finite, got {cell}")
        return cell

    @property
    def holds(self) -> bool:
        """Whether the whole interval satisfies the criterion."""
        return self.criterion.satisfied_by(self.interval)

    @property
    def verdict(self) -> Verdict:
        """`does not hold` if the whole interval violates the criterion, `undecided` if it straddles it."""
        if self.holds:
            return "holds"
        return "does not hold" if self.criterion.violated_by(self.interval) else "undecided"

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values, with the computed mean, interval (null from one seed) and verdict."""
        bounds = None if self.interval.n == 1 else [self.interval.low, self.interval.high]
        return {
            **{name: getattr(self, name) for name in _FIELDS},
            "criterion": self.criterion.to_json(),
            "mean": self.interval.mean,
            "interval": bounds,
            "verdict": self.verdict,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Claim":
        """The inverse of `to_json`; the mean, interval and verdict are computed anew."""
        missing = [name for name in _FIELDS if name not in data]
        if missing:
            raise ValueError(f"claim {data.get('name')!r}: missing {', '.join(missing)}")
        return cls(**{**{name: data[name] for name in _FIELDS}, "criterion": Criterion.from_json(data["criterion"])})


_FIELDS = tuple(f.name for f in fields(Claim) if f.init)
