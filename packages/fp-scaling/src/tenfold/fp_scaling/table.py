"""Tables of training runs: what a law is fitted to, checked before anything is computed from it."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CHANNEL = "channel"
COLUMNS = ("params", "tokens", "exponent_bits", "mantissa_bits", "block_size", "loss")
_LEAST = {"params": 1, "tokens": 1, "exponent_bits": 0, "mantissa_bits": 0, "block_size": 1}


@dataclass(frozen=True)
class RunTable:
    """Runs as columns of one length, float64.

    A run without quantization is one of a high precision with a scale per element: block size 1, for which the law
    has no penalty, and the bits of its dtype (bfloat16 8 and 7, float32 8 and 23). A block size of NaN stands for
    one scale per channel, whose effective block is a constant of the law.

    Args:
        params: N, parameters beside the embeddings.
        tokens: D, trained on.
        exponent_bits: E, stored.
        mantissa_bits: M, stored.
        block_size: B, elements that share a scale; NaN for a channel.
        loss: of validation, in nats per token.
        group: runs with one number share their initial weights and data, hence their noise.
    """

    params: np.ndarray
    tokens: np.ndarray
    exponent_bits: np.ndarray
    mantissa_bits: np.ndarray
    block_size: np.ndarray
    loss: np.ndarray
    group: np.ndarray

    def __len__(self) -> int:
        return len(self.loss)

    @classmethod
    def read(cls, source: "RunTable | str | Path | Sequence[Mapping[str, Any]] | Mapping[str, Any]") -> "RunTable":
        """Check a table: a CSV file, a list of rows, or columns (a dict, a pandas DataFrame).

        The columns are `params, tokens, exponent_bits, mantissa_bits, block_size, loss`; others are left alone but
        for `seed`, with which rows of equal `params`, `tokens` and `seed` are taken as sharing their noise. In
        `block_size`, `channel` means one scale per channel.

        Raises:
            ValueError: no rows, a missing column, or a cell that is not a finite number in its range, by its row.
            FileNotFoundError: no such file.
        """
        if isinstance(source, RunTable):
            return source
        columns = _columns(source)
        if missing := [name for name in COLUMNS if name not in columns]:
            raise ValueError(f"table: no column {', '.join(missing)}; needed: {', '.join(COLUMNS)}")
        checked = {name: _numbers(name, columns[name]) for name in COLUMNS}
        lengths = {len(column) for column in checked.values()}
        if lengths == {0} or len(lengths) > 1:
            raise ValueError(f"table: expected columns of one length, at least 1, got {sorted(lengths)}")
        rows = len(checked["loss"])
        if "seed" in columns:
            keys = list(zip(checked["params"], checked["tokens"], map(str, columns["seed"]), strict=True))
            group = np.unique(np.array([repr(key) for key in keys]), return_inverse=True)[1]
        else:
            group = np.arange(rows)
        return cls(**checked, group=group)

    def rows(self, chosen: np.ndarray) -> "RunTable":
        """The rows that `chosen`, indices or a mask, picks."""
        return RunTable(*(getattr(self, name)[chosen] for name in (*COLUMNS, "group")))

    @property
    def quantized(self) -> np.ndarray:
        """The rows that have a penalty."""
        return self.block_size != 1

    def configurations(self) -> np.ndarray:
        """For each row the number of its configuration; those of one number differ in seed at most."""
        columns = np.stack([getattr(self, name) for name in COLUMNS[:-1]], axis=1)
        return np.unique(np.nan_to_num(columns, nan=0.0), axis=0, return_inverse=True)[1].reshape(-1)


def _columns(source: Any) -> dict[str, list]:
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"table: there is no file {path}")
        try:
            with path.open(newline="", encoding="utf-8") as file:
                source = list(csv.DictReader(file, restkey="beyond the last column"))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"table: {path} is not a CSV file: {error}") from error
    if hasattr(source, "keys"):
        return {str(name): list(source[name]) for name in source.keys()}  # noqa: SIM118 (a DataFrame iterates its names)
    rows = list(source)
    if not rows:
        raise ValueError("table: has no rows")
    return {str(name): [row.get(name) for row in rows] for name in rows[0]}


def _numbers(name: str, column: Sequence[Any]) -> np.ndarray:
    numbers = np.empty(len(column))
    for i, cell in enumerate(column):
        if name == "block_size" and isinstance(cell, str) and cell.strip() == CHANNEL:
            numbers[i] = np.nan
            continue
        try:
            numbers[i] = float(cell)
        except (TypeError, ValueError):
            raise ValueError(f"table: row {i + 1}: {name}: expected a number, got {cell!r}") from None
        if not np.isfinite(numbers[i]):
            raise ValueError(f"table: row {i + 1}: {name}: must be finite, got {numbers[i]:g}")
        least = _LEAST.get(name)
        if numbers[i] < least if least is not None else numbers[i] <= 0:
            bound = "positive" if least is None else f"at least {least}"
            raise ValueError(f"table: row {i + 1}: {name}: must be {bound}, got {numbers[i]:g}")
    return numbers
