"""`tenfold fp-scaling sweep`: a grid of trainings as a table for `fit-law`, kept on disk run by run."""

import csv
import io
import time
from itertools import product
from pathlib import Path
from typing import Any

from tenfold.core.claims.progress import RunProgress
from tenfold.core.files import write_whole
from tenfold.kernels import FloatFormat

from .pilot import TOKENS_PER_STEP, shape, train
from .recipe import QuantRecipe
from .table import CHANNEL

FLOAT32 = "float32"  # nothing quantized
KEY = ("model", "format", "block_size", "tokens", "seed", "lr", "path")
FIELDS = (*KEY, "params", "exponent_bits", "mantissa_bits", "loss", "seconds")


def sweep(
    models: list[str] = ["1x32", "2x32", "2x64"],  # noqa: B006 (only read)
    tokens: list[float] = [1e5, 2e5, 4e5],  # noqa: B006
    formats: list[str] = [FLOAT32, "e1m1", "e1m2", "e2m1"],  # noqa: B006
    block_sizes: list[int | str] = [8, 32, CHANNEL],  # noqa: B006
    seeds: int = 1,
    lr: float = 8e-3,
    path: str | None = None,
    output: Path = Path("runs/fp-scaling/sweep.csv"),
) -> None:
    """Train a grid of models, token budgets, formats and block sizes; a table for fit-law.

    Every finished run is in the table at once. Started again, it trains what is missing.

    Args:
        models: LAYERSxWIDTH, such as 4x64; the width a multiple of 32, the feed-forward 3 times as wide.
        tokens: to train on, rounded to whole batches of 512.
        formats: of the quantized operands P2, P4 and P6 (e2m1, e4m3), and float32 for no quantization.
        block_sizes: elements that share a scale, and `channel` for one scale per channel.
        seeds: runs of each, with seeds 0, 1, ...; runs of one seed share initial weights and data.
        lr: the highest learning rate, the same for all.
        path: your text, a .txt or .jsonl file or a folder; by default the Wikipedia introductions.
        output: the table, a CSV file; rows of other sweeps in it stay.
    """
    runs = _grid(models, tokens, formats, block_sizes, seeds, lr, path)
    table = _read(output)
    done = {_key(row) for row in table}
    missing = [run for run in runs if _key(run) not in done]
    with RunProgress() as progress:
        progress.begin("sweep")
        progress.plan(len(runs))
        for run in runs:
            name = "/".join(str(run[field]) for field in ("model", "format", "block_size", "tokens", "seed"))
            if run not in missing:
                progress.measured(name, 0, True)
                continue
            progress.measuring(name)
            start = time.perf_counter()
            measured = _train(run)
            seconds = time.perf_counter() - start
            if measured["loss"] is None:
                progress.say(f"{name}: diverged, and is left out of the table; a lower --lr may help")
            else:
                row = run | {field: measured[field] for field in ("params", "loss")} | {"seconds": round(seconds, 1)}
                table.append(row)
                with write_whole(output) as file:
                    file.write_text(_text(table), encoding="utf-8")
            progress.measured(name, seconds, False)
        progress.end()
    print(f"{len(table)} runs in {output}; next: tenfold fp-scaling fit-law {output}")


def _grid(models, tokens, formats, block_sizes, seeds, lr, path) -> list[dict[str, Any]]:
    """All runs, the longest last; everything wrong with them is found here, before the first."""
    for name, values in (("models", models), ("tokens", tokens), ("formats", formats), ("block_sizes", block_sizes)):
        if not values:
            raise ValueError(f"{name}: give at least one")
    if seeds < 1:
        raise ValueError(f"seeds: must be at least 1, got {seeds}")
    if not lr > 0:
        raise ValueError(f"lr: must be positive, got {lr}")
    for count in tokens:
        if not TOKENS_PER_STEP <= count < float("inf"):
            raise ValueError(f"tokens: must be at least {TOKENS_PER_STEP}, one batch, got {count:g}")
    arms = []
    for fmt, block in product(dict.fromkeys(formats), dict.fromkeys(map(str, block_sizes))):
        arm = {"format": fmt, "block_size": block, "exponent_bits": 8, "mantissa_bits": 23}
        if fmt == FLOAT32:
            arm["block_size"] = "1"
        else:
            parsed = FloatFormat.parse(fmt)
            arm |= {"exponent_bits": parsed.exponent_bits, "mantissa_bits": parsed.mantissa_bits}
        if arm not in arms:
            arms.append(arm)
    for model, arm in product(models, arms):
        sizes, recipe = shape(model), _recipe(arm)
        for features in (sizes["dim"], sizes["ffn"]):
            recipe.check_layer(f"model {model}", features, features)
    lengths = sorted({round(count / TOKENS_PER_STEP) * TOKENS_PER_STEP for count in tokens})
    return [
        {"model": model, **arm, "tokens": length, "seed": seed, "lr": lr, "path": path or ""}
        for length, model, arm, seed in product(lengths, dict.fromkeys(models), arms, range(seeds))
    ]


def _recipe(arm: dict[str, Any]) -> QuantRecipe:
    if arm["format"] == FLOAT32:
        return QuantRecipe(targets=())
    return QuantRecipe(arm["format"], **_scale(arm["block_size"]))


def _scale(block: str) -> dict[str, Any]:
    if block == CHANNEL:
        return {"scale": "channel"}
    if not str(block).isdecimal():
        raise ValueError(f"block_sizes: expected whole numbers or {CHANNEL!r}, got {block!r}")
    return {"scale": "block", "block_size": int(block)}


def _train(run: dict[str, Any]) -> dict[str, Any]:
    quantized = run["format"] != FLOAT32
    return train(
        model=run["model"],
        steps=run["tokens"] // TOKENS_PER_STEP,
        lr=run["lr"],
        seed=run["seed"],
        path=run["path"] or None,
        **({"fmt": run["format"], **_scale(run["block_size"])} if quantized else {}),
    )


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"{float(row[field]):g}" if field in ("tokens", "lr") else str(row[field]) for field in KEY)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            _key(row)
            float(row["loss"])
    except (KeyError, TypeError, ValueError, csv.Error, OSError) as error:
        raise ValueError(f"output: {path} is not a table of this command: {error!r}; give another file") from error
    return rows


def _text(table: list[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, FIELDS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(table)
    return buffer.getvalue()
