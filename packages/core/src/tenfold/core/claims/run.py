"""Running the claims of methods: measurements that are kept on disk, so that an interrupted run goes on."""

import hashlib
import json
import math
import os
import re
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..files import write_whole
from .claim import Claim
from .environment import environment, now
from .fingerprint import fingerprint, required
from .progress import RunProgress
from .report import FORMAT, render

if TYPE_CHECKING:
    from ..methods import Method

Budget = Literal["quick", "default", "full"]

# Seeds are always 0, 1, 2, ...: how many can be chosen, which ones cannot.
SEEDS: dict[str, int] = {"quick": 3, "default": 3, "full": 5}
TUNING_SEED = 1000  # which no claim uses
EXTENSIONS = 4  # by which `tune` goes beyond the grid it was given, at most


class ReproduceError(RuntimeError):
    """Some claims could not be measured; the report holds the others."""


class Run:
    """What a claims function gets: the budget and the seeds to spend, and `measure` to spend them with.

    Args:
        package: import name of the method's package, whose code the stored measurements depend on.
        folder: where measurements are kept.
        budget: `quick` (minutes for all claims, a smoke test with honest intervals), `default`, or `full`.
        seeds: one value per seed and claim.
        progress: where it is shown; nowhere by default.
    """

    def __init__(
        self,
        package: str,
        folder: str | Path,
        *,
        budget: Budget = "default",
        seeds: Sequence[int] = range(SEEDS["default"]),
        progress: RunProgress | None = None,
    ):
        self.package, self.folder = package, Path(folder)
        self.budget, self.seeds = budget, tuple(seeds)
        self.log: list[dict[str, Any]] = []
        self._progress = progress
        self._used: set[Path] = set()

    def plan(self, n: int) -> None:
        """Say that `n` measurements are to come, for the progress display; best before the first of them."""
        if self._progress:
            self._progress.plan(n)

    def measure(self, key: str, fn: Callable[..., dict[str, Any]], /, **settings: Any) -> dict[str, Any]:
        """`fn(**settings)`, or what it returned before under the same code, settings, versions and device.

        The result is written to `<folder>/<key>-<digest of the settings>.json` as soon as it is there.

        Args:
            key: names the measurement: `lm/cog/seed0`.
            fn: a function at the top of a module, so that its code and `settings` are all that it depends on.
            settings: its keyword arguments, JSON values. Seeds and steps belong here.

        Returns:
            What `fn` returned, as JSON gives it back: tuples have become lists, NumPy numbers Python's.

        Raises:
            ValueError: `key` is not usable as a file name, or the result holds a number that is not finite.
            TypeError: `fn` is a closure, or `settings` or the result cannot be written as JSON.
        """
        path = self._path(key, settings)
        code = fingerprint(fn, self.package, settings)
        if self._progress and path not in self._used:
            self._progress.measuring(key)
        record = self._stored(path, key, code)
        stored = record is not None
        if record is None:
            start = time.perf_counter()
            result = fn(**settings)
            seconds = time.perf_counter() - start
            if not isinstance(result, dict):
                got = type(result).__name__
                raise TypeError(f"measurement {key!r}: expected {fn.__name__} to return a dict, got {got}")
            record = {
                "key": key,
                "fingerprint": code,
                "settings": settings,
                "date": now(),
                "seconds": seconds,
                "result": result,
            }
            record = json.loads(self._write(path, key, record))
        if not (stored and path in self._used):  # two claims may stand on one measurement
            entry = {"key": key, "seconds": record["seconds"], "date": record["date"], "stored": stored}
            self.log.append(entry)
            self._used.add(path)
            if self._progress:
                self._progress.measured(key, record["seconds"], stored)
        return record["result"]

    def tune(
        self, key: str, fn: Callable[..., dict[str, Any]], metric: str, /, *, lr: Sequence[float], **settings: Any
    ) -> float:
        """The learning rate at which `fn(lr=…, seed=TUNING_SEED, **settings)[metric]` is lowest.

        Where the best of `lr` is its lowest or highest rate, the grid goes on in that direction by its own last
        step, until it is not: a baseline whose best rate lies at the edge of a grid has not been tuned. All
        arms of a comparison should start from the same `lr`.

        Args:
            key: of the measurements: `<key>/lr0.004`.
            fn: as for `measure`; returns None for `metric` where the training diverged.
            metric: the entry of the result to make small, on data that no claim reports where there are any.
            lr: at least two rates, increasing.
            settings: the other keyword arguments of `fn`.

        Raises:
            ValueError: `lr` is not increasing, or has fewer than two rates.
            RuntimeError: every training diverged.
        """
        rates = list(lr)
        if len(rates) < 2 or sorted(set(rates)) != rates or rates[0] <= 0:
            raise ValueError(f"lr: expected at least two positive rates, increasing, got {lr}")
        losses: dict[float, float] = {}
        for extension in range(EXTENSIONS + 1):
            for rate in rates:
                if rate not in losses:
                    loss = self.measure(f"{key}/lr{rate:g}", fn, lr=rate, seed=TUNING_SEED, **settings)[metric]
                    losses[rate] = math.inf if loss is None else loss
            best = min(rates, key=losses.__getitem__)
            if math.isinf(losses[best]):
                raise RuntimeError(f"{key}: every training diverged, with learning rates {rates}")
            if best not in (rates[0], rates[-1]) or extension == EXTENSIONS:
                break
            self.plan(1)
            if best == rates[0]:
                rates.insert(0, _round(rates[0] ** 2 / rates[1]))
            else:
                rates.append(_round(rates[-1] ** 2 / rates[-2]))
        return best

    def _path(self, key: str, settings: dict[str, Any]) -> Path:
        if not re.fullmatch(r"\w[\w.=+-]*(/\w[\w.=+-]*)*", key, re.ASCII):
            raise ValueError(f"key: expected letters, digits and '_.=+-' in parts separated by '/', got {key!r}")
        try:
            digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        except TypeError as error:
            raise TypeError(f"measurement {key!r}: settings must be JSON values: {error}") from error
        return self.folder / f"{key}-{digest[:8]}.json"

    def _stored(self, path: Path, key: str, code: str) -> dict[str, Any] | None:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["fingerprint"] == code:
                return record
            reason = "the code, a version or the device changed"
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            reason = "its file is damaged"
        if self._progress:
            self._progress.say(f"{key}: measured again, {reason}")
        return None

    def _write(self, path: Path, key: str, record: dict[str, Any]) -> str:
        try:
            text = json.dumps(record, indent=1, allow_nan=False, default=_plain)
        except ValueError as error:
            raise ValueError(f"measurement {key!r}: the result holds a number that is not finite") from error
        except TypeError as error:
            raise TypeError(f"measurement {key!r}: the result must be JSON values: {error}") from error
        with write_whole(path) as file:
            file.write_text(text, encoding="utf-8")
        return text


def reproduce(
    methods: "Sequence[Method]",
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


def _measure(method: "Method", run: Run, progress: RunProgress) -> dict[str, Any]:
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


def _round(rate: float) -> float:
    """To six digits: 0.0016² / 0.0008 is to be called 0.0032."""
    return float(f"{rate:.6g}")


def _plain(value: Any) -> Any:
    """NumPy and torch values as JSON ones."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not a JSON value")


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
