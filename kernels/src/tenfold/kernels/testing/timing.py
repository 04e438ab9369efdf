"""Times functions side by side in one process: in turn, so that a noisy machine is noisy for all of them."""

import csv
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .memory import peak_memory

SAMPLE = 0.2  # seconds that one sample takes at least: short calls are repeated, their mean is the sample


@dataclass(frozen=True)
class Timing:
    """One contender: seconds per call, its share of ours in the same round, and the memory of a call."""

    contender: str
    seconds: float  # median
    fastest: float
    slowest: float
    ratio: float  # median over the rounds of its seconds / ours
    ratio_low: float
    ratio_high: float
    peak_bytes: int
    rounds: int


def require_same(results: Mapping[str, Sequence[Tensor]], tolerance: float) -> None:
    """End the program unless all contenders computed what the first did.

    `tolerance` bounds the largest difference in any tensor, relative to the largest value of the first's.
    """
    (first, truth), *others = results.items()
    for name, tensors in others:
        for i, (x, y) in enumerate(zip(tensors, truth, strict=True)):
            error = (x.double() - y.double()).abs().max() / y.double().abs().max()
            if not error <= tolerance:
                raise SystemExit(f"{name} and {first} differ by {error:.2g} in result {i}: nothing was timed")


def compare(contenders: Mapping[str, Callable[[], object]], *, rounds: int, device: str) -> list[Timing]:
    """Time every contender in each round, after two calls that do not count. The first contender is ours."""
    repeats = {}
    for name, call in contenders.items():
        _timed(call, 1, device)
        repeats[name] = max(1, round(SAMPLE / _timed(call, 1, device)))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            seconds[name].append(_timed(call, repeats[name], device))
    ours = next(iter(seconds.values()))
    timings = []
    for name, counted in seconds.items():
        ratios = [theirs / one for theirs, one in zip(counted, ours, strict=True)]
        timings.append(
            Timing(
                name,
                *(statistics.median(counted), min(counted), max(counted)),
                *(statistics.median(ratios), min(ratios), max(ratios)),
                peak_memory(contenders[name], device=device),
                rounds,
            )
        )
    return timings


def print_table(title: str, timings: Sequence[Timing], smaller: Sequence[Timing] = ()) -> None:
    """A line per contender; with the timings at half the size, how both time and memory grew."""
    before = {timing.contender: timing for timing in smaller}
    growth = f"{'growth: time, memory':>24}" if before else ""
    print(f"\n{title:34}{'ms':>10}{'of ours':>9}{'lowest to highest':>20}{'peak MB':>10}{growth}")
    for t in timings:
        spread, peak = f"{t.ratio_low:.2f} to {t.ratio_high:.2f}", t.peak_bytes / 2**20
        line = f"{t.contender:34}{t.seconds * 1e3:10.2f}{t.ratio:9.2f}{spread:>20}{peak:10.1f}"
        if half := before.get(t.contender):
            line += f"{t.seconds / half.seconds:15.1f}x{t.peak_bytes / half.peak_bytes:7.1f}x"
        print(line, flush=True)


def write_csv(path: Path, rows: Sequence[tuple[dict[str, object], Timing]]) -> None:
    """One row per timing, with what was timed and on what machine; whole or not at all."""
    table = [what | asdict(timing) | machine() for what, timing in rows]
    partial = path.with_name(path.name + ".part")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    partial.replace(path)


def machine() -> dict[str, object]:
    """What the numbers depend on besides the code."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "torch": torch.__version__,
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "gpu": gpu,
    }


def _timed(call: Callable[[], object], repeats: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats
