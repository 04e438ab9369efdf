"""Figures for claims, in one style: means with 95 % Student intervals over seeds, labels beside the curves.

Each function draws into a `Figure` of its own, or into `axes` of one made by `panels`, and returns the
figure; pyplot and its global state are never touched. `svg` turns a figure into text for an HTML page, with
colours that are CSS variables (`var(--blue, #0067a5)`), so that the page decides about light and dark.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .interval import Interval, t_interval

# Dark enough for text on white, and apart for colour-blind readers; markers and dashes differ as well.
SERIES = {
    "blue": "#0067a5",
    "orange": "#b84a00",
    "green": "#007a59",
    "purple": "#a64d86",
    "ochre": "#7a6200",
    "grey": "#5b6470",
}
INK, MUTED, RULE = "#1b1f24", "#606872", "#d5d9de"
PAGE = {**SERIES, "ink": INK, "muted": MUTED, "rule": RULE}
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", (0, (5, 1.5)), (0, (2, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (1, 1)), (0, (8, 2)))
STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and set in the page's font
}
WIDTH = 5.2  # inches: a narrow window scales the figure down, so a wider one would have smaller text


def panels(*titles: str, columns: int = 2, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    """An empty figure in the common style with one panel per title; `height` of a row of panels in inches."""
    columns = min(columns, len(titles))
    rows = math.ceil(len(titles) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
        axes = [figure.add_subplot(rows, columns, i) for i in range(1, len(titles) + 1)]
        for panel, title in zip(axes, titles, strict=True):
            panel.set_title(title)
        return figure, axes


def lines(
    x: Sequence[float],
    series: Mapping[str, Sequence],
    *,
    xlabel: str,
    ylabel: str,
    log: str = "",
    axes: Axes | None = None,
) -> Figure:
    """One curve per series: the mean over seeds with its 95 % interval as a band, named at its right end.

    Args:
        x: N positions.
        series: label to values `(seeds, N)`.
        xlabel: with the unit.
        ylabel: with the unit.
        log: the axes that are logarithmic: `"x"`, `"y"` or `"xy"`.
        axes: where to draw; a new figure by default.
    """
    axes = axes or panels("")[1][0]
    with matplotlib.rc_context(STYLE):
        axes.set(**{f"{name}scale": "log" for name in log})
        ends = {}
        for (label, values), (color, marker, dash) in zip(series.items(), _styles(), strict=False):
            band = _intervals(label, values, len(x))
            mean = [i.mean for i in band]
            axes.plot(x, mean, color=color, marker=marker if len(x) <= 20 else "", linestyle=dash, label=label)
            if band[0].n > 1:
                axes.fill_between(x, [i.low for i in band], [i.high for i in band], color=color, alpha=0.15, lw=0)
            ends[label] = (mean[-1], color)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        _set_ticks(axes, log, x)
        _label_ends(axes, ends)
    return axes.figure


def intervals(
    groups: Mapping[str, Sequence[float]],
    *,
    xlabel: str,
    threshold: float | tuple[float, float] | None = None,
    axes: Axes | None = None,
) -> Figure:
    """A row per group: its seeds as ticks, the mean and its 95 % interval as a bar, the numbers beside it.

    Args:
        groups: label to values, one per seed.
        xlabel: with the unit.
        threshold: of the criterion, drawn as a dashed line; two for a range.
        axes: where to draw; a new figure by default.
    """
    axes = axes or panels("", height=0.75 + 0.36 * len(groups))[1][0]
    with matplotlib.rc_context(STYLE):
        for bound in np.atleast_1d([] if threshold is None else threshold):
            axes.axvline(bound, color=INK, lw=1, ls=(0, (4, 2)))
        for row, values in enumerate(groups.values()):
            interval = t_interval(values)
            axes.plot(values, [row] * len(values), "|", color=MUTED, markersize=9, markeredgewidth=0.9)
            if interval.n > 1:
                axes.plot([interval.low, interval.high], [row, row], color=SERIES["blue"], lw=2.4)
            axes.plot(interval.mean, row, "o", color=SERIES["blue"], markersize=6.5)
            text = str(interval).replace("-", "−")
            axes.text(1.02, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9, color=MUTED)
        axes.set_yticks(range(len(groups)), list(groups), color=INK)
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(xlabel)
    return axes.figure


def bars(labels: Sequence[str], series: Mapping[str, Sequence], *, ylabel: str, axes: Axes | None = None) -> Figure:
    """Groups of bars: for each label one bar per series, the mean over seeds with its 95 % interval.

    Args:
        labels: N names along the x axis.
        series: label to values `(seeds, N)`.
        ylabel: with the unit.
        axes: where to draw; a new figure by default.
    """
    axes = axes or panels("")[1][0]
    with matplotlib.rc_context(STYLE):
        width = 0.8 / len(series)
        for k, ((label, values), (color, _, _)) in enumerate(zip(series.items(), _styles(), strict=False)):
            band = _intervals(label, values, len(labels))
            x = np.arange(len(labels)) + (k - (len(series) - 1) / 2) * width
            axes.bar(x, [i.mean for i in band], 0.9 * width, color=color, label=label)
            if band[0].n > 1:
                half = [(i.high - i.low) / 2 for i in band]
                axes.errorbar(x, [i.mean for i in band], half, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
        axes.axhline(0, color=MUTED, lw=0.7)
        axes.set_xticks(range(len(labels)), list(labels), color=INK)
        axes.set_ylabel(ylabel)
        if len(series) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=len(series), handlelength=1)
    return axes.figure


def heatmap(
    matrix: Sequence[Sequence[float]], *, xlabel: str, ylabel: str, label: str, axes: Axes | None = None
) -> Figure:
    """A matrix as colours: row 0 on top; blue for negative and red for positive values where there are both.

    Args:
        matrix: `(rows, columns)`.
        xlabel: of the columns.
        ylabel: of the rows.
        label: of the colour bar, with the unit.
        axes: where to draw; a new figure by default.
    """
    axes = axes or panels("", height=3.6)[1][0]
    values = np.asarray(matrix, dtype=np.float64)
    signed = values.min() < 0
    top = float(np.abs(values).max()) or 1.0
    with matplotlib.rc_context(STYLE):
        mesh = axes.pcolormesh(
            values,
            cmap="RdBu_r" if signed else "viridis",
            vmin=-top if signed else 0,
            vmax=top,
            edgecolors="face",  # or hairlines of the page show between the cells
            linewidth=0.3,
            rasterized=values.size > 2500,  # as vectors the page would grow by some 200 bytes a cell
        )
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_xticks(*_cells(values.shape[1]))
        axes.set_yticks(*_cells(values.shape[0]))
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        bar = axes.figure.colorbar(mesh, ax=axes, shrink=0.9)
        bar.set_label(label)
        bar.outline.set_visible(False)
    return axes.figure


def gallery(rows: Mapping[str, Sequence]) -> Figure:
    """A row of gray images per label, side by side.

    Args:
        rows: label to images `(N, height, width)`, 0 black to 255 white.
    """
    figure, axes = panels(*rows, columns=1, height=1.1)
    for panel, images in zip(axes, rows.values(), strict=True):
        strip = np.concatenate(np.asarray(images, dtype=np.uint8), axis=1)
        panel.imshow(strip, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        panel.set_axis_off()
    return figure


def svg(figure: Figure, *, prefix: str) -> str:
    """The figure as one `<svg>` element; its ids begin with `prefix`, so that a page can hold several."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": prefix}):  # the same figure, the same text
        figure.savefig(buffer, format="svg", metadata={"Date": None}, dpi=144)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href").replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    text = re.sub(r' id="([^"]+)"', rf' id="{prefix}-\1"', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", text)
    for name, color in PAGE.items():
        text = text.replace(color, f"var(--{name}, {color})")
    return text.strip()


def _styles():
    return zip(cycle(SERIES.values()), cycle(MARKERS), DASHES * 4, strict=False)


def _intervals(label: str, values: Sequence, length: int) -> list[Interval]:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != length:
        raise ValueError(f"series {label!r}: expected values of shape (seeds, {length}), got {table.shape}")
    return [t_interval(column) for column in table.T]


def _set_ticks(axes: Axes, log: str, x: Sequence[float]) -> None:
    """Plain numbers on logarithmic axes, and few points marked where they are."""
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if name in log:
            low, high = axis.get_view_interval()
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(4))
            axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axis.set_minor_locator(NullLocator())
    if len(x) <= 8:
        axes.set_xticks(list(x), [f"{v:g}" for v in x])


def _cells(n: int) -> tuple[np.ndarray, list[str]]:
    step = math.ceil(n / 16)
    return np.arange(0, n, step) + 0.5, [str(i) for i in range(0, n, step)]


def _label_ends(axes: Axes, ends: dict[str, tuple[float, str]]) -> None:
    """Names right of the axes at the height of each curve's end, pushed apart where they would overlap."""
    axes.figure.draw_without_rendering()  # settles limits and layout, which the heights depend on
    heights = {
        k: axes.transAxes.inverted().transform(axes.transData.transform((1, y)))[1] for k, (y, _) in ends.items()
    }
    gap = 13 / (axes.get_window_extent().height * 72 / axes.figure.dpi)  # points between baselines
    labels = sorted(heights, key=heights.__getitem__)
    for _ in range(50):
        for lower, upper in pairwise(labels):
            overlap = gap - (heights[upper] - heights[lower])
            if overlap > 0:
                heights[lower] -= overlap / 2
                heights[upper] += overlap / 2
        heights[labels[0]] = max(heights[labels[0]], 0.0)
        heights[labels[-1]] = min(heights[labels[-1]], 1.0)
    for label in labels:
        text = axes.text(1.02, heights[label], label, color=ends[label][1], transform=axes.transAxes, va="center")
        text.set_fontweight("bold")
        text.set_fontsize(9)
