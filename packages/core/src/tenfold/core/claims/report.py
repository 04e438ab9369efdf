"""The report: one self-contained HTML page, made from claims.json alone."""

import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..files import write_whole
from .claim import Claim
from .interval import format_number
from .progress import duration

FORMAT = 1  # of claims.json; a change that old pages cannot be rebuilt from counts it up

MARKS = {"holds": "✓", "does not hold": "✗", "undecided": "?"}


def render(output: str | Path) -> Path:
    """Write `<output>/index.html` from `<output>/claims.json`; its path.

    Raises:
        FileNotFoundError: there is no claims.json.
        ValueError: it is damaged, or of another version.
    """
    source = Path(output) / "claims.json"
    if not source.exists():
        raise FileNotFoundError(f"output: there is no {source}; `tenfold reproduce` makes it")
    try:
        report = json.loads(source.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{source}: not a JSON file: {error}") from error
    found = report.get("format") if isinstance(report, dict) else None
    if found != FORMAT:
        raise ValueError(f"{source}: format {found!r}, this version reads {FORMAT}; `tenfold reproduce` makes it anew")
    page = Path(output) / "index.html"
    with write_whole(page) as file:
        file.write_text(to_html(report), encoding="utf-8")
    return page


def to_html(report: dict[str, Any]) -> str:
    """The page for the content of a claims.json."""
    sections = [{**s, "claims": [Claim.from_json(c) for c in s["claims"]]} for s in report["methods"]]
    claims = [claim for section in sections for claim in section["claims"]]
    counts = {verdict: sum(c.verdict == verdict for c in claims) for verdict in MARKS}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(minus=_minus, cell=_cell, duration=duration)
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        sections=sections,
        claims=claims,
        counts=counts,
        failures=sum(len(s["failures"]) for s in sections),
        measurements=[{**m, "method": s["name"]} for s in sections for m in s["measurements"]],
        marks=MARKS,
        strip=strip,
        figure=_figure,
        number=format_number,
    )


def strip(claim: Claim) -> dict[str, Any]:
    """Where things stand in the small plot of a claim, in percent of its width.

    `seeds`, `mean`, `low` and `high` (None from one seed), `bounds` of the criterion, and the span `region`
    of values that satisfy it.
    """
    interval, criterion = claim.interval, claim.criterion
    ends = [interval.low, interval.high] if interval.n > 1 else []
    bounds = [b for b in (criterion.low, criterion.high) if math.isfinite(b)]
    left, right = min(*claim.values, *ends, *bounds), max(*claim.values, *ends, *bounds)
    margin = 0.12 * (right - left) or abs(right) or 1.0

    def place(x: float) -> float:
        return round(100 * min(max((x - left + margin) / (right - left + 2 * margin), 0), 1), 2)

    return {
        "seeds": [place(x) for x in claim.values],
        "mean": place(interval.mean),
        "low": place(interval.low) if ends else None,
        "high": place(interval.high) if ends else None,
        "bounds": [(place(b), f"{b:g}") for b in bounds],
        "region": (place(criterion.low), place(criterion.high)),
    }


def _figure(claim: Claim) -> Markup:
    """The claim's figure for inline use; in HTML an `<svg>` needs no namespace."""
    return Markup(claim.figure.replace(' xmlns="http://www.w3.org/2000/svg"', ""))


def _minus(text: Any) -> str:
    """Numbers with a real minus sign; a hyphen inside a word stays."""
    return "".join(
        "−" if c == "-" and after.isdigit() and not before.isalnum() else c
        for before, c, after in zip(" " + str(text), str(text), str(text)[1:] + " ", strict=False)
    )


def _cell(value: Any) -> str:
    """A table cell: numbers to four digits, whole ones with their thousands apart."""
    if isinstance(value, bool | str):
        return _minus(value)
    return _minus(f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
