"""A run of claims: measurements that are kept on disk, so that an interrupted one goes on."""

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from ..environment import now
from ..files import write_whole
from .fingerprint import fingerprint
from .progress import RunProgress

Budget = Literal["quick", "default", "full"]

# Seeds are always 0, 1, 2, ...: how many can be chosen, which ones cannot.
SEEDS: dict[str, int] = {"quick": 3, "default": 3, "full": 5}
TUNING_SEED = 1000  # which no claim uses
EXTENSIONS = 4  # by which `tune` goes beyond the grid it was given, at most


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


def _round(rate: float) -> float:
    """To six digits: 0.0016² / 0.0008 is to be called 0.0032."""
    return float(f"{rate:.6g}")


def _plain(value: Any) -> Any:
    """NumPy and torch values as JSON ones."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not a JSON value")
