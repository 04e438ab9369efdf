"""What `tenfold fp-scaling` offers: `plan` and `fit-law`, the law's answers with a figure, and `sweep`."""

from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from tenfold.core.claims.figures import SERIES, lines, panels
from tenfold.core.files import write_whole

from .baselines import ChinchillaLaw, PrecisionLaw
from .fitting import Estimate, Law, extrapolation_error, held_out_error
from .law import COST, ScalingLaw
from .sweep import sweep
from .table import RunTable

__all__ = ["fit_law", "plan", "sweep"]

LAWS = {"floating-point law": ScalingLaw, "precision law (Kumar et al.)": PrecisionLaw, "Chinchilla": ChinchillaLaw}
WIDTHS = (4, 5, 6, 8, 16)


def plan(
    params: float | None = None,
    tokens: float | None = None,
    compute: float | None = None,
    bits: int = 8,
    block_size: float | Literal["channel"] = 128,
    law: Path | None = None,
    plot: Path = Path("plan.svg"),
) -> None:
    """What precision to train in: loss, exponent/mantissa split, critical data, best bits for the cost.

    Give the model and its data, or a budget of compute, of which the best model and data are then derived.

    Args:
        params: N, parameters beside the embeddings: 7e9.
        tokens: D, to train on: 2e12.
        compute: C = (6/16) * bits * N * D operations, instead of params and tokens; 16 bits cost 6 N D.
        bits: width of the quantized operands, the sign included.
        block_size: elements that share a scale, or `channel`.
        law: of `fit-law`, a law.json; by default the paper's constants.
        plot: where the figure goes; the ending says the kind.
    """
    chosen = ScalingLaw.paper() if law is None else ScalingLaw.load(law)
    if (compute is None) == (params is None or tokens is None) or (compute and (params or tokens)):
        raise ValueError("plan: give --params and --tokens, or --compute alone")
    if isinstance(block_size, float) and block_size <= 1:
        raise ValueError(f"block_size: must be above 1, got {block_size:g}; with a scale per element nothing is lost")
    _plot_kind(plot)
    console = Console(highlight=False)
    if compute is not None:
        best = chosen.allocate(compute, block_size=block_size)
        params = best.params
        tokens = compute / (COST * bits * params)
        console.print(f"Of {compute:g} operations the best use is {_allocation(best)}.")
        console.print(f"With {bits} bits and that model, they are enough for {short(tokens)} tokens.\n")
    _print_plan(console, chosen, params, tokens, bits, block_size)
    _save(_plan_figure(chosen, params, tokens, bits, block_size), plot)
    source = f"fitted, from {law}" if law else "the paper's (41M-679M parameters, 10-105B tokens)"
    console.print(
        f"\nThe law's constants are {source}; it is for quantized P2, P4 and P6. Figure: {plot}", soft_wrap=True
    )


def fit_law(table: Path, bootstrap: int = 200, seed: int = 0, output: Path | None = None) -> None:
    """Fit the law and its two baselines to a table of runs; writes law.json, for plan, and fit.svg.

    Args:
        table: CSV with the columns params, tokens, exponent_bits, mantissa_bits, block_size (or `channel`), loss
            and, if there are several, seed; of an unquantized run block_size is 1.
        bootstrap: resampled fits, for the 95 % intervals.
        seed: of the resampling.
        output: folder of the two files; by default the table's.
    """
    runs = RunTable.read(table)
    laws = {name: kind.fit(runs, bootstrap=bootstrap, seed=seed) for name, kind in LAWS.items()}
    output = table.parent if output is None else output
    console = Console(highlight=False)
    console.print(_constants(laws))
    console.print(_errors(laws, runs, seed))
    ours = laws["floating-point law"]
    ours.save(output / "law.json")
    _save(_fit_figure(laws, runs), output / "fit.svg")
    console.print(
        f"Of {len(runs)} runs. For plan: --law {output / 'law.json'}. Figure: {output / 'fit.svg'}", soft_wrap=True
    )


def short(number: float) -> str:
    """`7B`, `27.3T`, `340M`."""
    if not np.isfinite(number):
        return "unlimited"
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:,.3g}{unit}" if number < 1e15 else f"{number / limit:,.0f}{unit}"
    return f"{number:.3g}"


def _print_plan(console: Console, law: ScalingLaw, params: float, tokens: float, bits: int, block_size) -> None:
    at = {"params": params, "tokens": tokens, "block_size": block_size}
    split = law.best_split(bits)
    format = {"exponent_bits": split.exponent_bits, "mantissa_bits": split.mantissa_bits}
    critical = law.interval(lambda a: a.critical_tokens(params=params, block_size=block_size, **format))
    base = law.base_loss(params=params, tokens=tokens)
    budget = COST * bits * params * tokens
    scale = "one scale per channel" if block_size == "channel" else f"one scale per {block_size:g} elements"
    answers = Table(
        title=f"{short(params)} parameters, {short(tokens)} tokens, {bits} bits, {scale}", show_header=False
    )
    answers.title_justify = "left"
    for name, answer in (
        (
            "predicted loss",
            f"{_estimate(law.interval(lambda a: a.loss(**at, **format)), '.4f')} nats "
            f"({base:.4f} without quantization)",
        ),
        ("best split", f"{split.name} (exactly {split.exponent_exact:.2f} and {split.mantissa_exact:.2f} bits)"),
        (
            "critical data",
            f"{_estimate(critical, short)} tokens, {critical.value / tokens:.3g} times yours"
            + ("; with more, the loss rises" if np.isfinite(critical.value) else ""),
        ),
        ("best bits, this data", _bits(law, tokens=tokens, block_size=block_size)),
        ("best bits, this model", _bits(law, params=params, compute=budget, block_size=block_size)),
        ("best bits, this cost", f"{_bits(law, compute=budget, block_size=block_size)} with all else free"),
        ("", f"cost {budget:.3g} operations; the best use: {_allocation(law.allocate(budget, block_size=block_size))}"),
    ):
        answers.add_row(name, answer)
    console.print(answers)

    splits = Table("format", "loss", "penalty", "critical tokens", title=f"All splits of {bits} bits")
    splits.title_justify = "left"
    for E in range(bits - 1, -1, -1):
        format = {"exponent_bits": E, "mantissa_bits": bits - 1 - E}
        critical = law.critical_tokens(params=params, block_size=block_size, **format)
        cells = f"{law.loss(**at, **format):.4f}", f"{law.penalty(**at, **format):.4f}", short(critical)
        style = "bold" if split.exponent_bits == E else ""
        splits.add_row(f"e{E}m{bits - 1 - E}", *cells, style=style)
    console.print(splits)


def _bits(law: ScalingLaw, **question) -> str:
    return _estimate(law.interval(lambda a: a.best_bits(**question)), ".2f")


def _estimate(estimate: Estimate, form) -> str:
    show = form if callable(form) else lambda x: format(x, form)
    if np.isinf(estimate.low):
        return show(estimate.value)
    return f"{show(estimate.value)} [{show(estimate.low)}, {show(estimate.high)}]"


def _allocation(best) -> str:
    return f"{short(best.params)} parameters, {short(best.tokens)} tokens, {best.bits:.2f} bits (loss {best.loss:.4f})"


def _plan_figure(law: ScalingLaw, params: float, tokens: float, bits: int, block_size) -> Figure:
    splits = [law.best_split(width) for width in sorted({*WIDTHS, bits})]
    ends = [
        law.critical_tokens(
            params=params, exponent_bits=s.exponent_bits, mantissa_bits=s.mantissa_bits, block_size=block_size
        )
        for s in splits[:3]
    ]
    x = np.geomspace(tokens / 30, 3 * max([tokens, *filter(np.isfinite, ends)]), 200)
    figure, [axes] = panels(f"{short(params)} parameters", height=3.4)
    curves = {
        s.name: [
            law.loss(
                params=params,
                tokens=x,
                exponent_bits=s.exponent_bits,
                mantissa_bits=s.mantissa_bits,
                block_size=block_size,
            )
        ]
        for s in splits
    }
    lowest = law.base_loss(params=params, tokens=x[-1])
    highest = law.base_loss(params=params, tokens=x[0])
    axes.set_ylim(lowest - 0.05 * (highest - lowest), highest + 0.1 * (highest - lowest))
    lines(x / 1e12, curves, xlabel="training tokens, trillions", ylabel="predicted loss, nats", log="x", axes=axes)
    axes.axvline(tokens / 1e12, color=SERIES["grey"], lw=1, ls=(0, (4, 2)))
    return figure


def _constants(laws: dict[str, Law]) -> Table:
    table = Table("constant", *laws, title="Constants, with 95 % bootstrap intervals", title_justify="left")
    names = dict.fromkeys(name for law in laws.values() for name in law.constants())
    for name in names:
        cells = [
            str(law.interval(lambda a, name=name: getattr(a, name))) if name in law.constants() else ""
            for law in laws.values()
        ]
        table.add_row(name, *cells)
    return table


def _errors(laws: dict[str, Law], runs: RunTable, seed: int) -> Table:
    table = Table("error in nats (root mean square)", *laws, title_justify="left")
    table.title = "Predicted against measured"
    fitted = [f"{np.sqrt(np.mean((law.predict(runs) - runs.loss) ** 2)):.4g}" for law in laws.values()]
    table.add_row("fitted runs", *fitted)
    for name, error in (
        ("held out, 5 folds of configurations", held_out_error),
        ("held out, largest model", extrapolation_error),
    ):
        cells = []
        for law in laws.values():
            try:
                cells.append(str(error(type(law), runs, seed=seed)))
            except ValueError:  # too few sizes or rows to leave some out
                cells.append("not enough runs")
        table.add_row(name, *cells)
    return table


def _fit_figure(laws: dict[str, Law], runs: RunTable) -> Figure:
    figure, axes = panels(*laws, columns=3, height=2.2)
    span = runs.loss.min(), runs.loss.max()
    for panel, law in zip(axes, laws.values(), strict=True):
        panel.plot(span, span, color=SERIES["grey"], lw=0.8)
        for chosen, color in ((~runs.quantized, SERIES["grey"]), (runs.quantized, SERIES["blue"])):
            part = runs.rows(chosen)
            panel.plot(part.loss, law.predict(part), "o", color=color, markersize=3, alpha=0.6)
        panel.set(xlabel="measured loss")
    axes[0].set_ylabel("predicted loss")
    return figure


def _plot_kind(path: Path) -> None:
    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix.lstrip(".") not in kinds:
        raise ValueError(f"plot: {path} should end in .svg, .png or .pdf")


def _save(figure: Figure, path: Path) -> None:
    with write_whole(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip("."), facecolor="white", dpi=160)
