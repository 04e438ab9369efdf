"""Metrics in one CSV file per run, also when the run was interrupted and resumed."""

import csv
from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from ..files import write_whole


class RunLogger(CSVLogger):
    """Lightning's CSV logger, but `metrics.csv` lies in `folder` itself and resumed training adds to it."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, name="", version="")

    @property
    @rank_zero_experiment
    def experiment(self) -> "_Appending":
        """What writes the file."""
        if self._experiment is None:
            self._experiment = _Appending(self.log_dir)
        return self._experiment

    def go_on_at(self, step: int) -> None:
        """Drop the rows from `step` on, which a run that was killed wrote after its last checkpoint."""
        file = Path(self.log_dir, ExperimentWriter.NAME_METRICS_FILE)
        if not file.exists():
            return
        with file.open(newline="") as lines:
            rows = list(csv.reader(lines))
        column = rows[0].index("step")
        kept = [row for row in rows[1:] if int(row[column]) < step]
        if len(kept) < len(rows) - 1:
            with write_whole(file) as temporary, temporary.open("w", newline="") as lines:
                csv.writer(lines).writerows([rows[0], *kept])


class _Appending(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Take up the header that is there, where Lightning would delete the file."""
        file = Path(self.metrics_file_path)
        if file.exists():
            with file.open(newline="") as lines:
                self.metrics_keys = next(csv.reader(lines), [])
