"""Metrics in one CSV file per run, also when the run was interrupted and resumed."""

import csv
from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter


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


class _Appending(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Take up the header that is there, where Lightning would delete the file."""
        file = Path(self.metrics_file_path)
        if file.exists():
            with file.open(newline="") as lines:
                self.metrics_keys = next(csv.reader(lines), [])
