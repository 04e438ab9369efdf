"""How a fitted scaling law is drawn."""

from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from tenfold.core.claims.figures import SERIES, panels

from .law import PAPERS_PARAMS, PAPERS_TOKENS, IsoFlopFit


def isoflop_figure(fit: IsoFlopFit, *, ylabel: str = "loss") -> Figure:
    """Losses and parabolas by budget, and the power laws through their minima beside the paper's."""
    figure, (curves, laws) = panels("Loss at equal compute", "Minima")
    for color, curve in zip(cycle(SERIES.values()), fit.curves, strict=False):
        points = fit.runs[fit.runs[:, 0] == curve.compute]
        x = np.geomspace(min(curve.low, curve.best), max(curve.high, curve.best), 50)
        curves.plot(points[:, 1], points[:, 3], "o", color=color, ms=3)
        curves.plot(x, curve(x), color=color, lw=1)
        curves.plot(curve.best, curve.least, "x", color=color)
        _label(curves, f"{curve.compute:.2g}".replace("e+", "e"), curve.best, curve.least, -14, color)
    curves.margins(y=0.18)  # room for the lowest label
    curves.set(xscale="log", xlabel="activated parameters", ylabel=ylabel)
    _plain_ticks(curves.xaxis)
    compute = np.array([c.compute for c in fit.curves])
    line = np.geomspace(compute.min(), compute.max(), 2)
    for color, name, points, law, papers in (
        (SERIES["blue"], "parameters", fit.curves, fit.params, PAPERS_PARAMS),
        (SERIES["orange"], "tokens", fit.token_curves, fit.tokens, PAPERS_TOKENS),
    ):
        laws.plot(compute, [p.best for p in points], "o", color=color, ms=3)
        laws.plot(line, law(line), color=color, lw=1)
        laws.plot(line, papers(line), color=color, lw=1, ls=":")
        middle = float(np.sqrt(line.prod()))
        _label(laws, name, middle, law(middle), -14, color)
    laws.set(xscale="log", yscale="log", xlabel="operations", ylabel="optimum (dotted: the paper's)")
    laws.margins(y=0.1)
    _plain_ticks(laws.yaxis)
    laws.xaxis.set_minor_locator(NullLocator())
    shown = np.unique(compute[[0, len(compute) // 2, -1]])
    laws.set_xticks(shown, [f"{c:.2g}".replace("e+", "e") for c in shown])
    return figure


def short(x: float) -> str:
    """`58.1B`, `5.64T`, `490K`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if x >= size:
            return f"{x / size:.3g}{unit}"
    return f"{x:.3g}"


def _label(axes: Axes, text: str, x: float, y: float, above: float, color: str) -> None:
    axes.annotate(text, (x, y), (0, above), textcoords="offset points", ha="center", color=color, fontsize=8)


def _plain_ticks(axis: Axis) -> None:
    """`20K` in place of 2 × 10⁴."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    axis.set_minor_locator(NullLocator())
