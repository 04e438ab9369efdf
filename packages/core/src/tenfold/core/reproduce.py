"""`tenfold reproduce`: the claims of methods, measured, and the report."""

import json
import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .claims import SEEDS, Budget, Claim, Run, render
from .claims.progress import RunProgress
from .claims.report import FORMAT
from .environment import environment, required
from .files import write_whole
from .methods import Method


class ReproduceError(RuntimeError):
    """Some claims could not be measured; the report holds the others."""


def reproduce(
    methods: Sequence[Method],
    *,
    budget: Budget = "default",
    seeds: int | None = None,
    output: str | Path = "runs/report",
) -> Path:
    """Measure every claim of `methods` and write `<output>/index.html` and `<output>/claims.json`.

    Measurements are kept in `<output>/measurements`: an interrupted run goes on where it stopped.

    Args:
        methods: with their `claims`: functions that take a `Run` and return claims.
        budget: `quick`, `default` or `full`; what it means in steps and sizes is each method's to say.
        seeds: how many; by default `SEEDS[budget]`.
        output: the report's folder.

    Returns:
        The page's path.

    Raises:
        ValueError, OSError: a bad argument, or an output folder that cannot be written, found at once.
        ReproduceError: some claims functions failed. The report names them and holds the others' claims.
    """
    if budget not in get_args(Budget):
        raise ValueError(f"budget: unknown {budget!r}; accepted: {', '.join(get_args(Budget))}")
    seeds = SEEDS[budget] if seeds is None else seeds
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    output = _writable(Path(output))
    start = time.perf_counter()
    sections = []
    with RunProgress() as progress:
        for method in methods:
            folder = output / "measurements" / method.name
            run = Run(method.package, folder, budget=budget, seeds=range(seeds), progress=progress)
            sections.append(_measure(method, run, progress))
    ours = ["tenfold-kernels", "tenfold-core", *(m.package.replace(".", "-").replace("_", "-") for m in methods)]
    libraries = sorted(set().union(*(required(m.package) for m in methods)))
    report = {
        "format": FORMAT,
        "budget": budget,
        "seeds": list(range(seeds)),
        "seconds": time.perf_counter() - start,
        "environment": environment([*ours, *libraries]),
        "methods": sections,
    }
    with write_whole(output / "claims.json") as file:
        file.write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
    page = render(output)
    _print(sections, page)
    failures = [f"{s['name']}: {f['function']}: {f['error']}" for s in sections for f in s["failures"]]
    if failures:
        raise ReproduceError(f"not all claims could be measured ({'; '.join(failures)}); the report is {page}")
    return page


def _measure(method: Method, run: Run, progress: RunProgress) -> dict[str, Any]:
    """One method's section of claims.json. What goes wrong in one claims function does not stop the next."""
    claims: dict[str, Claim] = {}
    failures = []
    for i, function in enumerate(method.claims, 1):
        progress.begin(f"{method.name}  {function.__name__} ({i} of {len(method.claims)})")
        try:
            for claim in function(run):
                if claim.name in claims:
                    raise ValueError(f"claim {claim.name!r}: the name is taken")
                claims[claim.name] = claim
        except Exception as error:
            progress.say(traceback.format_exc())
            failures.append({"function": function.__name__, "error": f"{type(error).__name__}: {error}"})
        except (KeyboardInterrupt, SystemExit):  # Lightning turns the one into the other
            progress.say(f"interrupted; {len(run.log)} measurements kept in {run.folder}; run it again to go on")
            raise
        finally:
            progress.end()
    return {
        "name": method.name,
        "title": method.title,
        "paper": method.paper,
        "claims": [claim.to_json() for claim in claims.values()],
        "failures": failures,
        "measurements": run.log,
    }


def _writable(output: Path) -> Path:
    """`output` as an existing folder that takes files, found out now rather than after the training."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / f".{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"output: {output} is a file, or lies in one; a folder is needed") from error
    except OSError as error:
        raise type(error)(f"output: cannot write to {output}: {error.strerror}") from error
    return output


def _print(sections: list[dict[str, Any]], page: Path) -> None:
    table = Table("claim", "measured", "criterion", "verdict", title="Claims", title_justify="left")
    styles = {"holds": "green", "does not hold": "red", "undecided": "yellow"}
    for section in sections:
        for claim in map(Claim.from_json, section["claims"]):
            cells = f"{section['name']}: {claim.name}", f"{claim.interval} {claim.unit}", str(claim.criterion)
            table.add_row(*map(Text, cells), Text(claim.verdict, styles[claim.verdict]))
        for failure in section["failures"]:
            name = f"{section['name']}: {failure['function']}"
            table.add_row(Text(name), Text(failure["error"]), "", Text("failed", "bold red"))
    console = Console()
    console.print(table)
    console.print(f"The report: {page}", markup=False, highlight=False, soft_wrap=True)
